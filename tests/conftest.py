"""Let kernels run without a GPU, and let no skipped test go unnoticed in CI."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it stands before any import of them.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    if find_spec("triton") is None:
        kernels = Path(__file__).parent.parent / "moba_fast" / "kernels"
        config.option.ignore = [*(config.option.ignore or []), str(kernels)]


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and os.environ.get("CI"):
        for report in skipped:
            terminalreporter.write_line(f"skipped in CI: {report.nodeid}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    # Workers of pytest-xdist report to the process that started them.
    if reporter and os.environ.get("CI") and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

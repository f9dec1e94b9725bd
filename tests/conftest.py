"""Let kernels run without a GPU, and let no skipped test go unnoticed in CI."""

import importlib
import inspect
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it stands before any import of them.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def same_products_on_every_machine():
    """Let Triton's interpreter multiply float32 alike whatever BLAS NumPy runs.

    A BLAS rounds a float32 product by the processor's vector width and by where in a
    tile a row lies. Sums in float64 leave the one rounding at the end. The operator @,
    with which the reference multiplies, does not go through this name.
    """
    product = np.matmul

    def multiply(a, b, dtype=None, **options):
        if dtype != np.float32:
            return product(a, b, dtype=dtype, **options)
        return product(a, b, dtype=np.float64, **options).astype(np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "matmul", multiply)
        yield


@pytest.fixture(scope="session", autouse=True)
def names_of_builtins_are_kept():
    """Let Triton's interpreter list what it replaces once, not at every call.

    It looks through its whole language whenever a kernel calls a function, which takes
    a quarter of its time.
    """
    if find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    is_builtin, names = interpreter.tl.core.is_builtin, {}

    def patch(package, builder, scope):
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, x in members if is_builtin(x)]
        for name in names[package]:
            member = getattr(package, name)
            # False where a caller of this function has replaced it.
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_builtin", patch)
        yield


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

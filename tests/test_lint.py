"""Style and formatting are part of the tests, notebooks included."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def ruff(*arguments, folder=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "ruff", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_clean(arguments):
    result = ruff(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_settings_find_faults(arguments, tmp_path):
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "bad.py").write_text("import os\nx = {  }\n")
    assert ruff(*arguments, folder=tmp_path).returncode == 1

"""Execute one notebook in a fresh kernel and say what became of it."""

import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Run:
    """One executed notebook.

    Attributes:
        path: the file that was read.
        notebook: its cells with fresh outputs, up to the failing one.
        seconds: wall time, the kernel's start included; None if it was only read.
        error: None, or the failing cell's id with its traceback.
    """

    path: Path
    notebook: nbformat.NotebookNode
    seconds: float | None
    error: str | None

    @property
    def stderr(self):
        """Return {cell id: what the cell wrote to stderr}."""
        return {
            cell.id: output.text
            for cell in self.notebook.cells
            for output in cell.get("outputs", [])
            if output.get("name") == "stderr"
        }


def stored(path):
    """Return a notebook with the outputs that its file holds, as a ``Run``."""
    path = Path(path)
    return Run(path, nbformat.read(path, as_version=4), seconds=None, error=None)


def execute(path, *, timeout=600, startup="", on_cell=None):
    """Run a notebook from top to bottom in its own folder, without saving it.

    The kernel is the one of the running Python and reads no profile of the user's,
    so the outputs depend on the notebook and the installed packages alone.

    Args:
        path: the ``.ipynb`` file.
        timeout: seconds that one cell may take.
        startup: Python code that the kernel runs before the first cell.
        on_cell: called without arguments after every code cell.

    Returns:
        A ``Run``; a failing cell is reported in it, not raised.
    """
    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    failing = []
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        # The state of widgets belongs to the kernel and ends with it.
        store_widget_state=False,
        # The kernel would warn that its loopback connection is not encrypted.
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=lambda cell, cell_index: failing.append(cell.id),
        on_cell_executed=lambda **_: on_cell() if on_cell else None,
    )
    started, error = time.perf_counter(), None
    with tempfile.TemporaryDirectory() as folder:
        try:
            client.execute(env=kernel_environment(folder, startup))
        except (CellControlSignal, DeadKernelError) as problem:
            reason = ANSI.sub("", str(problem)).strip()
            error = f"cell {failing[-1]!r} of {path.name} failed:\n{reason}"
    return Run(path, notebook, time.perf_counter() - started, error)


def kernel_environment(folder, startup=""):
    """Return the environment of a kernel that reads no profile of the user's.

    Args:
        folder: empty folder that becomes IPython's own.
        startup: Python code that the kernel runs before the first cell.
    """
    scripts = Path(folder) / "profile_default" / "startup"
    scripts.mkdir(parents=True)
    (scripts / "first.py").write_text(startup, encoding="utf-8")
    # The kernel specification says "python", which must be this very Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {
        "IPYTHONDIR": str(folder),
        "PATH": path,
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }

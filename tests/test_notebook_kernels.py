"""The notebook about kernels is of use where there is no Triton, too."""

from pathlib import Path

from moba_lab.notebooks.rules import output_text
from moba_lab.notebooks.run import execute

PATH = Path(__file__).parent.parent / "notebooks" / "08_inside_the_kernels.ipynb"
# Stands for a machine without the package: every import of it fails.
WITHOUT_TRITON = "import sys\nsys.modules['triton'] = None"
WITH_KERNELS = {"gate", "tile-map", "attend", "combine", "backward", "break"}


def test_without_triton_only_the_kernels_are_left_out():
    run = execute(PATH, timeout=120, startup=WITHOUT_TRITON)
    assert run.error is None, run.error
    assert run.stderr == {}
    said = {
        cell.id: "".join(map(output_text, cell.outputs))
        for cell in run.notebook.cells
        if cell.cell_type == "code"
    }
    assert "Triton, made for Linux only, is not here" in said["interpreter"]
    assert {name for name in WITH_KERNELS if said[name]} == set()
    for name in ("map", "tile", "backward-map", "roofline"):
        assert "What to see:" in said[name]

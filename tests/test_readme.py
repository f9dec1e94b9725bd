"""What the README shows is what happens."""

import contextlib
import io
import re
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from moba_lab.picture import PATH, selection_picture

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def fenced(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_eight_lines_print_what_the_readme_says():
    [code], [expected] = fenced("python"), fenced("text")
    assert len([line for line in code.splitlines() if line]) == 8
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected


@pytest.mark.parametrize("command", "".join(fenced("bash")).split("\n")[:-1])
def test_every_command_has_a_rule(command):
    program, *targets = command.split()
    assert program == "make"
    for target in targets:
        dry = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        )
        assert dry.returncode == 0, dry.stderr
        assert "python" in dry.stdout


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 7
    for link in links:
        assert (ROOT / link).is_file(), link


def test_every_notebook_is_in_the_table():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert f"(notebooks/{path.name})" in README


def test_every_file_of_the_stages_is_in_the_table():
    stages = {path.name for path in (ROOT / "moba_ref").glob("[a-z]*.py")}
    for name in stages - {"definition.py"}:
        assert f"| `{name}` |" in README
    assert "moba_ref/definition.py" in README


def test_the_picture_is_the_one_that_viz_draws():
    figure = selection_picture()
    drawn = io.BytesIO()
    figure.savefig(drawn)
    drawn.seek(0)
    expected, stored = (matplotlib.image.imread(x) for x in (drawn, PATH))
    assert stored.shape[:2] == expected.shape[:2]
    # Fonts differ between machines; the cells do not.
    close = np.isclose(stored[..., :3], expected[..., :3], atol=0.02).all(-1)
    assert close.mean() > 0.95

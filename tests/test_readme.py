"""What the README shows is what happens."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from moba_fast import _flash, backends
from moba_fast.backends import look_around
from moba_lab import readme
from moba_lab.picture import FOLDER, PICTURES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def fenced(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(code):
    """Execute code of the README and return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue()


def test_the_eight_lines_print_what_the_readme_says():
    code, expected = fenced("python")[0], fenced("text")[0]
    assert len([line for line in code.splitlines() if line]) == 8
    assert run(code) == expected


def test_the_explorer_of_the_readme_is_the_one_of_its_picture():
    *lines, last = fenced("python")[1].splitlines()
    names = {}
    exec("\n".join([*lines, f"explorer = {last}"]), names)
    pixels = io.BytesIO()
    names["explorer"].figure().savefig(pixels)
    assert_same_picture(pixels, FOLDER / "explorer.png")


@pytest.fixture
def no_gpu(monkeypatch):
    """Let `backends` look at a machine as the README's: triton, but no GPU."""
    for name in (_flash.VARIABLE, "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        sys.modules["moba_fast.backends"], "find_spec", lambda name: name
    )
    for look in (look_around, _flash.why_not):
        look.cache_clear()
    yield
    for look in (look_around, _flash.why_not):
        look.cache_clear()


def test_backends_print_what_the_readme_says(no_gpu):
    printed, expected = run(fenced("python")[2]), fenced("text")[1]
    assert "torch: yes, PyTorch " in expected
    version = r"PyTorch \S+"
    assert re.sub(version, "", printed) == re.sub(version, "", expected)


def test_the_table_of_backends_is_the_one_that_backends_give(tmp_path, capsys):
    assert readme.main(["--check"]) == 0
    changed = tmp_path / "README.md"
    changed.write_text(README.replace("| bfloat16, float16 |", "| float16 |"))
    before = changed.read_text()
    assert readme.main(["--check"], changed) == 1
    assert "run python -m moba_lab.readme" in capsys.readouterr().err
    assert changed.read_text() == before
    assert readme.main([], changed) == 0
    assert changed.read_text() == README


def test_the_table_is_the_same_on_every_machine(no_gpu):
    assert readme.table(backends()) in README


FIRST, LAST = readme.FIRST.format("x"), readme.LAST.format("x")


@pytest.mark.parametrize("text", ["", FIRST, LAST + FIRST, 2 * FIRST + LAST])
def test_a_file_without_the_two_markers_is_left_alone(text):
    with pytest.raises(ValueError, match="expected '<!-- x written by"):
        readme.with_table(text, "x", "")


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


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_the_picture_is_the_one_that_is_drawn_now(path):
    assert f"(docs/{path.name})" in README
    drawn = io.BytesIO()
    PICTURES[path]().savefig(drawn)
    assert_same_picture(drawn, path)


def assert_same_picture(drawn, path):
    drawn.seek(0)
    expected, stored = (matplotlib.image.imread(x) for x in (drawn, path))
    assert stored.shape[:2] == expected.shape[:2]
    # The edges of letters differ between versions of matplotlib; the rest does not.
    close = np.isclose(stored[..., :3], expected[..., :3], atol=0.02).all(-1)
    assert close.mean() > 0.98

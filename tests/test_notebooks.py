"""Notebooks keep their rules, run, and print what is stored in them."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from moba_lab.example import running_example
from moba_lab.explorer import BlockExplorer
from moba_lab.notebooks.__main__ import main
from moba_lab.notebooks.clean import WIDGET, clean
from moba_lab.notebooks.rules import WRITE, check, output_text
from moba_lab.notebooks.run import execute, stored
from moba_lab.notebooks.site import remote_loads, write_site

TESTS = Path(__file__).parent
NOTEBOOKS = sorted((TESTS.parent / "notebooks").glob("*.ipynb"))
AXES = (TESTS / "notebook_axes.py").read_text()
# Only a guard against a cell that hangs.
SECONDS = 120
# What a cell says that differs between machines, such as its processor.
VARIES = "varies"
UNITS = r"(?:ns|µs|us|ms|s|min|KiB|MiB|GiB|[KMGT]?B/s|tokens/s|GFLOPs?|TFLOPs?)\b"
MEASURED = re.compile(rf"\d[\d.,]*\s*{UNITS}")
FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?\d+e[-+]?\d+")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def comparable(cell):
    """Return what a cell printed, without measurements and digits of floats.

    Counts, positions and block ids stay: they are what the sentences are about.
    """
    if cell.id == "setup" or VARIES in cell.metadata.get("tags", []):
        return None
    kinds = [sorted(output.get("data", {})) for output in cell.outputs]
    texts = [output.get("text", "") for output in cell.outputs]
    texts += [output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    text = FLOAT.sub("#", MEASURED.sub("#", "\n".join(texts)))
    # Arrays are printed in columns as wide as their longest number.
    return kinds, re.sub(r"\s+", " ", text)


def differences(fresh, committed):
    """Name the cells whose outputs say something else than the committed ones."""
    pairs = zip(fresh.cells, committed.cells, strict=True)
    for new, old in pairs:
        if new.cell_type == "code" and comparable(new) != comparable(old):
            yield f"cell {new.id!r} prints {comparable(new)}, stored {comparable(old)}"


@every_notebook
def test_notebook_keeps_the_rules(path):
    problems = check(path)
    assert not problems, "\n".join(problems)


@every_notebook
def test_notebook_runs_and_prints_what_is_stored(path, tmp_path, monkeypatch):
    report = tmp_path / "axes.txt"
    report.touch()
    monkeypatch.setenv("MOBA_AXES_REPORT", str(report))
    run = execute(path, timeout=SECONDS, startup=AXES)
    assert run.error is None, run.error
    assert run.stderr == {}
    assert report.read_text().splitlines() == []
    fresh = clean(run.notebook, path.parent.parent)
    found = list(differences(fresh, stored(path).notebook))
    assert not found, "\n".join([*found, WRITE.format(path.stem)])


SETUP = "import moba_ref"
LESSON = "01_good"


def text(name, source):
    return new_markdown_cell(source, id=name)


def code(name, source, printed=""):
    outputs = [new_output("stream", text=printed)] if printed else []
    return new_code_cell(source, id=name, outputs=outputs)


def good_lesson():
    """Return the smallest notebook that keeps every rule."""
    cells = [
        text("title", "# 1 · Good\n\nKeep every rule."),
        text("goals", "You will be able to write $x^2$."),
        code("setup", SETUP),
        *(code(f"step-{number}", f"x = {number}") for number in range(16)),
        code("draw", "figure()", "What to see: query 22 reads block 4"),
        code("compare", 'agree(1, 1, "out")', "out: agrees"),
        text("exercises", "## Exercises\n\nGuess. <details>3</details>"),
        code("try", "check(None)", "not solved yet"),
        text("recap", "## Recap\n\nOne. Two is 1.5 long. Three!"),
        text("links", "[before](00_before.ipynb) · [after](02_after.ipynb)"),
    ]
    return new_notebook(cells=cells)


def problems_of(notebook, folder, *, name=LESSON, tidy=True):
    """Write a notebook among neighbours and check it."""
    if tidy:
        clean(notebook, folder.parent)
    for neighbour in ("00_before", "02_after"):
        other = new_notebook(cells=[code("setup", SETUP)])
        nbformat.write(other, folder / f"{neighbour}.ipynb")
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return check(path)


def test_a_good_lesson_breaks_no_rule(tmp_path):
    assert problems_of(good_lesson(), tmp_path) == []


def cell(notebook, name):
    return next(c for c in notebook.cells if c.id == name)


def replace(name, source):
    def change(notebook):
        cell(notebook, name).source = source

    return change


def remove(name):
    def change(notebook):
        notebook.cells.remove(cell(notebook, name))

    return change


def rename(name, new):
    def change(notebook):
        cell(notebook, name).id = new

    return change


def prints(what):
    def change(notebook):
        cell(notebook, "draw").outputs[0].text = what

    return change


def shows_html(html):
    def change(notebook):
        data = {"text/html": html}
        cell(notebook, "draw").outputs = [new_output("display_data", data)]

    return change


def many_steps(lines):
    def change(notebook):
        for number in range(16):
            cell(notebook, f"step-{number}").source = "\n".join(["x = 1"] * lines)

    return change


def too_many_cells(notebook):
    notebook.cells[3:3] = [code(f"more-{number}", "x = 1") for number in range(21)]


BREACHES = {
    "id is random": (rename("draw", "8b6fa1c2"), "expected a readable id"),
    "id is not kebab": (rename("draw", "Draw_It"), "expected a readable id"),
    "file is big": (prints("x" * 300_000), "bytes, at most 300,000"),
    "setup differs": (replace("setup", "import torch"), "differs from the setup cell"),
    "setup missing": (remove("setup"), "expected 'setup' as the id"),
    "dead link": (replace("goals", "You will be able to [x](x.py)"), "does not exist"),
    "remote picture": (
        replace("goals", "You will be able to ![x](https://moba.invalid/x.png)"),
        "is not local",
    ),
    "protocol-relative link": (
        replace("goals", 'You will be able to <a href="//moba.invalid">x</a>'),
        "is not local",
    ),
    "pip": (replace("draw", "!pip install moba"), "would install or download"),
    "magic pip": (replace("draw", "%pip install moba"), "would install or download"),
    "network": (replace("draw", "import urllib.request"), "would install or download"),
    "unknown formula": (
        replace("goals", r"You will be able to $\nonsense$"),
        "is not known here",
    ),
    "broken formula": (replace("goals", r"You will be able to $\frac{$"), "is broken"),
    "path": (prints("read /home/me/moba/x.py"), "stores the path /home/me"),
    "address": (prints("key 0x7f3a2b1c4d5e"), "stores the address 0x7f3a2b1c4d5e"),
    "film from a CDN": (
        shows_html('<link rel="stylesheet" href="https://moba.invalid/a.css">'),
        "loads https://moba.invalid/a.css",
    ),
    "style from a CDN": (
        shows_html("<style>@import url('https://moba.invalid/a.css')</style>"),
        "loads https://moba.invalid/a.css",
    ),
    "no title": (replace("title", "Good\n\nGoal."), "expected the title"),
    "no goal": (replace("title", "# 1 · Good"), "expected the goal"),
    "no promise": (remove("goals"), "You will be able to"),
    "few cells": (remove("step-0"), "24 cells, expected 25 to 45"),
    "many cells": (too_many_cells, "46 cells, expected 25 to 45"),
    "long code": (replace("step-0", "x = 1\n" * 16), "16 lines of code, at most 15"),
    "mostly long code": (many_steps(7), "code cells exceed 6 lines"),
    "long text": (replace("goals", "You will be able to " + "x " * 86), "91 words"),
    "no agreement": (replace("compare", "pass"), "calls agree"),
    "no exercises": (remove("exercises"), "the word 'Exercises'"),
    "answers unfolded": (replace("exercises", "## Exercises\n\n3"), "<details>"),
    "no check cell": (remove("try"), "not solved yet"),
    "no recap": (remove("recap"), "the word 'Recap'"),
    "long recap": (replace("recap", "# Recap\n\nA. B. C. D."), "recap of 4 sentences"),
    "no way back": (replace("links", "[n](02_after.ipynb)"), "link to 00_before.ipynb"),
    "no way on": (replace("links", "[b](00_before.ipynb)"), "link to 02_after.ipynb"),
}


@pytest.mark.parametrize(("change", "message"), BREACHES.values(), ids=BREACHES)
def test_every_breach_is_reported(change, message, tmp_path):
    notebook = good_lesson()
    change(notebook)
    assert any(message in problem for problem in problems_of(notebook, tmp_path))


def store_error(notebook):
    error = {"ename": "ValueError", "evalue": "no", "traceback": []}
    cell(notebook, "draw").outputs = [new_output("error", **error)]


def store_stderr(notebook):
    cell(notebook, "draw").outputs = [new_output("stream", name="stderr", text="w")]


def store_counts(notebook):
    cell(notebook, "draw").execution_count = 3


def store_widget(notebook):
    data = {"image/png": "iVBORw0KGgo=", WIDGET: {"model_id": "0" * 32}}
    cell(notebook, "draw").outputs = [new_output("display_data", data)]


def store_metadata(notebook):
    cell(notebook, "draw").metadata["collapsed"] = True


STALE = {
    "edited": (replace("draw", "other()"), "made from other code"),
    "counts": (store_counts, "execution counts are not 1 to 20"),
    "error": (store_error, "stores an error: ValueError: no"),
    "stderr": (store_stderr, "stores stderr: 'w'"),
    "widget": (store_widget, "not in the stored form"),
    "metadata": (store_metadata, "not in the stored form"),
}


@pytest.mark.parametrize(("change", "message"), STALE.values(), ids=STALE)
def test_outputs_that_are_not_of_one_clean_run_are_reported(change, message, tmp_path):
    notebook = clean(good_lesson(), tmp_path)
    change(notebook)
    problems = problems_of(notebook, tmp_path, tidy=False)
    assert any(message in problem for problem in problems)


def test_two_cells_with_one_id_are_reported(tmp_path):
    notebook = good_lesson()
    rename("step-0", "step-1")(notebook)
    path = tmp_path / "01_good.ipynb"
    path.write_text(nbformat.v4.writes(clean(notebook, tmp_path)))
    assert any("two cells have this id" in problem for problem in check(path))


def test_solutions_need_no_skeleton(tmp_path):
    notebook = new_notebook(cells=[code("setup", SETUP)])
    assert problems_of(notebook, tmp_path, name="solutions") == []


def write(folder, name, *cells):
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plt.plot([1, 2])", ["x axis of axes 0 ('')", "y axis of axes 0 ('')"]),
        ("plt.plot([1, 2]); plt.xlabel('key')", ["y axis of axes 0 ('')"]),
        ("plt.plot([1, 2]); plt.axis('off')", []),
        ("plt.plot([1, 2]); plt.xlabel('key'); plt.ylabel('score')", []),
    ],
)
def test_unlabelled_axes_are_reported(source, expected, tmp_path, monkeypatch):
    report = tmp_path / "axes.txt"
    monkeypatch.setenv("MOBA_AXES_REPORT", str(report))
    path = write(
        tmp_path, "draw", code("draw", f"import matplotlib.pyplot as plt\n{source};")
    )
    run = execute(path, startup=AXES)
    assert run.error is None
    assert report.read_text().splitlines() == expected


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        ("error 1.2e-16, 3 blocks", "error 4e-17, 3 blocks", False),
        ("took 12 ms", "took 9.5 ms", False),
        ("[ 0.25 -1.  ]", "[ 0.251 -1. ]", False),
        ("reads blocks 0, 4", "reads blocks 0, 5", True),
        ("agrees", "differs", True),
    ],
)
def test_outputs_are_compared_without_digits_of_floats(old, new, differs):
    notebooks = [new_notebook(cells=[code("draw", "1", said)]) for said in (new, old)]
    assert bool(list(differences(*notebooks))) == differs


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """Run one good and two failing notebooks by the command, and store them."""
    folder = tmp_path_factory.mktemp("work") / "notebooks"
    folder.mkdir()
    write(folder, "00_fails", text("title", "# A\n\nFail."), code("bad", "1 / 0"))
    write(folder, "01_dies", code("leave", "import os\nos._exit(1)"))
    source = "import sys\nprint(object())\nprint('careful', file=sys.stderr)\nobject()"
    write(
        folder,
        "02_runs",
        text("title", "# Good\n\nHold $x_1$ and $$\\frac{1}{2}$$"),
        text("links", "[back](00_fails.ipynb#bad), [test](../test.py)"),
        code("speak", source),
        code("blank", ""),
        code("where", "import os\nprint(os.getcwd())"),
        code("order", "print(1)\nprint(2)\ndisplay(3)\nprint(4)"),
    )
    before = (folder / "00_fails.ipynb").read_bytes()
    site = folder.parent / "site"
    arguments = ["--write", "--folder", str(folder), "--site", str(site)]
    return folder, site, before, arguments


@pytest.fixture(scope="module")
def outcome(three_runs):
    *_, arguments = three_runs
    capture = pytest.MonkeyPatch()
    said = []
    for stream in ("stdout", "stderr"):
        capture.setattr(f"sys.{stream}", Tee(said))
    code_of_exit = main(arguments)
    capture.undo()
    return code_of_exit, "".join(said)


class Tee:
    """A text stream that keeps what is written to it."""

    def __init__(self, kept):
        self.write, self.flush = kept.append, lambda: None


def test_a_failing_notebook_fails_the_command_after_the_others(outcome):
    code_of_exit, said = outcome
    assert code_of_exit == 1
    assert re.search(r"00_fails: FAILED in \d+\.\d s", said)
    assert re.search(r"02_runs: passed in \d+\.\d s", said)
    assert "cell 'bad' of 00_fails.ipynb failed" in said
    assert "ZeroDivisionError: division by zero" in said
    assert "cell 'leave' of 01_dies.ipynb failed" in said
    assert "1 of 3 notebooks ran" in said


def test_a_failing_notebook_is_not_stored(three_runs, outcome):
    folder, _, before, _ = three_runs
    assert (folder / "00_fails.ipynb").read_bytes() == before


def test_stored_outputs_are_clean_and_stable(three_runs, outcome):
    folder, _, _, arguments = three_runs
    path = folder / "02_runs.ipynb"
    first = path.read_bytes()
    speak, blank, where, order = (stored(path).notebook.cells)[2:]
    counts = [c.execution_count for c in (speak, blank, where, order)]
    assert counts == [1, None, 2, 3]
    assert [output_text(output) for output in order.outputs] == ["1\n2\n", "\n3", "4\n"]
    said = [output_text(output) for output in speak.outputs]
    assert [line.strip() for line in said] == ["<object object>", "<object>"]
    assert where.outputs[0].text == "notebooks\n"
    assert "dropped stderr of cell 'speak'" in outcome[1]
    other_site = str(folder.parent / "other")
    assert main([*arguments, "--site", other_site, "02"]) == 0
    assert path.read_bytes() == first
    others = (folder.parent / "other" / "index.html").read_text()
    assert others.count("stored outputs, not run this time") == 2


def test_pages_hold_what_was_run(three_runs, outcome):
    _, site, _, _ = three_runs
    page = (site / "02_runs.html").read_text()
    assert "<msub><mi>x</mi><mn>1</mn></msub>" in page
    assert "<mfrac>" in page
    assert 'href="00_fails.html#bad"' in page
    assert 'href="../test.py"' in page
    failed = (site / "00_fails.html").read_text()
    assert "ZeroDivisionError" in failed
    index = (site / "index.html").read_text()
    assert index.index("00_fails.html") < index.index("02_runs.html")
    assert index.count('class="failed"') == 2
    for name in ("00_fails", "01_dies", "02_runs", "index"):
        assert remote_loads((site / f"{name}.html").read_text()) == []


def test_figures_get_their_sentence_as_alternative_text(tmp_path):
    png = {"image/png": "iVBORw0KGgo="}
    cell = code("draw", "figure()", "What to see: query 22 reads block 4\n")
    cell.outputs.append(new_output("display_data", png))
    path = write(tmp_path, "00_draw", text("title", "# A"), cell)
    write_site([stored(path)], tmp_path / "site")
    page = (tmp_path / "site" / "00_draw.html").read_text()
    assert 'alt="What to see: query 22 reads block 4"' in page


EXPLORE = """
from moba_lab.example import running_example
from moba_lab.explorer import BlockExplorer

e = running_example()
BlockExplorer(e.q, e.k, e.v, block_size=4, topk=3, query=22, text=bytes(range(65, 97)))
"""


def test_an_explorer_is_stored_and_published_as_a_picture(tmp_path):
    path = write(tmp_path, "00_explore", text("title", "# A"), code("look", EXPLORE))
    run = execute(path)
    assert run.error is None
    assert run.stderr == {}
    assert "widgets" not in run.notebook.metadata
    assert WIDGET in cell(run.notebook, "look").outputs[0].data
    write_site([run], tmp_path / "site")
    page = (tmp_path / "site" / "00_explore.html").read_text()
    assert page.count("<img") == 1
    assert re.search(r'alt="Head 0: .*: query 22 reads blocks 0, 1 and', page)
    assert "widget" not in page
    assert remote_loads(page) == []
    kept = cell(clean(run.notebook, tmp_path), "look").outputs[0]
    assert set(kept.data) == {"image/png", "text/plain"}


def test_a_lesson_with_an_explorer_keeps_the_rules(tmp_path):
    e = running_example()
    explorer = BlockExplorer(e.q, e.k, e.v, block_size=4, topk=3)
    notebook = good_lesson()
    data, metadata = explorer._repr_mimebundle_()
    shown = new_output("execute_result", data=data, metadata=metadata)
    cell(notebook, "draw").outputs.append(shown)
    assert problems_of(notebook, tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["07"], "no notebook is called '07'"), ([], "found none: check --folder")],
)
def test_a_name_that_fits_nothing_is_refused(arguments, said, tmp_path, capsys):
    if arguments:
        write(tmp_path, "00_tour", text("title", "# A"))
    assert main(["--folder", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_check_reports_and_runs_nothing(tmp_path, capsys):
    path = write(tmp_path, "00_tour", code("setup", "open('ran', 'w')"))
    before = path.read_bytes()
    assert main(["--folder", str(tmp_path), "--check"]) == 1
    assert "00_tour: execution counts are not 1 to 1" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert not (tmp_path / "ran").exists()

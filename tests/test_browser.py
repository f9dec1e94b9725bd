"""Every notebook in JupyterLab in a real browser, as a reader meets it."""

from pathlib import Path

import browser
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import sync_playwright

from moba_lab.notebooks.clean import METADATA
from moba_lab.notebooks.run import stored
from moba_lab.notebooks.site import title_and_goal, write_site

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
BROKEN = {
    "no-picture": 'from IPython.display import Image\nImage(b"none", format="png")',
    "still-film": (
        "from IPython.display import HTML\n"
        'HTML(\'<div class="animation"><img src="data:,"><input type=range></div>\')'
    ),
    "foreign": "HTML('<img src=\"http://moba.invalid/a.png\">')",
    "raises": "1 / 0",
    "never-run": "2",
}


@pytest.fixture(scope="module")
def chromium():
    executable = browser.find_chromium()
    if executable is None:
        pytest.skip(browser.missing_chromium())
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=browser.FLAGS)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Serve copies without outputs, so what is seen was made here."""
    folder = tmp_path_factory.mktemp("notebooks")
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / path.name)
    cells = [new_code_cell(source, id=name) for name, source in BROKEN.items()]
    broken = new_notebook(cells=cells, metadata=METADATA)
    nbformat.write(broken, folder / "broken.ipynb")
    with browser.lab_server(folder, tmp_path_factory.mktemp("state")) as address:
        yield address


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_jupyterlab(chromium, lab, path):
    with browser.watched_page(chromium) as (page, problems):
        found = browser.lab_problems(page, lab, path.name)
        assert found + problems == []


def test_broken_notebook_is_reported(chromium, lab):
    with browser.watched_page(chromium) as (page, problems):
        assert browser.lab_problems(page, lab, "broken.ipynb") == [
            "cell 'raises' raised ZeroDivisionError",
            "cell 'never-run' was not executed",
            "a picture has no width",
            "a film's slider does not change its picture",
        ]
        assert "request to http://moba.invalid/a.png" in problems


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    write_site([stored(path) for path in NOTEBOOKS], folder)
    return folder


def test_pages_load_nothing_from_elsewhere(chromium, site):
    for path in sorted(site.glob("*.html")):
        with browser.watched_page(chromium) as (page, problems):
            page.goto(path.as_uri())
            assert [*browser.picture_problems(page), *problems] == [], path.name


def test_index_leads_to_every_page(chromium, site):
    with browser.watched_page(chromium) as (page, problems):
        for path in NOTEBOOKS:
            page.goto((site / "index.html").as_uri())
            page.locator(f'a[href="{path.stem}.html"]').click()
            title, _ = title_and_goal(stored(path).notebook)
            assert page.title() == title
        assert problems == []


def test_watcher_sees_console_errors_and_exceptions(chromium, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<script>console.error('oh'); nothing();</script>")
    with browser.watched_page(chromium) as (page, problems):
        page.goto(broken.as_uri())
    assert problems == [
        "console error: oh",
        "exception: nothing is not defined",
    ]

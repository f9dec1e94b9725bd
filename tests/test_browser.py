"""Notebooks in JupyterLab in a real browser, as a reader meets them.

Every notebook is shown with what it stores; test_notebooks.py runs it and compares.
In JupyterLab `make test` runs those that have something of their own to show: a film,
the explorer, recorded figures, and a real model. `make test-slow` runs them all.
"""

from pathlib import Path

import browser
import explorer_page
import nbformat
import pytest
from explorer_page import ExplorerPage
from nbformat.v4 import new_code_cell, new_notebook, new_output
from playwright.sync_api import sync_playwright

from moba_lab.example import running_example
from moba_lab.explorer import BlockExplorer
from moba_lab.notebooks.clean import METADATA, clean
from moba_lab.notebooks.run import stored
from moba_lab.notebooks.site import title_and_goal, write_site

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
RUN_ALWAYS = {"00_tour", "05_pipeline", "10_needle", "12_real_models"}
RUN = [
    pytest.param(
        path, id=path.stem, marks=[] if path.stem in RUN_ALWAYS else [pytest.mark.slow]
    )
    for path in NOTEBOOKS
]
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
    """Serve copies with outputs and, so that what is seen was made here, without."""
    folder, state = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("lab")
    (folder / "stored").mkdir()
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        # Lab shows no film of a notebook that it does not trust.
        browser.trust(notebook, state)
        nbformat.write(notebook, folder / "stored" / path.name)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / path.name)
    for name, sources in (("broken", BROKEN), ("explorer", explorer_page.CELLS)):
        cells = [new_code_cell(source, id=cell) for cell, source in sources.items()]
        notebook = new_notebook(cells=cells, metadata=METADATA)
        nbformat.write(notebook, folder / f"{name}.ipynb")
    nbformat.write(stored_explorer(), folder / "stored.ipynb")
    with browser.lab_server(folder, state) as address:
        yield address


def explore():
    e = running_example()
    return BlockExplorer(e.q, e.k, e.v, block_size=4, topk=3, query=22)


def stored_explorer():
    """Return a notebook in the stored form that has shown an explorer."""
    data, metadata = explore()._repr_mimebundle_()
    shown = new_output("execute_result", data=data, metadata=metadata)
    cell = new_code_cell("explorer", id="look", outputs=[shown])
    return clean(new_notebook(cells=[cell]), "/")


def test_notebooks_show_in_jupyterlab_what_they_store(chromium, lab):
    with browser.watched_page(chromium) as (page, problems):
        page.goto(f"{lab}/lab?reset&token={browser.TOKEN}")
        for path in NOTEBOOKS:
            cells = browser.open_in_lab(page, f"stored/{path.name}")
            found = browser.notebook_problems(page, cells)
            assert [*found, *problems] == [], path.name
            assert len(cells) == len(stored(path).notebook.cells)
            # Films of one code have one name, whatever notebook they are in.
            page.evaluate(browser.CLEAR)
        page.evaluate(browser.SHUT_DOWN)


@pytest.mark.parametrize("path", RUN)
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


@pytest.fixture(scope="module")
def explorers(chromium, lab):
    """Open a notebook with two explorers, and run it."""
    with browser.watched_page(chromium) as (page, problems):
        page.set_viewport_size({"width": 1280, "height": 1000})
        cells = browser.run_in_lab(page, lab, "explorer.ipynb")
        assert browser.notebook_problems(page, cells) == []
        views = [ExplorerPage(page, number) for number in (0, 1)]
        views[1].settings()
        yield views, problems
        page.evaluate(browser.SHUT_DOWN)


@pytest.fixture
def small(explorers):
    (view, _), problems = explorers
    yield view
    assert problems == []


@pytest.fixture
def large(explorers):
    (_, view), problems = explorers
    yield view
    assert problems == []


def test_pointing_chooses_a_query(small):
    for query in (9, 30, 2):
        small.point(query)
        assert small.settings()["query"] == query
        explorer_page.check_small(small)


def test_keys_choose_a_query_and_leave_the_cells_to_lab(small):
    small.page.evaluate(browser.COMMAND_MODE)
    small.map.focus()
    active = small.page.evaluate(browser.ACTIVE_CELL)
    before = set()
    for key, query in [
        ("Home", 0),
        ("ArrowUp", 0),
        ("ArrowDown", 1),
        ("PageDown", 5),
        ("End", 31),
        ("PageDown", 31),
        ("ArrowUp", 30),
        ("PageUp", 26),
    ]:
        small.page.keyboard.press(key)
        assert small.settings()["query"] == query
        explorer_page.check_small(small)
        before.add(small.shown()["sentence"])
    assert len(before) == 6
    assert small.page.evaluate(browser.ACTIVE_CELL) == active


def test_sliders_recompute_in_python(small):
    small.point(22)
    active = small.page.evaluate(browser.ACTIVE_CELL)
    for name, key, setting, value in [
        ("topk", "ArrowRight", "topk", 4),
        ("head", "ArrowUp", "head", 1),
        ("block size", "ArrowLeft", "block_size", 3),
        ("topk", "Home", "topk", 1),
        ("topk", "End", "topk", 11),
        ("block size", "End", "block_size", 32),
        ("block size", "Home", "block_size", 1),
    ]:
        small.page.evaluate(browser.COMMAND_MODE)
        small.slider(name).focus()
        small.page.keyboard.press(key)
        assert small.settings()[setting] == value
        explorer_page.check_small(small)
    assert small.page.evaluate(browser.ACTIVE_CELL) == active
    assert small.settings() == {"query": 22, "topk": 11, "block_size": 1, "head": 1}
    small.page.evaluate(browser.RUN_ALL)
    small.page.wait_for_function("() => window.ran")
    assert small.settings() == {"query": 22, "topk": 3, "block_size": 4, "head": 0}


def test_python_and_the_page_follow_each_other(small):
    small.point(17)
    small.settings()
    code = "assert explorer.query == 17; explorer.query = 14; explorer.topk = 2"
    assert small.page.evaluate(browser.IN_KERNEL, code) == "ok"
    small.root.get_by_role("option", name="query 14").wait_for()
    assert small.settings() == {"query": 14, "topk": 2, "block_size": 4, "head": 0}
    explorer_page.check_small(small)
    assert small.page.evaluate(browser.IN_KERNEL, "explorer.topk = 3") == "ok"


def test_everything_has_a_name_and_a_visible_focus(small):
    small.point(22)
    small.settings()
    find = small.root.get_by_role
    assert find("option", name="query 22", selected=True).count() == 1
    assert find("row", name="0 (past, selected) 0 to 3 0.45 9.8%").count() == 1
    assert find("row", name="5 (current) 20 to 22 own 37.1%").count() == 1
    assert find("listitem").all_inner_texts() == [
        "future",
        "past, not selected",
        "past, selected",
        "current",
    ]
    small.map.focus()
    ground = small.root.evaluate("root => getComputedStyle(root).backgroundColor")
    names = []
    for _ in range(5):
        focused = small.page.evaluate(explorer_page.FOCUSED)
        names.append(focused["name"])
        assert focused["outlineStyle"] == "solid"
        assert focused["outlineWidth"] >= 2
        assert explorer_page.contrast(focused["outlineColor"], [ground]) >= 3
        small.page.keyboard.press("Tab")
    assert names == ["queries", "topk", "block size", "head", "blocks of the query"]


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_themes_keep_states_and_contrast(small, theme, tmp_path):
    change = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"
    small.page.evaluate(change, f"JupyterLab {theme}")
    light = str(theme == "Light").lower()
    small.page.locator(f"body[data-jp-theme-light={light}]").wait_for(state="attached")
    small.point(22)
    small.settings()
    small.root.screenshot(path=tmp_path / f"{theme}.png")
    found = explorer_page.contrasts(small)
    assert len(found) > 25
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}
    future, past, selected, current = (
        small.cell_colors(*cell, blocks=8)
        for cell in [(8, 6), (24, 1), (12, 1), (9, 2)]
    )
    assert {"#0072B2", "#FFFFFF"} <= selected
    assert "#E69F00" in current
    assert min(current) < "#60"
    assert "#D9D9D9" in past
    assert not {"#0072B2", "#E69F00", "#FFFFFF"} & past
    assert "#FFFFFF" in future


def test_a_long_text_is_drawn_where_it_is_looked_at(large):
    high = "root => root.querySelector('.cells').clientHeight"
    top = "root => root.querySelector('.map').scrollTop"
    assert large.root.evaluate(high) < 500
    large.map.focus()
    for key, query, block in [("Home", 0, 0), ("PageDown", 16, 1), ("End", 1023, 63)]:
        large.page.keyboard.press(key)
        assert large.settings()["query"] == query
        cursor, seen = (
            large.root.locator(".cursor").bounding_box(),
            large.map.bounding_box(),
        )
        assert seen["y"] < cursor["y"] < seen["y"] + seen["height"] - cursor["height"]
        assert "#E69F00" in large.cell_colors(query, block, blocks=64)
    assert large.root.evaluate(top) > 7000
    large.root.locator(".overview").click(position={"x": 20, "y": 230})
    assert 3000 < large.root.evaluate(top) < 5000
    assert large.settings()["query"] == 1023


def test_rows_that_scroll_below_a_resting_pointer_are_not_chosen(large):
    large.map.focus()
    large.page.keyboard.press("Home")
    large.point(20)
    assert large.settings()["query"] == 20
    for _ in range(5):
        large.page.keyboard.press("PageDown")
    large.root.evaluate(explorer_page.REST)
    assert large.settings()["query"] == 100


def test_a_stored_explorer_is_a_picture_in_lab(chromium, lab):
    with browser.watched_page(chromium) as (page, problems):
        page.goto(f"{lab}/lab/tree/stored.ipynb?reset&token={browser.TOKEN}")
        picture = page.locator(".jp-OutputArea-output img")
        picture.wait_for()
        assert picture.evaluate("image => image.naturalWidth") == 800
        assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_outside_lab_it_follows_the_scheme_of_the_reader(chromium, scheme, tmp_path):
    path = tmp_path / "explorer.html"
    path.write_text(explorer_page.without_kernel(explore()))
    with browser.watched_page(chromium) as (page, problems):
        page.emulate_media(color_scheme=scheme)
        page.goto(path.as_uri())
        view = ExplorerPage(page, 0)
        assert view.settings()["query"] == 22
        view.root.screenshot(path=tmp_path / f"{scheme}.png")
        found = explorer_page.contrasts(view)
        assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}
        ground = view.root.evaluate("root => getComputedStyle(root).backgroundColor")
        on_black = explorer_page.contrast("rgb(0, 0, 0)", [ground])
        assert on_black > 15 if scheme == "light" else on_black < 2
        assert problems == []


def test_it_says_that_it_waits_and_nothing_moves(chromium, tmp_path):
    path = tmp_path / "explorer.html"
    path.write_text(explorer_page.without_kernel(explore()))
    with browser.watched_page(chromium) as (page, problems):
        page.goto(path.as_uri())
        view = ExplorerPage(page, 0)
        view.map.press("ArrowUp")
        view.root.locator("[aria-busy=true]").wait_for()
        caption = (
            "root => getComputedStyle(root.querySelector('caption'), '::after').content"
        )
        assert view.root.evaluate(caption) == '" (waiting for Python)"'
        assert view.root.evaluate(explorer_page.MOVING) == []
        assert problems == []

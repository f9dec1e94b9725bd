"""The film is small and works offline; `show` reaches notebooks and terminals."""

import base64
import io
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import example, large, pack_by_hand
from PIL import Image

from moba_lab import viz
from moba_lab.viz import offline
from moba_lab.viz.show import bundle
from moba_lab.viz.style import COLOR

URL = re.compile(r"data:image/webp;base64,([^\")]*)")


@pytest.fixture(scope="module")
def made():
    return example()


@pytest.fixture(scope="module")
def film(made):
    return viz.film(made.selected, made.blocks)


def images(page):
    """Return the ground and the frames of a film as (height, width, 4)."""
    found = [base64.b64decode(data) for data in URL.findall(page)]
    pixels = [Image.open(io.BytesIO(data)).convert("RGBA") for data in found]
    ground, *frames = map(np.asarray, pixels)
    return ground, frames


def test_the_film_is_small_and_asks_no_other_server(film):
    assert len(film.data) <= 100_000
    assert "http" not in film.data
    assert "<link" not in film.data
    assert "fa-" not in film.data


def test_the_film_of_a_long_sequence_has_32_frames_and_is_small_too():
    long = large()
    film = viz.film(long.selected, long.blocks, head=3)
    assert len(images(film.data)[1]) == 32
    assert len(film.data) <= 100_000
    assert film.finding.startswith("Film of head 3: 32 queries")


def test_buttons_have_words_and_the_picture_has_a_description(film):
    buttons = re.findall(r"<button[^>]*>\s*([^<]*?)\s*</button>", film.data)
    assert buttons == list(offline.BUTTONS.values())
    assert f'<img alt="{film.finding}"' in film.data
    assert film.what_to_see.endswith(
        "at the end query 31 reads blocks 3, 6 and its own, 7."
    )


def test_frames_over_their_ground_uncover_one_row_more_each(film):
    ground, frames = images(film.data)
    assert len(frames) == 32
    assert (ground[..., 3] == 255).all()
    blue = [int(COLOR[viz.State.SELECTED][i : i + 2], 16) for i in (1, 3, 5)]
    shown = []
    for frame in frames:
        seen = np.where(frame[..., 3:] == 0, ground, frame)[..., :3]
        shown.append((seen == blue).all(axis=2).sum())
    assert shown[0] < shown[8] < shown[16] < shown[31]
    assert shown == sorted(shown)
    assert (frames[31][..., 3] == 0).mean() > 0.99


def test_the_same_film_is_made_twice(made):
    one, two = (viz.film(made.selected, made.blocks, 0, [5, 9]) for _ in range(2))
    assert one.data == two.data


def test_a_film_of_some_queries(made):
    film = viz.film(made.selected, made.blocks, queries=[5, 9, 22])
    assert len(images(film.data)[1]) == 3
    assert "query 22 reads blocks 0, 1 and its own, 5" in film.what_to_see


def test_films_and_stills_of_too_many_queries_are_refused(made):
    with pytest.raises(ValueError, match="1 to 32 queries, got 33"):
        viz.film(made.selected, made.blocks, queries=[0] * 33)
    with pytest.raises(ValueError, match="1 to 4 queries, got 5"):
        viz.film_stills(made.selected, made.blocks, queries=range(5))
    with pytest.raises(IndexError, match="head must be 0 to 1, got 2"):
        viz.film(made.selected, made.blocks, head=2)
    with pytest.raises(IndexError, match="query must be 0 to 31, got 32"):
        viz.film_stills(made.selected, made.blocks, queries=[32])


def test_stills_stop_at_four_queries_and_name_them(made):
    fig = viz.film_stills(made.selected, made.blocks)
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["query 7", "query 15", "query 23", "query 31"]
    covers = [ax.patches[-2] for ax in fig.axes]
    assert [c.get_y() + c.get_height() for c in covers] == [31.5] * 4
    assert [c.get_height() for c in covers] == [24, 16, 8, 0]


def pixels_of(image):
    """Return (count, colour) of every colour of an image."""
    return image.convert("RGB").getcolors(maxcolors=256)


def test_show_prints_finding_and_sentence_in_a_terminal(capsys):
    blocks, _ = pack_by_hand()
    fig = viz.block_ruler(blocks)
    viz.show(fig)
    assert capsys.readouterr().out == (
        "9 tokens in 2 sequences make 5 blocks of 2, 1 of them short.\n"
        "What to see: blocks end where their sequence ends, at 5; "
        "short tail blocks, dotted: 2 (1 token).\n"
    )


def test_show_displays_once_with_alt_text_in_a_notebook(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=1))
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: shown.append((a, k)))
    blocks, selected = pack_by_hand()
    fig = viz.selection_heatmap(selected, blocks)
    viz.show(fig)
    ((data,), options) = shown.pop()
    assert not shown
    assert options["raw"]
    assert data["text/plain"] == fig.alt
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    colours = {"#{:02X}{:02X}{:02X}".format(*p) for _, p in pixels_of(image)}
    assert colours >= {COLOR[state] for state in list(viz.State)[:4]}
    assert options["metadata"] == {
        "image/png": {"alt": fig.alt, "width": image.width, "height": image.height}
    }
    assert capsys.readouterr().out == f"What to see: {fig.what_to_see}\n"


def test_the_bundle_of_a_film_is_html_with_its_text(film):
    data, metadata = bundle(film)
    assert data == {"text/html": film.data, "text/plain": film.alt}
    assert metadata == {}


def test_show_refuses_what_viz_did_not_make():
    with pytest.raises(TypeError, match=r"made by moba_lab\.viz, got int"):
        viz.show(3)


def test_figures_do_without_ipython(monkeypatch, made):
    monkeypatch.setitem(sys.modules, "IPython", None)
    viz.show(viz.gate_map(made.scores, made.blocks))

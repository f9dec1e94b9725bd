"""The pipeline's pictures show every part where its step puts it."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from pictures import example, large, pack_by_hand
from PIL import Image

from moba_lab import viz
from moba_lab.viz.pipeline import draw_panels, read
from moba_lab.viz.pipeline_movie import caption, moments, stage
from moba_lab.viz.style import COLOR
from moba_ref import partition, route

URL = re.compile(r"data:image/webp;base64,([^\")]*)")


def steps(scene):
    """Return what the four steps made, in the order of `pipeline_film`."""
    return (
        scene.selected,
        scene.routing,
        scene.lse_current,
        scene.lse_past,
        scene.blocks,
    )


def by_hand():
    """Make the pack of `pack_by_hand` with weights 1 for own and 3 for past blocks."""
    blocks, selected = pack_by_hand()
    routing = route(selected, blocks)
    lse_past = np.full(len(routing.query), np.log(3))
    return selected, routing, np.zeros((9, 1)), lse_past, blocks


@pytest.fixture(scope="module")
def film():
    return viz.pipeline_film(*steps(example()))


def test_parts_of_a_pack_by_hand():
    _, *made = by_hand()
    parts = viz.pipeline_parts(*made)
    assert parts.block.tolist() == [0] * 4 + [1] * 3 + [2] + [3] * 4 + [4] * 2
    assert parts.query.tolist() == [0, 1, 2, 3, 2, 3, 4, 4, 5, 6, 7, 8, 7, 8]
    assert parts.place.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2, 3, 0, 1]
    own = [1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1]
    assert parts.own.astype(int).tolist() == own
    share = [1, 1, 3, 3, 1, 1, 3, 1, 4, 4, 3, 3, 1, 1]
    share[:2] = [4, 4]
    np.testing.assert_allclose(parts.share, np.array(share) / 4)
    left = [0, 0, 0, 0, 3, 3, 0, 3, 0, 0, 0, 0, 3, 3]
    np.testing.assert_allclose(parts.left, np.array(left) / 4, atol=1e-15)


@pytest.mark.parametrize("head", [0, 5])
def test_parts_are_the_choices_and_their_weights(head):
    scene = large()
    parts = viz.pipeline_parts(*steps(scene)[1:], head=head)
    cells = viz.states(scene.selected, scene.blocks)[:, head]
    weights = viz.block_weights(*steps(scene)[2:4], scene.routing, scene.blocks, head)
    seen = np.zeros(cells.shape)
    for query, block, own in zip(parts.query, parts.block, parts.own, strict=True):
        seen[query, block] += 1
        assert cells[query, block] == (viz.State.CURRENT if own else viz.State.SELECTED)
    np.testing.assert_array_equal(seen, cells >= viz.State.SELECTED)
    np.testing.assert_array_equal(parts.share, weights[parts.query, parts.block])


def test_the_panels_are_drawn_from_the_parts():
    selected, routing, *rest = by_hand()
    fig = viz.pipeline_stills(selected, routing, *rest, query=7)
    assign, arrange, attend, combine = fig.axes
    np.testing.assert_array_equal(
        assign.images[0].get_array(), viz.states(selected, rest[-1])[:, 0]
    )
    parts = viz.pipeline_parts(routing, *rest)
    for ax, filled in ((arrange, np.ones(14)), (attend, parts.share)):
        boxes = corners(ax, parts.own)
        np.testing.assert_allclose(boxes[:, 0], parts.block - 0.42)
        np.testing.assert_allclose(boxes[:, 1], parts.place - 0.42)
        np.testing.assert_allclose(boxes[:, 2], 0.84 * filled)
    bars = corners(combine, parts.own)
    np.testing.assert_allclose(bars[:, 0], parts.left)
    np.testing.assert_allclose(bars[:, 1], parts.query - 0.42)
    np.testing.assert_allclose(bars[:, 2], parts.share - 0.01)


def corners(ax, own):
    """Return (M, 3): left, top and width of the boxes of all parts, own ones first."""
    mine, listed = ax.collections[-2:]
    assert mine.get_hatch()
    assert not listed.get_hatch()
    boxes = np.zeros((len(own), 3))
    for collection, which in ((mine, own), (listed, ~own)):
        points = np.array([path.vertices[:4] for path in collection.get_paths()])
        low, high = points.min(axis=1), points.max(axis=1)
        boxes[which] = np.column_stack([low, high[:, 0] - low[:, 0]])
    return boxes


def test_one_query_is_framed_in_every_panel_and_told():
    fig = viz.pipeline_stills(*by_hand(), query=7)
    assert marks(fig.axes) == [
        [(-0.5, 6.5, 5, 1)],
        [(2.5, 1.5, 1, 1), (3.5, -0.5, 1, 1)],
        [(2.5, 1.5, 1, 1), (3.5, -0.5, 1, 1)],
        [(0, 6.5, 1, 1)],
    ]
    assert fig.finding.startswith("Head 0: 5 choices become 3 lists")
    assert fig.what_to_see == (
        "query 7 (black frames) chooses 1 past block, stands, own queries first, at "
        "place 2 of block 3 and place 0 of block 4, and its bar is 75% and 25%."
    )


def test_the_last_query_that_looks_back_farthest_is_followed_without_being_named():
    assert "query 8 (black frames)" in viz.pipeline_stills(*by_hand()).what_to_see


def test_frames_go_down_the_queries_and_along_the_blocks():
    frames = moments(32, 9)
    assert [step for step, _ in frames] == [1] * 8 + [2] * 8 + [3] * 8 + [4] * 8
    for step, size in ((1, 32), (2, 9), (3, 9), (4, 32)):
        shown = [n for s, group in frames for n in group if s == step]
        assert shown == list(range(size))
    assert len(moments(3, 2)) == 10


def test_a_frame_marks_what_a_step_takes_and_what_it_makes():
    cells, parts, grid = read(*by_hand(), head=0)
    fig = Figure(layout="constrained")
    axes = draw_panels(fig, cells, parts, grid)
    update = stage(fig, axes, parts, grid, [(1, [2, 3]), (3, [3]), (4, [7])])
    update(0)
    assert marks(axes) == [[(-0.5, 1.5, 5, 2)], [], [], []]
    update(1)
    assert marks(axes) == [[], [(2.5, -0.6, 1, 4.2)], [(2.5, -0.6, 1, 4.2)], []]
    update(2)
    assert marks(axes) == [[], [], [], [(0, 6.5, 1, 1)]]
    taken = axes[2].collections[-1].get_paths()
    assert [path.vertices[0].tolist() for path in taken] == [
        [2.58, 1.58],
        [3.58, -0.42],
    ]


def marks(axes):
    """Return the bounds of the visible black frames of every panel."""
    return [
        [
            tuple(round(float(n), 9) for n in patch.get_bbox().bounds)
            for patch in ax.patches
            if patch.get_linewidth() == 2 and patch.get_visible()
        ]
        for ax in axes
    ]


def test_captions_count_queries_and_parts():
    parts = viz.pipeline_parts(*by_hand()[1:])
    assert [
        caption(parts, *moment) for moment in ((1, [3]), (2, [0]), (3, [3, 4]))
    ] == [
        "1 assign: query 3, each for itself",
        "2 arrange: block 0, 2 queries inside and 2 that chose it",
        "3 attend: blocks 3 to 4, read causally by 4 queries inside and whole by 2",
    ]
    assert caption(parts, 4, [2, 3, 4]) == ("4 combine: queries 2 to 4, 6 parts merged")


def test_the_film_is_small_and_asks_no_other_server(film):
    assert len(film.data) <= 100_000
    assert "http" not in film.data
    assert 'aria-label="step"' in film.data
    assert film.what_to_see.startswith(
        "press play or drag the slider; block 0 has the longest list, 15 queries"
    )


def test_the_film_of_a_pack_is_small_too():
    assert len(viz.pipeline_film(*steps(example(packed=True))).data) <= 100_000


def test_every_frame_shows_more_of_the_four_panels(film):
    pixels = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
        for data in URL.findall(film.data)
    ]
    ground, *frames = pixels
    assert len(frames) == 32
    blue = [int(COLOR[viz.State.SELECTED][i : i + 2], 16) for i in (1, 3, 5)]
    shown = []
    for frame in frames:
        seen = np.where(frame[..., 3:] == 0, ground, frame)[..., :3]
        shown.append([(part == blue).all(-1).sum() for part in quarters(seen)])
    shown = np.array(shown)
    # The black frames hide a few pixels, so that a panel may lose some again.
    assert (np.diff(shown[::8], axis=0).sum(axis=1) > 0).all()
    for step in range(4):
        before, after = shown[8 * step - 1] if step else [0] * 4, shown[8 * step + 7]
        assert after[step] - before[step] > 500, f"panel {step} stays as it was"
        assert all(after[step + 1 :] == before[step + 1 :]), "a later panel appears"


def quarters(pixels):
    """Cut a frame into its four panels, without the legend below them."""
    return np.array_split(pixels[: int(0.8 * len(pixels))], 4, axis=1)


def test_a_routing_of_another_choice_is_refused():
    selected, routing, *rest = by_hand()
    other = selected.copy()
    other[8, 0, 0] = -1
    with pytest.raises(ValueError, match=r"head 0 chose its blocks \[2, 1, 0, 1, 0\]"):
        viz.pipeline_stills(other, routing, *rest)


@pytest.mark.parametrize("options", [{"head": 1}, {"query": 9}], ids=str)
def test_a_head_or_query_that_does_not_exist_is_refused(options):
    with pytest.raises(IndexError, match="must be 0 to"):
        viz.pipeline_stills(*by_hand(), **options)


def test_queries_of_a_decoding_step_are_drawn():
    blocks = partition([0, 6], block_size=2, cu_seqlens_q=[0, 2])
    selected = np.array([[[1, 2]], [[0, 2]]])
    routing = route(selected, blocks)
    parts = viz.pipeline_parts(routing, np.zeros((2, 1)), np.zeros(2), blocks)
    assert parts.query.tolist() == [1, 0, 0, 1]
    assert parts.block.tolist() == [0, 1, 2, 2]
    fig = viz.pipeline_stills(
        selected, routing, np.zeros((2, 1)), np.zeros(2), blocks, query=0
    )
    assert "place 0 of block 1 and place 0 of block 2" in fig.what_to_see


def test_gaps_of_changed_rows_stand_before_all_gaps():
    gap = np.array([0.0, 2e-5, 3e-3, 4e-2, 4e-2, 0.5])
    changed = np.array([1, 1, 1, 0, 0, 0])
    fig = viz.gap_histogram(gap, changed, 1e-4, "a bfloat16 gate")
    ax = fig.axes[0]
    everything, different = (
        [bar.get_height() for bar in bars] for bars in ax.containers
    )
    assert (sum(everything), sum(different)) == (6, 3)
    assert everything[0] == different[0] == 2
    assert max(everything) == 2
    assert ax.lines[0].get_xdata() == [1e-4, 1e-4]
    assert fig.finding == (
        "A bfloat16 gate chooses differently in 3 of 6 rows, "
        "in 1 of them at no near tie"
    )
    assert fig.what_to_see == (
        "the widest gap that a bfloat16 gate crossed is 3.0e-03, the margin is 1e-04; "
        "2 near ties of 6 rows stand to the left of the dashed line."
    )


def test_gaps_without_a_change_say_so():
    fig = viz.gap_histogram([1e-5, 0.1], [False, False], 1e-4)
    assert fig.finding == "The second gate chooses the same blocks in all rows"
    assert "1 near tie of 2 rows stands to the left" in fig.what_to_see


@pytest.mark.parametrize(
    ("gap", "changed", "words"),
    [
        ([0.1], [True, False], r"the same rows.*\(1,\) and \(2,\)"),
        ([], [], "at least one"),
        ([-0.1], [False], r"at least 0, got -0\.1"),
        ([np.nan], [False], "at least 0, got nan"),
    ],
)
def test_gaps_that_cannot_be_are_refused(gap, changed, words):
    with pytest.raises(ValueError, match=words):
        viz.gap_histogram(gap, changed, 1e-4)

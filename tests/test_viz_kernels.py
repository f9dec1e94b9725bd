"""Figures about the kernels show the programs, rows, rounds and times they get."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from pictures import (
    MEASURED,
    STREAM,
    example,
    pack_by_hand,
    programs_of,
    stages_measured,
)

from moba_lab import viz
from moba_lab.viz.style import COLOR, State

SCENE = example()
# By hand: head 0, query 22 reads blocks 0 and 1 past and 5 itself.
QUERY = 22


def numbers(ax):
    """Return {(query, block): what is written there}."""
    return {t.get_position()[::-1]: t.get_text() for t in ax.texts}


def test_the_map_writes_every_program_into_its_cells_and_nothing_else():
    maps = programs_of(SCENE)
    fig = viz.program_map(SCENE.selected, SCENE.blocks, maps, head=1)
    assert [ax.get_title() for ax in fig.axes] == list(maps)
    for ax, program in zip(fig.axes, maps.values(), strict=True):
        cells = np.argwhere(program[:, 1] >= 0).tolist()
        expected = {(q, n): str(program[q, 1, n]) for q, n in cells}
        assert numbers(ax) == expected
        np.testing.assert_array_equal(
            ax.images[0].get_array(), viz.states(SCENE.selected, SCENE.blocks)[:, 1]
        )


def test_the_map_marks_selected_cells_without_a_program():
    nothing = {"none": np.full((*SCENE.selected.shape[:2], 8), -1)}
    ax = viz.program_map(SCENE.selected, SCENE.blocks, nothing).axes[0]
    dots = {tuple(p) for line in ax.lines for p in line.get_xydata().astype(int)}
    states = viz.states(SCENE.selected, SCENE.blocks)[:, 0]
    row, column = np.nonzero(states == State.SELECTED)
    assert dots == set(zip(column.tolist(), row.tolist(), strict=True))


def test_the_map_says_how_programs_divide_the_work_and_whom_a_query_meets():
    fig = viz.program_map(SCENE.selected, SCENE.blocks, programs_of(SCENE), query=QUERY)
    assert fig.finding == (
        "Head 0: a program has some queries in choose_best and combine_tile, one key "
        "block in attend_resident"
    )
    assert fig.what_to_see == (
        "query 22 meets program 0 of choose_best, programs 0 and 1 of attend_resident "
        "and program 2 of combine_tile."
    )


def test_borders_lie_between_programs():
    blocks, selected = pack_by_hand()
    program = np.full((9, 1, 5), -1)
    program[2:4, 0, 0], program[4, 0, 1] = 6, 7
    ax = viz.program_map(selected, blocks, {"kernel": program}).axes[0]
    borders = [c for c in ax.collections if c.get_linewidth()[0] == 1.6]
    drawn = {tuple(map(tuple, s)) for c in borders for s in c.get_segments()}
    flat = {((-0.5, y), (0.5, y)) for y in (1.5, 3.5)}
    flat |= {((0.5, y), (1.5, y)) for y in (3.5, 4.5)}
    upright = {((x, y - 0.5), (x, y + 0.5)) for x in (-0.5, 0.5) for y in (2, 3)}
    upright |= {((x, 3.5), (x, 4.5)) for x in (0.5, 1.5)}
    assert drawn == flat | upright


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ({}, "1 to 3 kernels, got 32, 8 and 0"),
        ({"kernel": np.zeros((32, 1, 8))}, r"\(32, 2, 8\), got \(32, 1, 8\)"),
    ],
)
def test_maps_that_do_not_fit_are_refused(maps, words):
    with pytest.raises(ValueError, match=words):
        viz.program_map(SCENE.selected, SCENE.blocks, maps)


def boxes(ax, x, color):
    """Return the heights of the filled boxes of one column."""
    found = [p for p in ax.patches if hasattr(p, "get_x")]
    middle = [(p.get_x() + p.get_width() / 2, p) for p in found]
    chosen = [p for at, p in middle if abs(at - x) < 1e-6]
    chosen = [p for p in chosen if to_hex(p.get_facecolor()).upper() == color]
    return sorted(p.get_y() + p.get_height() / 2 for p in chosen)


@pytest.mark.parametrize(("entry", "tile"), [(1, 0), (8 + 4, 1)])
def test_the_tile_gathers_and_writes_the_pairs_of_its_list(entry, tile):
    rows, blue = 5, COLOR[State.SELECTED]
    fig = viz.tile_life(
        SCENE.lists, SCENE.selected, SCENE.blocks, entry, rows=rows, tile=tile
    )
    head, block = divmod(entry, 8)
    queries, slots = np.nonzero(SCENE.selected[:, head, :-1] == block)
    mine = slice(tile * rows, (tile + 1) * rows)
    queries, slots = queries[mine], slots[mine]
    assert len(queries) > 2
    ax = fig.axes[0]
    keys = boxes(ax, 0.0, COLOR[State.SELECTED])
    assert np.allclose(keys, np.arange(4) + 4 * block)
    assert np.allclose(boxes(ax, 1.6, blue), queries)
    for slot in (0, 1):
        assert np.allclose(boxes(ax, 5.2 + slot, blue), queries[slots == slot])
    gathers = [line for line in ax.lines if line.get_xdata()[0] < 3]
    assert [line.get_ydata()[0] for line in gathers] == queries.tolist()
    scatters = [line for line in ax.lines if line.get_xdata()[0] > 3]
    assert [line.get_ydata()[1] for line in scatters] == queries.tolist()
    assert fig.finding == (
        f"A tile gathers {len(queries)} queries, reads the 4 keys of block {block} "
        f"once for all of them, and writes {len(queries)} rows of its own"
    )
    empty = rows - len(queries)
    assert (f"{empty} of 5 rows" in fig.what_to_see) == (empty > 0)


def test_lists_and_tiles_that_do_not_exist_are_refused():
    where = SCENE.lists, SCENE.selected, SCENE.blocks
    with pytest.raises(IndexError, match="list must be 0 to 15, got 16"):
        viz.tile_life(*where, 16, rows=16)
    with pytest.raises(IndexError, match="tile of list 1 must be 0 to 0, got 1"):
        viz.tile_life(*where, 1, rows=16, tile=1)
    with pytest.raises(ValueError, match="topk of 2 or more, got 32 and 1"):
        viz.tile_life(where[0], where[1][..., -1:], where[2], 1, rows=16)


def marks(ax, marker):
    return [
        tuple(line.get_xydata()[0])
        for line in ax.lines
        if line.get_marker() == marker and len(line.get_xydata()) == 1
    ]


def test_the_stream_marks_what_comes_goes_and_is_not_better():
    fig = viz.topk_stream(*STREAM)
    ax = fig.axes[0]
    assert marks(ax, "o") == [(1, 0), (3, 1), (5, 3)]
    assert marks(ax, "x") == [(3, 3)]
    assert marks(ax, "D") == [(0, 2), (7, 4)]
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "tile 0, round 1",
        "tile 0, round 2",
        "tile 0, round 3",
        "tile 1, round 1",
        "tile 1, round 2",
        "kept",
    ]
    shown = np.ma.getmaskarray(ax.images[0].get_array())
    in_sight = [np.flatnonzero(~row).tolist() for row in shown]
    assert in_sight == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [1, 3, 4, 5, 6, 7],
        [1, 4, 5, 6, 7],
        [1, 5],
    ]
    assert [p for p in ax.patches if p.get_hatch()] == []
    assert fig.finding == (
        "5 looks at a maximum keep the best 2 of 8 scores that come in 2 tiles"
    )
    assert fig.what_to_see == (
        "block 5 of tile 1 replaces block 3, the worst of those kept, and blocks 1 and "
        "5 are left."
    )


def test_a_stream_hides_what_its_tile_took_and_gave_up_again():
    steps = [(0, 1, -1), (0, 0, 1), (0, 2, None)]
    ax = viz.topk_stream([2.0, 1.0, 0.0], steps, 3, 1).axes[0]
    hatched = [p.get_xy() for p in ax.patches if p.get_hatch()]
    assert hatched == [(0.5, 1.5)]
    shown = ~np.ma.getmaskarray(ax.images[0].get_array())
    assert np.flatnonzero(shown[2]).tolist() == [0, 2]


def test_a_stream_without_rounds_is_refused():
    with pytest.raises(ValueError, match="1 to 20 rounds over 1 to 32 blocks, got 0"):
        viz.topk_stream([1.0], [], 4, 1)


def test_points_lie_at_flop_per_byte_and_flop_per_second():
    fig = viz.roofline(MEASURED["large"])
    small, large = fig.axes
    assert small.get_xscale() == small.get_yscale() == "log"
    assert marks(small, "o") == [(50, 1e11 / 0.005)]
    assert marks(large, "o") == [(50, 1e11 / 0.002)]
    assert marks(large, "^") == [(1000, 2e12 / 0.01)]
    assert marks(small, "^") == []
    legend = [t.get_text() for t in fig.legends[0].get_texts()]
    assert legend == ["pool", "past", "backward"]
    assert fig.legends[0].get_title().get_text() == (
        "a GPU, driver 1.2, PyTorch 2.11, Triton 3.6, 2026-11-24"
    )


def test_the_roof_bends_where_both_ceilings_meet():
    ax = viz.roofline(MEASURED["plain"]).axes[0]
    roof = next(line for line in ax.lines if len(line.get_xdata()) == 3)
    x, y = roof.get_xdata(), roof.get_ydata()
    assert (x[1], y[1]) == (200, 4e14)
    assert y[0] == 2e12 * x[0]
    assert y[2] == 4e14
    written = [t.get_text() for t in ax.texts]
    assert written == ["matrix product: 400 TFLOP/s", "copy: 2.00 TB/s"]


def test_every_point_is_inside_however_slow():
    ax = viz.roofline([stages_measured(128, past=1000.0)]).axes[0]
    (x, y), (low, high) = marks(ax, "o")[0], ax.get_ylim()
    assert low < y < high
    assert ax.get_xlim()[0] < x < ax.get_xlim()[1]


def test_the_roofline_says_what_bounds_the_longest_stage():
    fig = viz.roofline(MEASURED["large"])
    assert fig.finding == (
        "With blocks of 128, past reaches 20% of what copying allows; with blocks of "
        "4,096, backward reaches 50% of what computing allows"
    )
    assert fig.what_to_see == (
        "of the stages that take 5% of the time or more, with blocks of 128 past is "
        "farthest below its ceiling, at 20%, and with blocks of 4,096 route is "
        "farthest below its ceiling, at 25%."
    )


def test_the_roofline_does_not_speak_of_stages_that_take_no_time():
    row = MEASURED["plain"][0] | {"gate_s": "0.0001", "gate_bytes": "2e6"}
    assert viz.roofline([row]).what_to_see == (
        "of the stages that take 5% of the time or more, with blocks of 128 route is "
        "farthest below its ceiling, at 25%."
    )


def test_times_stand_beside_what_the_ceilings_allow():
    fig = viz.stage_times(MEASURED["large"])
    ax = fig.axes[1]
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert names == ["pool", "route", "past", "backward"]
    took, least = ([bar.get_width() for bar in bars] for bars in ax.containers)
    assert np.allclose(took, [1, 2, 2, 10])
    assert np.allclose(least, [0.5, 0.5, 1, 5])
    assert [t.get_text() for t in ax.texts][-1] == "10 ms, 50%"
    assert fig.finding == (
        "Past takes most time, 62% with blocks of 128; backward takes most time, 67% "
        "with blocks of 4,096"
    )
    assert fig.what_to_see == (
        "at the ceilings, all stages together would take 25% with blocks of 128 and "
        "47% with blocks of 4,096 of what they took."
    )


def test_a_stage_that_takes_most_time_twice_is_named_once():
    rows = [stages_measured(size, past=0.01) for size in (128, 512)]
    assert viz.stage_times(rows).finding == (
        "Past takes most time, 77% with blocks of 128 and 77% with blocks of 512"
    )


@pytest.mark.parametrize("draw", [viz.roofline, viz.stage_times])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "one or two measurements, got 0"),
        ([{"status": "out of memory"}], "a measurement, got out of memory"),
        ([{"status": "ok"}], "with copy_bytes_per_s and matmul_flops_per_s"),
        (
            [{"copy_bytes_per_s": "1", "matmul_flops_per_s": "1"}],
            "measured stages with their flops or bytes, got none",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_refused(draw, rows, words):
    with pytest.raises(ValueError, match=words):
        draw(rows)

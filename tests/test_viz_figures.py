"""Every figure is readable, says what it shows, and shows what it was given."""

import re
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text
from pictures import (
    MEASURED,
    STREAM,
    example,
    large,
    measured,
    pack_by_hand,
    programs_of,
)

from moba_lab import viz
from moba_lab.viz import State
from moba_lab.viz.style import COLOR
from moba_ref import partition

SCENES = {"plain": example(), "packed": example(packed=True), "large": large()}
TEXT = bytes(range(32, 127)) * 6
QUERIES = {"plain": [2, 22], "packed": [12, 14, 20, 31], "large": [5, 100, 511]}
WORK = {
    "mask": (67_108_864, 8_192),
    "gather": (9_703_424, 9_703_424),
    "block by block": (11_796_480, 15_872),
}
SPEEDUPS = {
    "A forward": {"pairs": 11.4, "floor": 9, "paper": 6.5, "flash": 3, "triton": 8.5},
    "E forward": {"pairs": 13, "floor": 8, "triton": 0.8},
}
NAMES = [
    "block_ruler",
    "gate_map",
    "selection_heatmap",
    "query_strip",
    "token_mask",
    "load_histogram",
    "merge_weights",
    "error_map",
    "route_picture",
    "film_stills",
    "pipeline_stills",
    "gap_histogram",
    "work_bars",
    "scaling_curves",
    "memory_curves",
    "speedup_rows",
    "reading_profile",
    "text_blocks",
    "line_heatmap",
    "program_map",
    "tile_life",
    "topk_stream",
    "roofline",
    "stage_times",
]
# These draw a few dozen queries at most.
SMALL = ("route_picture", "program_map", "tile_life")


def draw(name, which="plain"):
    s = SCENES[which]
    tokens, few = len(s.selected), QUERIES[which]
    text = b"\n".join(re.findall(rb".{1,23}", TEXT))[:tokens]
    weights = viz.block_weights(s.lse_current, s.lse_past, s.routing, s.blocks)
    steps = (s.selected, s.routing, s.lse_current, s.lse_past, s.blocks)
    gap = np.abs(s.lse_current)
    error = np.abs(s.lse_current - s.lse_current.astype(np.float32))
    return {
        "block_ruler": lambda: viz.block_ruler(s.blocks),
        "gate_map": lambda: viz.gate_map(s.scores, s.blocks),
        "selection_heatmap": lambda: viz.selection_heatmap(s.selected, s.blocks),
        "query_strip": lambda: viz.query_strip(s.selected, s.scores, few, s.blocks),
        "token_mask": lambda: viz.token_mask(s.selected, s.blocks, head=1),
        "load_histogram": lambda: viz.load_histogram(s.routing, s.blocks),
        "merge_weights": lambda: viz.merge_weights(weights, few, s.blocks),
        "error_map": lambda: viz.error_map(error, "lse", tolerance=1e-6),
        "route_picture": lambda: viz.route_picture(s.routing, s.blocks),
        "film_stills": lambda: viz.film_stills(s.selected, s.blocks),
        "pipeline_stills": lambda: viz.pipeline_stills(*steps),
        "gap_histogram": lambda: viz.gap_histogram(gap, gap < 0.01, 1e-2),
        "work_bars": lambda: viz.work_bars(WORK, 9_703_424),
        "scaling_curves": lambda: viz.scaling_curves(*measured(which)),
        "memory_curves": lambda: viz.memory_curves(*measured(which, 1e9)),
        "speedup_rows": lambda: viz.speedup_rows(SPEEDUPS, measured(which)[1]),
        "reading_profile": lambda: viz.reading_profile([(np.arange(64) % 8 + 1, 8, 1)]),
        "text_blocks": lambda: viz.text_blocks(text, s.blocks, s.selected, few[-1:]),
        "line_heatmap": lambda: viz.line_heatmap(text, s.blocks, s.selected),
        "program_map": lambda: viz.program_map(s.selected, s.blocks, programs_of(s)),
        "tile_life": lambda: viz.tile_life(s.lists, s.selected, s.blocks, 1, rows=16),
        "topk_stream": lambda: viz.topk_stream(*STREAM),
        "roofline": lambda: viz.roofline(MEASURED[which]),
        "stage_times": lambda: viz.stage_times(MEASURED[which]),
    }[name]()


@pytest.fixture(scope="module")
def figures():
    made = {}

    def get(name, which):
        if (name, which) not in made:
            made[name, which] = draw(name, which)
        return made[name, which]

    return get


def all_figures(test):
    pairs = [
        (n, w) for n in NAMES for w in SCENES if (n in SMALL, w) != (True, "large")
    ]
    return pytest.mark.parametrize(("name", "which"), pairs)(test)


def texts(fig):
    found = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip()]
    hidden = [ax for ax in fig.findobj(plt.Axes) if not ax.get_visible()]
    inside = {t for ax in hidden for t in ax.findobj(Text)}
    return [t for t in found if t not in inside and not off_axis(t)]


def off_axis(text):
    """Tell whether a text is the label of a tick outside the limits, never drawn."""
    for axis in (a for ax in text.figure.axes for a in (ax.xaxis, ax.yaxis)):
        for tick in axis.get_major_ticks():
            if text in (tick.label1, tick.label2):
                low, high = sorted(axis.get_view_interval())
                return not low <= tick.get_loc() <= high
    return False


def data_axes(fig):
    return [
        ax for ax in fig.axes if ax.get_visible() and ax.get_label() != "<colorbar>"
    ]


@all_figures
def test_size_and_text_size(figures, name, which):
    fig = figures(name, which)
    width, height = fig.get_size_inches()
    assert width <= 8
    assert 1 < height <= 9
    assert fig.dpi == 100
    assert min(t.get_fontsize() for t in texts(fig)) >= 9


@all_figures
def test_texts_neither_overlap_nor_leave_the_figure(figures, name, which):
    fig = figures(name, which)
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in texts(fig)]
    edge = fig.bbox
    for text, box in boxes:
        assert min(box.x0, box.y0, edge.x1 - box.x1, edge.y1 - box.y1) >= -1, text
    for (one, a), (two, b) in combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert wide < 2 or high < 2, f"{one!r} lies on {two!r}"


@all_figures
def test_axes_are_labelled_and_queries_run_downwards(figures, name, which):
    axes = data_axes(figures(name, which))
    outer = [ax for ax in axes if ax.get_subplotspec().is_last_row()]
    assert all(ax.get_xlabel() for ax in outer)
    if name != "block_ruler":
        assert axes[0].get_ylabel()
    if "query" in axes[0].get_ylabel():
        bottom, top = axes[0].get_ylim()
        assert bottom > top


@all_figures
def test_figures_carry_their_words(figures, name, which):
    fig = figures(name, which)
    title = fig.get_suptitle()
    assert " ".join(title.split()) == " ".join(fig.finding.split())
    assert fig.what_to_see.endswith(".")
    assert "nan" not in fig.alt
    assert fig.alt.startswith(fig.finding)
    assert fig.alt.lower().endswith(fig.what_to_see.lower())


def test_the_selection_heatmap_shows_states_with_their_marks():
    s = SCENES["plain"]
    fig = viz.selection_heatmap(s.selected, s.blocks, query=22)
    expected = viz.states(s.selected, s.blocks)
    for head, ax in enumerate(fig.axes):
        cells = ax.images[0].get_array()
        np.testing.assert_array_equal(cells, expected[:, head])
        dots = {tuple(p) for line in ax.lines for p in line.get_xydata().astype(int)}
        row, column = np.nonzero(expected[:, head] == State.SELECTED)
        assert dots == set(zip(column.tolist(), row.tolist(), strict=True))
        hatched = [p for p in ax.patches if p.get_hatch()]
        assert sum(p.get_height() for p in hatched) == 32
    assert fig.what_to_see == (
        "row 22 (outlined), head 0: query 22 reads blocks 0, 1 and its own, 5."
    )
    assert fig.finding.startswith("A query reads at most 3 of 8 blocks: 58%")


def test_the_four_states_have_the_colours_of_the_project():
    assert [COLOR[state] for state in list(State)[:4]] == [
        "#FFFFFF",
        "#D9D9D9",
        "#0072B2",
        "#E69F00",
    ]
    legend = draw("selection_heatmap").legends[0]
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["future", "past, not selected", "past, selected", "current"]


def test_a_pack_and_a_leak_have_their_words_in_the_legend():
    blocks, selected = pack_by_hand()
    selected[2, 0, 0] = 2
    fig = viz.selection_heatmap(selected, blocks)
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert words[0] == "future or other sequence"
    assert words[-1] == "read against the rules"
    assert fig.finding.endswith("1 against the rules")


def test_a_block_that_is_read_against_the_rules_counts_as_read():
    rows = np.array([[-1, 0], [0, 1], [-1, 1], [-1, 1]])[:, None]
    fig = viz.selection_heatmap(rows, partition([0, 4], 2))
    assert fig.finding.startswith("A query reads at most 2 of 2 blocks")
    assert fig.finding.endswith("and 1 against the rules")


def test_without_a_query_the_one_that_looks_back_farthest_is_outlined():
    blocks, selected = pack_by_hand()
    assert (
        "query 8 reads block 3" in viz.selection_heatmap(selected, blocks).what_to_see
    )
    selected[4, 0, 0] = 0
    assert (
        "query 4 reads block 0" in viz.selection_heatmap(selected, blocks).what_to_see
    )
    fig = viz.selection_heatmap(selected[..., -1:], blocks)
    assert "query 8 reads only its own block, 4" in fig.what_to_see


def test_the_legend_of_a_narrow_figure_wraps():
    blocks, selected = pack_by_hand()
    selected[2, 0, 0] = 2
    fig = viz.selection_heatmap(selected, blocks, heads=0)
    assert fig.get_figwidth() == 6
    entries = [text.get_window_extent() for text in fig.legends[0].get_texts()]
    assert len(entries) == 5
    assert all(box.x0 >= 0 and box.x1 <= fig.bbox.x1 for box in entries)


def test_heads_choose_panels(figures):
    s = SCENES["large"]
    assert len(figures("selection_heatmap", "large").axes) == 8
    fig = viz.selection_heatmap(s.selected, s.blocks, heads=[6, 2])
    assert [ax.get_title() for ax in fig.axes] == ["head 6", "head 2"]
    assert len(viz.selection_heatmap(s.selected, s.blocks, heads=3).axes) == 1


def test_the_strip_writes_the_score_of_every_past_block():
    blocks, selected = pack_by_hand()
    scores = np.full((9, 1, 5), -np.inf)
    scores[4, 0, :3] = [-1.25, 2.5, np.inf]
    fig = viz.query_strip(selected, scores, [4], blocks)
    written = {t.get_position(): t.get_text() for t in fig.axes[0].texts}
    assert written == {(0, 0): "-1.2", (1, 0): "2.5", (2, 0): "own"}
    assert fig.finding == (
        "Head 0: query 4 takes the best 1 past block of 2: 2.5 gets in, -1.2 does not"
    )
    assert fig.what_to_see == "query 4 reads block 1 and its own, 2."
    scores[4, 0, 0] = 9
    fig = viz.query_strip(selected, scores, [4], blocks)
    assert "query 4 passes over a better score, 9.0, for 2.5" in fig.finding


def test_the_strip_says_when_one_of_several_blocks_was_not_among_the_best():
    blocks = partition([0, 8], block_size=2)
    selected = np.array([[[0, 1, 3]]] * 8)
    scores = np.tile([5.0, 1.0, 3.0, np.inf], (8, 1, 1))
    fig = viz.query_strip(selected, scores, 7, blocks)
    assert fig.finding.endswith("query 7 passes over a better score, 3.0, for 1.0")


def test_the_token_mask_has_the_borders_of_blocks_over_it():
    blocks, selected = pack_by_hand()
    fig = viz.token_mask(selected, blocks)
    np.testing.assert_array_equal(
        fig.axes[0].images[0].get_array(), viz.token_states(selected, blocks)[:, 0]
    )
    thick = [c for c in fig.axes[0].collections if c.get_linewidth()[0] == 1.4]
    borders = {tuple(p[:, 0]) for c in thick for p in c.get_segments()}
    assert borders == {(n - 0.5, n - 0.5) for n in (2, 4, 5, 7)}
    assert fig.finding == "Head 0: 23 of 25 causal token pairs are read (92%)"


def test_the_gate_map_writes_scores_and_leaves_the_future_white():
    s = SCENES["packed"]
    fig = viz.gate_map(s.scores, s.blocks, head=1)
    past = np.isfinite(s.scores[:, 1])
    own, scores = fig.axes[0].images
    np.testing.assert_array_equal(~scores.get_array().mask, past)
    np.testing.assert_array_equal(
        ~np.ma.getmaskarray(own.get_array()), np.isposinf(s.scores[:, 1])
    )
    assert len([t for t in fig.axes[0].texts if t.get_text()]) == past.sum()
    query, block = np.unravel_index(
        np.where(past, s.scores[:, 1], -np.inf).argmax(), past.shape
    )
    assert fig.finding.startswith(f"Head 1: query {query} scores block {block} highest")


def test_the_gate_map_says_how_far_back_the_best_blocks_are():
    s = SCENES["plain"]
    seen = [viz.gate_map(s.scores, s.blocks, head).what_to_see for head in (0, 1)]
    assert "the block 4 before their own scores best for 16 of the 16" in seen[0]
    assert "the block just before their own scores best for 28 of the 28" in seen[1]
    worse = s.scores.copy()
    worse[31, 0, 3] = -9
    assert "best for 15 of the 16" in viz.gate_map(worse, s.blocks).what_to_see


def test_the_ruler_names_offsets_blocks_and_tails():
    fig = viz.block_ruler(SCENES["packed"].blocks)
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "13", "16", "32"]
    bold = [t.get_text() for t in ax.texts if t.get_fontweight() == "bold"]
    assert bold == [str(n) for n in range(9)]
    assert "3 (1 token) and 4 (3 tokens)" in fig.what_to_see
    assert fig.finding.endswith("9 blocks of 4, 2 of them short")
    assert "sequence 2" in viz.block_ruler(SCENES["large"].blocks).what_to_see


def test_the_ruler_writes_token_texts_as_they_are():
    blocks, _ = pack_by_hand()
    fig = viz.block_ruler(blocks, tokens=list("a$b$<c>_^"))
    assert [t.get_text() for t in fig.axes[0].texts if t.get_text()][5:14] == list(
        "a$b$<c>_^"
    )
    with pytest.raises(ValueError, match="9 texts, got 2"):
        viz.block_ruler(blocks, tokens=["a", "b"])


def test_load_from_routing_equals_load_from_selected():
    s = SCENES["packed"]
    loads = viz.load(s.selected, s.blocks)
    np.testing.assert_array_equal(viz.load(s.routing, s.blocks), loads)
    fig = viz.load_histogram(s.routing, s.blocks)
    for head, ax in enumerate(fig.axes):
        chose = [bar.get_height() for bar in ax.containers[1]]
        np.testing.assert_array_equal(chose, loads[head])
    head, block = np.unravel_index(loads.argmax(), loads.shape)
    assert f"Head {head} sends {loads.max()} queries to block {block}" in fig.finding


def test_a_load_of_nothing_is_said():
    blocks, selected = pack_by_hand()
    fig = viz.load_histogram(selected[..., -1:], blocks)
    assert fig.finding == "No query reads a past block"


@pytest.mark.parametrize("head", [0, 1])
def test_block_weights_are_the_shares_of_the_softmax(head):
    from moba_lab.example import running_example
    from moba_ref import token_mask

    e, s = running_example(packed=True), SCENES["packed"]
    settings = {"block_size": e.block_size, "topk": e.topk}
    mask = token_mask(e.q, e.k, cu_seqlens=e.cu_seqlens, **settings)[:, head]
    share = np.where(mask, np.exp(e.q[:, head] @ e.k[:, head].T / np.sqrt(8)), 0)
    share /= share.sum(axis=1, keepdims=True)
    expected = np.add.reduceat(share, s.blocks.start, axis=1)
    got = viz.block_weights(s.lse_current, s.lse_past, s.routing, s.blocks, head)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_bars_of_the_merge_have_the_widths_of_the_weights():
    fig = viz.merge_weights([[0.25, 0.75], [1, 0]], parts=["current", "past $1"])
    bars = [(p.get_y(), p.get_x(), p.get_width()) for p in fig.axes[0].patches]
    assert bars == [(-0.35, 0, 0.25), (-0.35, 0.25, 0.75), (0.65, 0, 1)]
    names = [t.get_text() for t in fig.axes[0].texts]
    assert names == ["current", "past $1", "current"]
    assert fig.finding == "Query 0 takes 75% of its result from the other parts"


def test_names_of_parts_wrap_and_are_left_out_where_they_do_not_fit():
    fig = viz.merge_weights([[0.12, 0.86, 0.02]], parts=["keys 0 to 33", "b", "cc"])
    assert [t.get_text() for t in fig.axes[0].texts] == ["keys 0\nto 33", "b"]
    assert fig.finding == "Query 0 takes 86% of its result from b"
    plain = viz.merge_weights([[0.12, 0.88]])
    assert plain.finding == "Query 0 takes 88% of its result from part 1"


def test_the_sentence_about_merge_weights_tells_of_the_query_that_was_named():
    s = SCENES["plain"]
    shares = viz.block_weights(s.lse_current, s.lse_past, s.routing, s.blocks)
    past, first, own = (f"{share:.0%}" for share in shares[22, [1, 0, 5]])
    fig = viz.merge_weights(shares, [2, 22, 31], s.blocks, query=22)
    assert fig.finding.startswith("Query 22 takes 63%")
    assert fig.what_to_see.startswith(
        f"the bar of query 22 is {first} key block 0, {past} key block 1 and {own} "
        "current;"
    )
    assert viz.merge_weights(shares, [2, 22, 31], s.blocks).finding.startswith(
        "Query 31 takes"
    )
    with pytest.raises(IndexError, match=r"those drawn, \[2, 31\], got 22"):
        viz.merge_weights(shares, [2, 31], s.blocks, query=22)


def test_merge_weights_that_are_no_shares_are_refused():
    with pytest.raises(ValueError, match=r"row 1 adds up to 1\.5"):
        viz.merge_weights([[0.5, 0.5], [0.5, 1.0]])
    with pytest.raises(ValueError, match="row 0 adds up to nan"):
        viz.merge_weights([[np.nan, 0.5]])
    with pytest.raises(ValueError, match=r"\(queries, parts\), got \(2,\)"):
        viz.merge_weights([0.5, 0.5])
    with pytest.raises(ValueError, match="2 names, got 1"):
        viz.merge_weights([[0.5, 0.5]], parts=["a"])
    blocks, _ = pack_by_hand()
    with pytest.raises(ValueError, match=r"\(S, N\) = \(9, 5\), got \(1, 2\)"):
        viz.merge_weights([[0.5, 0.5]], blocks=blocks)


def test_the_error_map_finds_the_worst_pair_of_any_sign():
    error = np.full((6, 2, 3), 1e-8)
    error[4, 1, 2] = -3e-5
    fig = viz.error_map(error, "dq", tolerance=1e-5)
    assert fig.finding == (
        "dq differs by at most 3.0e-05, at query 4, head 1: "
        "more than the 1.0e-05 allowed"
    )
    drawn = fig.axes[0].images[0]
    assert drawn.get_array().max() == 3e-5
    assert type(drawn.norm).__name__ == "LogNorm"
    ring = fig.axes[0].lines[0].get_xydata().tolist()
    assert ring == [[1, 4]]
    # The root mean square of all 36 values, not of the 12 cells.
    assert fig.what_to_see.endswith("(root mean square of all values) is 5.0e-06.")


def test_the_error_map_of_equal_results_and_of_nan():
    assert viz.error_map(np.zeros((4, 2))).finding == "out is exactly equal"
    broken = np.zeros((4, 2))
    broken[3, 1] = np.nan
    fig = viz.error_map(broken)
    assert fig.finding == "out: NaN or infinity in 1 of 8 cells"
    assert "query 3, head 1" in fig.what_to_see


def test_work_bars_show_what_is_wanted_before_what_is_computed():
    fig = viz.work_bars({"mask": (100, 10), "blocks": (30, 5)}, 25)
    scores, keys = fig.axes
    widths = [[bar.get_width() for bar in bars] for bars in scores.containers]
    assert widths == [[100, 30], [25, 25]]
    assert [bar.get_hatch() is None for bars in scores.containers for bar in bars] == [
        False,
        False,
        True,
        True,
    ]
    assert [bar.get_width() for bar in keys.containers[0]] == [10, 5]
    assert keys.get_xscale() == "log"
    assert fig.finding == (
        "The mask computes 4.0 scores for one that is wanted, the mask fetches 2 times "
        "the keys of blocks"
    )
    assert fig.what_to_see == (
        "blocks, 1.2 scores are computed for one that is wanted, and a fetched key "
        "serves 6 scores."
    )


@pytest.mark.parametrize(
    ("work", "wanted", "words"),
    [
        ({"mask": (4, 1)}, 1, "at least two programs"),
        ({"mask": (4, 1), "blocks": (2, 0)}, 1, "two positive numbers"),
        (
            {"mask": (4, 1), "blocks": (2, 1)},
            3,
            "wanted is 3 and blocks computes 2",
        ),
    ],
)
def test_work_that_cannot_be_is_refused(work, wanted, words):
    with pytest.raises(ValueError, match=words):
        viz.work_bars(work, wanted)


def test_the_route_picture_puts_every_pair_into_its_list():
    s = SCENES["packed"]
    fig = viz.route_picture(s.routing, s.blocks, head=1, query=31)
    before, after = fig.axes
    cu, N = s.routing.cu_pairs, len(s.blocks.start)
    for n in range(N):
        queries = s.routing.query[cu[N + n] : cu[N + n + 1]]
        column = [t for t in after.texts if t.get_position()[0] == n]
        listed = sorted(column, key=lambda t: t.get_position()[1])
        assert [t.get_text() for t in listed] == [str(q) for q in queries]
        assert [t.get_position()[1] for t in listed] == list(range(len(queries)))
        rows = [t.get_position()[1] for t in before.texts if t.get_position()[0] == n]
        assert sorted(rows) == queries.tolist()
        places = np.flatnonzero(queries == 31)
        told = [f"place {p} of block {n} (pair {cu[N + n]} + {p})" for p in places]
        assert all(place in fig.what_to_see for place in told)
    assert fig.what_to_see.count("place") == (s.routing.query[cu[N] :] == 31).sum() > 1
    top = after.child_axes[0]
    assert [t.get_text() for t in top.get_xticklabels()] == [str(n) for n in cu[N:]]


def test_the_route_picture_points_to_another_one_for_many_queries():
    with pytest.raises(ValueError, match=r"64 queries .* got 512; load_histogram"):
        draw("route_picture", "large")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda s: viz.gate_map(s.scores, s.blocks, head=2),
            "head must be 0 to 1, got 2",
        ),
        (lambda s: viz.token_mask(s.selected, s.blocks, head=-1), "got -1"),
        (lambda s: viz.selection_heatmap(s.selected, s.blocks, [5]), "head .* got 5"),
        (
            lambda s: viz.selection_heatmap(s.selected, s.blocks, query=32),
            "query must be 0 to 31, got 32",
        ),
        (
            lambda s: viz.query_strip(s.selected, s.scores, [40], s.blocks),
            "query must be 0 to 31, got 40",
        ),
        (lambda s: viz.route_picture(s.routing, s.blocks, head=7), "got 7"),
    ],
)
def test_heads_and_queries_that_do_not_exist_are_refused(call, words):
    with pytest.raises(IndexError, match=words):
        call(SCENES["plain"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: viz.gate_map(s.scores[:, 0], s.blocks), r"\(32, H, 8\), got"),
        (lambda s: viz.gate_map(s.scores * np.nan, s.blocks), "NaN, expected none"),
        (lambda s: viz.query_strip(s.selected, s.scores, [], s.blocks), "got none"),
        (lambda s: viz.error_map(np.zeros(3)), r"\(S, H, D\), got \(3,\)"),
        (
            lambda s: viz.load(s.routing, SCENES["packed"].blocks),
            r"one list for every head and block \(N=9\), got 16",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(SCENES["plain"])


def test_ascii_equals_states():
    s = SCENES["packed"]
    head, *lines = viz.ascii(s.selected, s.blocks, head=1).splitlines()
    assert head == (
        "head 1; # past, selected; . past, not selected; o current; "
        "blank: future or other sequence"
    )
    meaning = {" ": 0, ".": 1, "#": 2, "o": 3}
    cells = [[meaning[c] for c in line.split("|")[1]] for line in lines]
    np.testing.assert_array_equal(cells, viz.states(s.selected, s.blocks)[:, 1])
    assert lines[14].endswith("reads only its own block, 4")


def test_drawing_leaves_no_trace_in_matplotlib():
    before = dict(mpl.rcParams)
    draw("selection_heatmap")
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []

"""Figures of measurements draw what they were given, and claim no more."""

import numpy as np
import pytest
from pictures import measured

from moba_lab import viz
from moba_lab.viz.curves import PROGRAMS

TOKENS = (1024, 2048, 4096)
SOURCE = "H100, driver 580.1, PyTorch 2.11.0, Triton 3.6.0, 2026-11-24"


def curve(*values, tokens=TOKENS):
    low, high = ([factor * v for v in values] for factor in (0.5, 2))
    return tokens, values, low, high


def panels(**changed):
    curves = {
        "dense": curve(1e-3, 4e-3, 16e-3),
        "flash": curve(9e-3, 9e-3, 20e-3),
        "triton": curve(2e-3, 3e-3, 4e-3),
    }
    return {"forward": {n: c for n, c in (curves | changed).items() if c}}


def drawn(ax, name):
    """Return the one line that has the looks of a program."""
    _, color, marker, _ = PROGRAMS[name]
    [line] = [x for x in ax.lines if (x.get_color(), x.get_marker()) == (color, marker)]
    return line


def test_every_program_has_its_own_colour_marker_and_line():
    _, colors, markers, _ = zip(*PROGRAMS.values(), strict=True)
    assert len(set(colors)) == len(set(markers)) == len(PROGRAMS)


def test_scaling_curves_are_the_given_ones_on_two_log_scales():
    fig = viz.scaling_curves(panels(), SOURCE)
    [ax] = fig.axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    for name, (tokens, middle, low, high) in panels()["forward"].items():
        expected = np.column_stack([tokens, middle])
        np.testing.assert_allclose(drawn(ax, name).get_xydata(), expected)
        color = drawn(ax, name).get_color()
        [bars] = [
            np.array(lines.get_segments())
            for lines in ax.collections
            if lines.get_linewidth()[0] == 3 and same(lines.get_color(), color)
        ]
        np.testing.assert_allclose(bars[:, :, 1], np.column_stack([low, high]))


def same(rgba, color):
    from matplotlib.colors import to_hex

    return to_hex(rgba[0]) == to_hex(color)


def test_scaling_curves_say_from_where_on_and_by_how_much():
    fig = viz.scaling_curves(panels(), SOURCE)
    assert fig.finding == (
        "Our pipeline is faster than dense attention from 2K tokens on (forward)"
    )
    assert fig.what_to_see == (
        "forward, 4K tokens: dense attention 16 ms, the paper's pipeline 20 ms "
        "(1.2 times slower), our pipeline 4 ms (4.0 times faster)."
    )
    [word] = [t.get_text() for t in fig.axes[0].texts]
    assert word == " from 2K "
    dotted = [c for c in fig.axes[0].collections if c.get_linestyle()[0][1]]
    assert [c.get_segments()[0][1].tolist() for c in dotted] == [[2048, 3e-3]]


def test_a_program_that_is_never_faster_is_said_to_be_so():
    slow = {"triton": curve(2, 2, 2)}
    fig = viz.scaling_curves(panels(**slow), SOURCE)
    assert fig.finding.endswith("dense attention at no length (forward)")
    assert not fig.axes[0].texts
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert words == ["dense attention", "the paper's pipeline", "our pipeline"]


def test_nothing_is_claimed_beyond_the_lengths_that_dense_has():
    far = curve(2e-3, 3e-3, 1e-3, tokens=(1024, 2048, 1 << 20))
    fig = viz.scaling_curves(panels(triton=far, flash=None), SOURCE)
    assert "forward, 2K tokens: dense attention 4 ms, our pipeline 3 ms" in (
        fig.what_to_see
    )


@pytest.mark.parametrize("draw", [viz.scaling_curves, viz.memory_curves])
def test_what_was_not_recorded_is_said(draw):
    fig = draw(panels() | {"forward+backward": {}}, SOURCE)
    assert [t.get_text() for t in fig.axes[1].texts] == ["not recorded"]
    assert "backward" not in fig.alt
    for nothing in ({"forward": {}}, panels(dense=None)):
        assert draw(nothing, SOURCE).finding == "No two programs to compare"


def test_both_panels_show_all_of_their_curves():
    fig = viz.scaling_curves(*measured("large"))
    for ax in fig.axes:
        low, high = ax.get_ylim()
        data = np.concatenate([line.get_ydata() for line in ax.lines])
        assert low <= data.min() <= data.max() <= high


@pytest.mark.parametrize(
    "draw",
    [
        lambda source: viz.scaling_curves(panels(), source),
        lambda source: viz.memory_curves(panels(), source),
        lambda source: viz.speedup_rows({"A": {"triton": 2}}, source),
    ],
)
def test_figures_say_on_what_was_measured(draw):
    title = draw(SOURCE).legends[0].get_title().get_text()
    assert " ".join(title.split()) == f"measured on {SOURCE}"


def test_memory_is_compared_at_the_longest_length():
    bytes_of = {
        "dense": curve(2**20, 2**21, 2**22),
        "flash": None,
        "triton": curve(2**20, 2**22, 2**24),
    }
    fig = viz.memory_curves(panels(**bytes_of), SOURCE)
    assert fig.finding == (
        "At 4K tokens (forward) our pipeline takes 4.0 times the memory of dense "
        "attention"
    )
    assert fig.what_to_see == (
        "forward, 4K tokens: dense attention 4 MiB, our pipeline 16 MiB (4.0 times "
        "more)."
    )


def test_memory_names_the_program_that_takes_most():
    fig = viz.memory_curves(panels(), SOURCE)
    assert fig.finding.startswith(
        "At 4K tokens (forward) the paper's pipeline takes 1.2 times"
    )


def test_words_at_the_crossover_stay_inside_the_panel():
    late = panels(triton=curve(2, 5e-3, 4e-3), flash=None)
    fig = viz.scaling_curves(late, SOURCE)
    [word] = fig.axes[0].texts
    inside = fig.axes[0].get_window_extent()
    assert word.get_text() == " from 4K "
    assert word.get_window_extent().x1 <= inside.x1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "at least one panel"),
        ({"x": {"mamba": curve(1, 2, 3)}}, "programs are dense, .* got 'mamba'"),
        ({"x": {"dense": curve(1, 2)}}, r"equally many, got \[3, 2, 2, 2\]"),
        ({"x": {"dense": curve(tokens=())}}, "equally many"),
        ({"x": {"dense": curve(1, 0, 3)}}, "numbers above 0"),
    ],
)
def test_curves_that_cannot_be_are_refused(wrong, words):
    for draw in (viz.scaling_curves, viz.memory_curves):
        with pytest.raises(ValueError, match=words):
            draw(wrong, SOURCE)


POINTS = {
    "A forward": {"pairs": 12, "floor": 10, "paper": 6.5, "flash": 3, "triton": 8},
    "E forward": {"pairs": 13, "floor": 8, "flash": 0.4, "triton": 0.5},
    "B forward": {"pairs": 13, "floor": 12},
}


def test_speedups_stand_in_the_rows_of_their_workloads():
    fig = viz.speedup_rows(POINTS, SOURCE)
    [ax] = fig.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == list(POINTS)
    seen = {(x, y) for line in ax.lines[1:] for x, y in line.get_xydata().tolist()}
    expected = {(v, y) for y, row in enumerate(POINTS.values()) for v in row.values()}
    assert seen == expected
    assert set(ax.lines[0].get_xdata()) == {1}
    ours = drawn_all(ax, "triton")
    assert ours == [(8, 0), (0.5, 1)]


def drawn_all(ax, name):
    _, color, marker, _ = PROGRAMS[name]
    lines = [x for x in ax.lines if (x.get_color(), x.get_marker()) == (color, marker)]
    return [tuple(line.get_xydata()[0].tolist()) for line in lines]


def test_speedups_are_told_with_losses_and_shares_of_the_prediction():
    fig = viz.speedup_rows(POINTS, SOURCE)
    assert fig.finding == (
        "Our pipeline is 0.5x to 8.0x as fast as dense attention, 6% to 80% of the "
        "prediction"
    )
    assert fig.what_to_see == (
        "left of the thick line dense attention is faster, and it is in E forward; the "
        "largest speed-up is 8.0x, in A forward."
    )
    only = viz.speedup_rows({"B forward": POINTS["B forward"]}, SOURCE)
    assert only.finding == "Nothing was measured yet"


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ({}, "at least one speed-up"),
        ({"A": {}}, "at least one speed-up"),
        ({"A": {"triton": 0}}, "A: expected speed-ups above 0 .* got 'triton': 0"),
        ({"A": {"ours": 2}}, "got 'ours': 2"),
    ],
)
def test_speedups_that_cannot_be_are_refused(points, words):
    with pytest.raises(ValueError, match=words):
        viz.speedup_rows(points, SOURCE)


def test_the_profile_fills_what_is_read_and_tells_both_shares():
    reads = np.minimum(np.arange(16) // 4, 1) * 4 + np.arange(16) % 4 + 1
    fig = viz.reading_profile([(reads, 4, 2)])
    [ax] = fig.axes
    full, read = (c.get_paths()[0].vertices for c in ax.collections)
    assert (full[:, 1].max(), read[:, 1].max()) == (16, 8)
    assert {tuple(point) for point in read.tolist()} >= {
        (i, float(n)) for i, n in enumerate(reads)
    }
    assert set(ax.lines[1].get_ydata()) == {8}
    assert fig.finding == "Saved by the formula: 50.00%; over a causal pass: 35.29%"
    assert "the first 50% of the queries on the left save nothing" in fig.what_to_see


@pytest.mark.parametrize("wrong", [[1, 3], [0, 1]])
def test_a_profile_that_breaks_causality_is_refused(wrong):
    with pytest.raises(ValueError, match="query i reads 1 to i \\+ 1 keys, but query"):
        viz.reading_profile([(wrong, 1, 1)])
    with pytest.raises(ValueError, match="at least one panel"):
        viz.reading_profile([])

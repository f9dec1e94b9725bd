"""Figures of training runs draw what they were given, and claim no more."""

from types import SimpleNamespace

import numpy as np
import pytest
from notebook_axes import unlabelled

from moba_lab import viz
from moba_lab.experiments import scaling
from moba_lab.experiments.hybrid import jump
from moba_lab.experiments.results import Row
from moba_lab.viz.training import LOOKS, finite

SOURCE = "H100, PyTorch 2.11.0, bf16, 2026-11-25"
CLAIM = "MoBA less full attention: no difference above 0.004 at 95 % (3 seeds)"
POSITIONS = {"full": np.linspace(2, 1, 64), "moba": np.linspace(2, 1.1, 64)}
MACHINE = {"device": "GPU", "torch": "2.11", "precision": "bf16", "date": "2026-11-26"}
GAPS = {"moba": [(0.01 * n, 0.01 * n - 0.02, 0.01 * n + 0.02) for n in range(16)]}


def line(ax, kind, points):
    """Return the one curve of so many points that has the looks of a kind."""
    _, color, marker, style = LOOKS[kind]
    [found] = [
        x
        for x in ax.lines
        if x.get_color() == color
        and len(x.get_xdata()) == points
        and (x.get_linestyle() == style or x.get_marker() == marker)
    ]
    return found


def figures():
    yield viz.position_losses(POSITIONS, GAPS, 1024, [CLAIM], SOURCE)
    yield viz.position_losses({"full": POSITIONS["full"]}, {}, 1024, [], SOURCE)
    yield hybrid()
    yield hybrid(switch=None)
    yield viz.granularity_curves(granularity(), [CLAIM, "and so on"], SOURCE)
    yield viz.granularity_curves({}, [], SOURCE)
    points, fits = laws()
    yield viz.scaling_laws(points, {}, fits, AXES, [CLAIM], SOURCE, 0.2)
    one = {key: of[:1] for key, of in points.items()}
    none = {key: [] for key in points}
    yield viz.scaling_laws(one, {}, {}, AXES, [], SOURCE, 0.2)
    yield viz.scaling_laws(none, one, {}, AXES, [], SOURCE, 0.2)
    yield conversion()


def hybrid(switch=90):
    curves = {
        "full": [[2.0] * 10],
        "moba": [[2.1] * 10],
        "hybrid": [[2.1] * 9 + [2.35], [2.1] * 9 + [2.25]],
    }
    gaps = GAPS | {"hybrid": [(0.0, -0.01, np.inf)] * 16}
    return viz.hybrid_curves(curves, 10, switch, POSITIONS, gaps, 1024, [CLAIM], SOURCE)


def granularity():
    paper = [(8, 2, 0.34, 0.03, 0.01, 0.05), (32, 8, 0.41, 0.01, -np.inf, np.inf)]
    work = [(8, 2, 0.34, 0.03, 0.01, 0.05), (32, 7, 0.36, 0.02, 0.0, 0.04)]
    return {"paper": paper, "work": work}


def conversion(**more):
    trailing = {"moba": ([0, 100], [1.5, 1.2]), "moba in full": ([0, 100], [1.1, 1.0])}
    trailing |= more
    parts = {"before": [1.2, 1.1], "switched": [1.2, 1.5], "moba": [1.1, 1.2]}
    return viz.conversion_curves(trailing, parts, 64, SOURCE)


AXES = {"flops": "FLOPs", "seconds": "seconds of training"}


class Law(SimpleNamespace):
    """A power law without a fit."""

    def __call__(self, x):
        return 3 * x**-0.05


def laws():
    x = np.geomspace(1e12, 1e16, 5)
    law = Law(factor=3.0, exponent=-0.05, exponent_interval=(-0.06, -0.04))
    points, fits = {}, {}
    for kind, more in (("full", 0.0), ("moba", 0.02)):
        for axis in AXES:
            loss = 3 * x**-0.05 + more
            points[kind, axis] = list(
                zip(x, loss, loss - 0.01, loss + 0.01, strict=True)
            )
            fits[kind, axis] = law
    return points, fits


@pytest.mark.parametrize("number", range(10))
def test_every_figure_names_its_axes_and_says_what_to_see(number):
    fig = list(figures())[number]
    fig.draw_without_rendering()
    assert list(unlabelled(fig)) == []
    assert fig.alt
    assert fig.what_to_see.endswith(".")


def test_positions_are_drawn_at_the_middle_of_their_part():
    fig = viz.position_losses(POSITIONS, GAPS, 1024, [CLAIM], SOURCE)
    top, bottom = fig.axes
    curve = line(top, "moba", 64)
    np.testing.assert_allclose(curve.get_xdata()[:2], [8, 24])
    np.testing.assert_allclose(curve.get_ydata(), POSITIONS["moba"])
    marks = line(bottom, "moba", 16)
    np.testing.assert_allclose(marks.get_ydata(), [gap[0] for gap in GAPS["moba"]])
    [bars] = [c.get_segments() for c in bottom.collections]
    np.testing.assert_allclose([bar[:, 1] for bar in bars][3], [0.01, 0.05])
    assert fig.finding == CLAIM


def test_a_gap_without_bounds_fills_the_axes():
    fig = viz.position_losses(
        POSITIONS, {"moba": [(0.1, -np.inf, np.inf)] * 16}, 1024, [], SOURCE
    )
    bottom = fig.axes[1]
    [bars] = [c.get_segments() for c in bottom.collections]
    np.testing.assert_allclose(bars[0][:, 1], bottom.get_ylim())
    assert finite(-np.inf, 3, (0, 2)) == (0, 2)


def test_hybrid_draws_the_switch():
    fig = hybrid()
    [ax] = [ax for ax in fig.axes if ax.get_xlabel() == "step"]
    [switch] = [x for x in ax.lines if len(x.get_xdata()) == 2 and x.get_ls() == ":"]
    assert list(switch.get_xdata()) == [90, 90]
    assert not [t for ax in hybrid(switch=None).axes for t in ax.texts]


def test_granularity_is_drawn_by_blocks_and_by_work():
    fig = viz.granularity_curves(granularity(), [CLAIM], SOURCE)
    left, right = fig.axes
    np.testing.assert_allclose(line(left, "quarter", 2).get_xdata(), [8, 32], rtol=0.05)
    np.testing.assert_allclose(line(right, "matched", 2).get_xdata(), [34, 36])
    words = [t.get_text() for t in right.texts]
    assert words == ["2/8", "8/32", "7/32"]
    # Every label leads to the end of its interval, or to the loss where there is none.
    assert [t.xy[1] for t in right.texts] == [0.05, 0.01, 0.0]


def test_laws_are_drawn_through_the_range_of_their_points():
    points, fits = laws()
    fig = viz.scaling_laws(points, {}, fits, AXES, [CLAIM], SOURCE, 0.2)
    ax = fig.axes[0]
    fitted = line(ax, "moba", 50)
    np.testing.assert_allclose(fitted.get_ydata(), 3 * fitted.get_xdata() ** -0.05)
    assert fitted.get_xdata()[[0, -1]] == pytest.approx([1e12, 1e16])
    assert "falls as 3 C^-0.0500, exponent from -0.0600 to -0.0400" in fig.what_to_see
    full = Law(factor=3.0, exponent=-0.07, exponent_interval=(-0.08, -0.061))
    both = fits | {("full", "flops"): full}
    fig = viz.scaling_laws(points, {}, both, AXES, [CLAIM], SOURCE, 0.2)
    assert "C^-0.070 in full, as C^-0.050 with MoBA" in fig.finding
    assert fig.finding.endswith("are apart")
    assert CLAIM in fig.what_to_see


def text_row(attention, parameters, losses, **more):
    row = {"attention": attention, "parameters": parameters, "seed": 0, "context": 64}
    row |= dict.fromkeys(scaling.AXES, 1e12 * parameters) | {"loss": np.mean(losses)}
    row |= {
        "train_loss": row["loss"],
        "losses_by_file": tuple(np.tile(losses, 16)),
        "file_windows": (1, 1),
    }
    return Row(MACHINE | row | more)


def test_models_that_know_their_text_by_heart_are_hollow_and_in_no_law():
    losses = {1e6: 2.0, 2e6: 1.8, 3e6: 1.6, 4e6: 1.4}
    rows = [
        text_row(kind, size, (loss + more, loss + 2 * more))
        for kind, more in (("full", 0.01), ("moba", 0.02))
        for size, loss in losses.items()
    ]
    # One kind alone makes a size doubtful for both.
    rows[3]["train_loss"] = 1.0
    fig = scaling.figure(rows)
    assert fig.finding.startswith("Loss falls as C^-0.")
    assert fig.finding.endswith("with MoBA; 95 % intervals overlap")
    assert "3M parameters, MoBA less full attention" in fig.what_to_see
    assert "4M parameters" in fig.what_to_see
    hollow = [x for x in fig.axes[0].lines if x.get_markerfacecolor() == "none"]
    assert [list(x.get_xdata()) for x in hollow] == [[4e18], [4e18]]
    assert line(fig.axes[0], "moba", 50).get_xdata()[-1] == pytest.approx(3e18)


def test_the_jump_at_the_switch_is_what_moba_alone_does_not_do():
    kinds = {
        "moba": [{"seed": s, "curve": (2.0, 1.9, 1.7)} for s in range(3)],
        "hybrid": [
            {"seed": s, "curve": (2.0, 1.9, 1.8 + 0.01 * s), "curve_every": 10}
            for s in range(3)
        ],
    }
    [said] = jump(kinds, 20)
    assert said == (
        "Jump of the training loss at the switch to full: +0.110, from +0.085 to "
        "+0.135 at 95 % (3 seeds)"
    )
    assert list(jump(kinds, 30)) == []


def test_granularity_shows_intervals_whole():
    left, _ = viz.granularity_curves(granularity(), [], SOURCE).axes
    low, high = left.get_ylim()
    assert low < 0
    assert high > 0.05


def test_a_conversion_is_told_by_the_control_or_by_the_same_weights():
    fig = conversion()
    assert fig.finding == (
        "The switch costs 0.40 nats at the end of a text; after 100 tokens with "
        "MoBA 0.20 are left, on the same weights"
    )
    control = {"full": ([0, 100], [1.1, 0.9]), "full by moba": ([0, 100], [1.5, 1.4])}
    assert conversion(**control).finding == (
        "Trained on in full, the switch costs 0.50 nats at the end of a text; after "
        "100 tokens with MoBA 0.30 are left"
    )
    right = fig.axes[1]
    assert [list(x.get_xdata()) for x in right.lines] == [[16, 48]] * 3
    with pytest.raises(ValueError, match="expected trailing losses of 'moba'"):
        viz.conversion_curves({}, {}, 64, SOURCE)

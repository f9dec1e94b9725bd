"""Picture the loss of settings that differ in the number of blocks."""

import numpy as np
from matplotlib.transforms import offset_copy

from moba_lab.viz.style import LINE, canvas, finish, name_axes, styled
from moba_lab.viz.training import LOOKS, explain, finite, plain

# The looks of the two ways of choosing topk.
NOTHING = "no run with blocks yet"
KINDS = {"paper": "quarter", "work": "matched"}
SHIFT = {"paper": 0.96, "work": 1.04}
LEADER = {"arrowstyle": "-", "color": LINE, "lw": 0.8, "shrinkA": 0, "shrinkB": 0}


def granularity_curves(curves, claims, source):
    """Draw loss against the number of blocks, and against the share of pairs read.

    Args:
        curves: dict from "paper" (topk a quarter of the blocks) and "work" (topk of
            equal work) to lists of (blocks, topk, work, loss, low, high), by blocks:
            losses less that of full attention in nats, work as a share of its pairs.
        claims: sentences about finest and coarsest blocks, the first is the title.
        source: hardware, versions and dates.

    Returns:
        Figure.
    """
    with styled():
        fig = canvas(4.0)
        left, right = fig.subplots(1, 2, sharey=True)
        limits = span(curves)
        if not curves:
            left.text(0.5, 0.6, NOTHING, transform=left.transAxes, ha="center")
        for name, points in curves.items():
            blocks, _, work, loss, low, high = zip(*points, strict=True)
            _, color, marker, line = LOOKS[KINDS[name]]
            ends = [finite(*pair, limits) for pair in zip(low, high, strict=True)]
            # Side by side, so that no interval hides another.
            beside = [count * SHIFT[name] for count in blocks]
            for ax, x in ((left, beside), (right, [100 * share for share in work])):
                ax.plot(x, loss, color=color, marker=marker, ls=line, ms=5)
                ax.vlines(x, *zip(*ends, strict=True), color=color, lw=3, alpha=0.4)
            label(right, points, name, curves)
        left.set_xscale("log", base=2)
        ticks = sorted({point[0] for points in curves.values() for point in points})
        left.set_xticks(ticks, ticks)
        left.minorticks_off()
        for ax in (left, right):
            ax.axhline(0, color=LINE, lw=1)
            ax.set_ylim(limits)
            plain(ax)
        name_axes(left, "blocks", "loss less full attention, nats per byte")
        name_axes(right, "pairs read, % of full attention", "")
        right.margins(x=0.15)
        explain(fig, [KINDS[name] for name in curves], source)
        return finish(fig, *findings(curves, claims))


def label(ax, points, name, curves):
    """Write topk / blocks over or under all intervals, above one curve, below another.

    What is in both curves is written once, above; neighbours stand at two heights, and
    a line leads from every label to its interval.
    """
    above = name == "paper"
    known = [point[:2] for point in curves.get("paper", ())]
    shown = [point for point in points if above or point[:2] not in known]
    shown.sort(key=lambda point: point[2])
    low, high = reach(curves)
    for number, (blocks, topk, work, loss, *ends) in enumerate(shown):
        away = 3 + 12 * (number % 2)
        end = ends[above]
        ax.annotate(
            f"{topk}/{blocks}",
            (100 * work, end if np.isfinite(end) else loss),
            xytext=(100 * work, high if above else low),
            textcoords=offset_copy(
                ax.transData, ax.figure, y=away if above else -away, units="points"
            ),
            ha="center",
            va="bottom" if above else "top",
            arrowprops=LEADER,
            # The nearer label hides the line to its neighbour.
            zorder=4 - number % 2,
            bbox={"fc": "white", "ec": "none", "pad": 0.5},
        )


def span(curves):
    """Return limits with room for words above and below all that is drawn."""
    low, high = reach(curves)
    room = 0.25 * (high - low) + 1e-4
    return low - room, high + room


def reach(curves):
    """Return the least and the largest of 0, all losses and the ends of intervals."""
    ends = [end for points in curves.values() for point in points for end in point[3:]]
    ends = [end for end in ends if np.isfinite(end)] + [0.0]
    return min(ends), max(ends)


def findings(curves, claims):
    """Return title and sentence."""
    parts = []
    for name, points in curves.items():
        first, last = points[0], points[-1]
        parts.append(
            f"{LOOKS[KINDS[name]][0]}: {first[3]:+.3f} with {first[0]} blocks and "
            f"{last[3]:+.3f} with {last[0]}, at {100 * first[2]:.0f} and "
            f"{100 * last[2]:.0f} % of the pairs"
        )
    title = claims[0] if claims else "Loss by number of blocks, nothing to compare"
    return title, f"{'; '.join([*claims[1:], *parts]) or NOTHING}."

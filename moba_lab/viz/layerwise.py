"""Picture the loss of fine-tuning against the number of last layers in full."""

import numpy as np

from moba_lab.viz.style import LINE, canvas, finish, name_axes, styled
from moba_lab.viz.training import finite, plain

COLOR = "#0072B2"
# A gap of so many times the median is drawn as an arrow, and losses that differ so much
# have a logarithmic scale.
FAR = 20


def layerwise_losses(losses, scores, before, gaps, claims, source):
    """Draw losses, and their gaps to full attention in all layers.

    Args:
        losses: dict from the number of last layers in full, ascending, to the mean
            losses of the seeds in nats.
        scores: dict likewise to the shares of exact answers.
        before: losses before fine-tuning, one for every seed.
        gaps: dict likewise to `Interval`, of the loss less that of the largest number.
        claims: sentences; the first one is the title.
        source: hardware, versions and dates.

    Returns:
        Figure.
    """
    with styled():
        fig = canvas(4.4)
        left, right = fig.subplots(1, 2)
        for count, of in losses.items():
            left.plot([count] * len(of), of, "o", color=COLOR, ms=4, alpha=0.5)
        means = [np.mean(of) for of in losses.values()]
        left.plot(list(losses), means, color=COLOR, marker="s", ms=5)
        left.set_xticks(list(losses))
        if losses and min(means) > 0 and max(means) > FAR * min(means):
            left.set_yscale("log")
        name_axes(left, "last layers with full attention", "loss in nats per byte")
        draw_gaps(right, gaps)
        most = max(losses, default=0)
        name_axes(
            right, "last layers with full attention", f"loss minus that of all {most}"
        )
        for ax in (left, right):
            plain(ax)
        fig.supxlabel(f"trained on {source}", fontsize=9)
        return finish(fig, *findings(losses, scores, before, claims))


def draw_gaps(ax, gaps):
    """Draw every gap as a mark with its 95 % interval.

    One that is far larger than most would leave nothing to see of them, so it becomes
    an arrow with its size.
    """
    usual = FAR * np.median([abs(gap.mean) for gap in gaps.values()] or [0.0])
    near = [gap for gap in gaps.values() if abs(gap.mean) <= usual]
    ends = [x for gap in near for x in (gap.low, gap.high) if np.isfinite(x)]
    ends += [0.0, *(gap.mean for gap in near)]
    room = 0.2 * (max(ends) - min(ends)) + 1e-4
    limits = min(ends) - room, max(ends) + room
    for count, gap in gaps.items():
        if gap not in near:
            point_at(ax, count, gap.mean, limits)
            continue
        ax.vlines(
            count, *finite(gap.low, gap.high, limits), color=COLOR, lw=3, alpha=0.4
        )
        ax.plot(count, gap.mean, "o", color=COLOR, ms=5)
    ax.axhline(0, color=LINE, lw=1)
    ax.set_ylim(limits)
    ax.set_xticks(list(gaps))
    if not gaps:
        ax.text(0.5, 0.6, "nothing to compare", transform=ax.transAxes, ha="center")


def point_at(ax, count, mean, limits):
    """Draw an arrow at the edge beyond which a gap lies, and write its size."""
    up = mean > 0
    ax.plot(count, limits[up], "^" if up else "v", color=COLOR, ms=8, clip_on=False)
    ax.annotate(
        f"{mean:+.3f}",
        (count, limits[up]),
        xytext=(9, -3 if up else 3),
        textcoords="offset points",
        va="top" if up else "bottom",
    )


def findings(losses, scores, before, claims):
    """Return title and sentence."""
    parts = [
        f"last {count} full {np.mean(of):.3f} "
        f"({100 * np.mean(scores[count]):.0f} % exact)"
        for count, of in losses.items()
    ]
    if before:
        parts.append(f"before fine-tuning {np.mean(before):.3f}")
    title = claims[0] if claims else "Loss by the number of last layers in full"
    return (
        title,
        f"{'; '.join([*claims[1:], *parts])}, in nats per byte of the answers.",
    )

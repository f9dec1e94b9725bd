"""Picture loss against the position in the context, and gaps to full attention."""

import numpy as np

from moba_lab.viz.style import LINE, canvas, finish, name_axes, styled
from moba_lab.viz.training import LOOKS, explain, finite, plain


def position_losses(curves, gaps, context, claims, source):
    """Draw loss against position, and below it gaps with their intervals.

    Args:
        curves: dict from kind, a key of `training.LOOKS`, to the mean losses in nats of
            equal parts of the context, in its order.
        gaps: dict from kind to (mean, low, high) of its loss less that of full
            attention, for equal parts of the context; may be empty.
        context: tokens.
        claims: sentences about the gaps at the end, the first one is the title.
        source: hardware, versions and dates.

    Returns:
        Figure.
    """
    with styled():
        fig = canvas(5.2)
        top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        draw_positions(top, bottom, curves, gaps, context)
        explain(fig, curves, source)
        return finish(fig, *findings(curves, claims))


def draw_positions(top, bottom, curves, gaps, context):
    """Draw the losses into one axes and the gaps into the one below it."""
    for kind, losses in curves.items():
        _, color, _, line = LOOKS[kind]
        at = (np.arange(len(losses)) + 0.5) * context / len(losses)
        top.plot(at, losses, color=color, ls=line, lw=1.5)
    name_axes(top, "", "loss, nats per byte")
    draw_gaps(bottom, gaps, context)
    name_axes(bottom, "position in the context, bytes", "less full attention")
    bottom.set_xlim(0, context)
    plain(top)
    plain(bottom)


def draw_gaps(ax, gaps, context):
    """Draw the gap of every part as a mark with its interval."""
    means = [part[0] for parts in gaps.values() for part in parts] or [0.0]
    ends = [x for parts in gaps.values() for part in parts for x in part[1:]]
    ends = [x for x in ends if np.isfinite(x)] + means
    room = 0.1 * (max(ends) - min(ends)) + 1e-4
    limits = min(*ends, 0.0) - room, max(*ends, 0.0) + room
    for index, (kind, parts) in enumerate(gaps.items()):
        _, color, marker, _ = LOOKS[kind]
        # Kinds stand side by side, so that no interval hides another.
        shift = 0.5 + 0.2 * (index - (len(gaps) - 1) / 2)
        at = (np.arange(len(parts)) + shift) * context / len(parts)
        spans = [finite(low, high, limits) for _, low, high in parts]
        ax.vlines(at, *zip(*spans, strict=True), color=color, lw=2.5, alpha=0.4)
        ax.plot(at, [part[0] for part in parts], marker, color=color, ms=4)
    ax.axhline(0, color=LINE, lw=1)
    ax.set_ylim(limits)
    if not gaps:
        ax.text(0.5, 0.6, "nothing to compare", transform=ax.transAxes, ha="center")


def findings(curves, claims):
    """Return title and sentence."""
    ends = ", ".join(
        f"{LOOKS[kind][0]} {losses[0]:.3f} at the start and {losses[-1]:.3f} at the end"
        for kind, losses in curves.items()
    )
    if not claims:
        return "Loss by position, with nothing to compare", f"{ends} (nats per byte)."
    return claims[0], f"{'; '.join([*claims[1:], ends])} (nats per byte)."

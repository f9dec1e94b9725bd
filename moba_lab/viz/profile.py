"""Picture how many keys every query of a sequence reads."""

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moba_lab.viz.layout import array
from moba_lab.viz.style import (
    COLOR,
    LINE,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)
from moba_lab.viz.words import length, listed


def reading_profile(panels):
    """Draw the keys that queries read over those that full causal attention reads.

    Args:
        panels: list of (reads, block_size, topk), reads (S,) the number of keys that
            each query of one sequence reads.

    Returns:
        Figure.

    Raises:
        ValueError: if there is no panel, or a query reads no key or later ones.
    """
    panels = [(array(reads).astype(int), B, topk) for reads, B, topk in panels]
    if not panels:
        raise ValueError("expected at least one panel, got none")
    for reads, _, _ in panels:
        wrong = np.flatnonzero((reads < 1) | (reads > np.arange(1, len(reads) + 1)))
        if len(wrong):
            raise ValueError(
                f"query i reads 1 to i + 1 keys, but query {wrong[0]} reads "
                f"{reads[wrong[0]]}"
            )
    with styled():
        fig = canvas(3.8)
        axes = fig.subplots(1, len(panels), squeeze=False)[0]
        for ax, (reads, B, topk) in zip(axes, panels, strict=True):
            draw_profile(ax, reads, B * topk)
            ax.set_title(f"{length(len(reads))} tokens, blocks of {B}, topk {topk}")
            name_axes(ax, "query position", "keys read")
        dashes = Line2D([], [], color="black", ls="--", lw=1.5)
        pairs = [
            (Patch(fc=COLOR[State.PAST], ec=LINE), "read by full attention only"),
            (Patch(fc=COLOR[State.SELECTED], ec=LINE), "read by MoBA"),
            (dashes, "topk blocks, what the formula counts"),
        ]
        legend(fig, (), extra=pairs)
        return finish(fig, *findings(panels))


def draw_profile(ax, reads, nominal):
    """Draw the triangle of full attention, what is read of it, and topk blocks."""
    position = np.arange(len(reads))
    ax.fill_between(position, position + 1, color=COLOR[State.PAST], lw=0)
    ax.fill_between(position, reads, color=COLOR[State.SELECTED], lw=0)
    ax.plot(position, position + 1, color=LINE, lw=1)
    ax.axhline(nominal, color="black", ls="--", lw=1.5)
    ticks = np.linspace(0, len(reads), 5).astype(int)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(ticks, ["0", *map(length, ticks[1:].tolist())])
    ax.set(xlim=(0, len(reads)), ylim=(0, None))
    ax.spines[["top", "right"]].set_visible(False)


def findings(panels):
    """Return title and sentence about what the formula says and what is true."""
    said = [1 - B * topk / len(reads) for reads, B, topk in panels]
    true = [1 - r.sum() / (len(r) * (len(r) + 1) / 2) for r, _, _ in panels]
    formula, whole = (listed(f"{share:.2%}" for share in x) for x in (said, true))
    reads, *_ = panels[0]
    early = (reads == np.arange(1, len(reads) + 1)).mean()
    return f"Saved by the formula: {formula}; over a causal pass: {whole}", (
        f"the formula speaks of the last query, where grey is highest; the first "
        f"{early:.0%} of the queries on the left save nothing."
    )

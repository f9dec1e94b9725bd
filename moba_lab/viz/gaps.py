"""Picture how close every choice was, and which ones a second computation changed."""

import numpy as np
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
from moba_lab.viz.words import count

BINS_PER_DECADE = 4
CHANGED_HATCH = "xxxx"


def gap_histogram(gap, changed, margin, name="the second gate"):
    """Draw the gaps at the cut of all rows, and of those that chose differently.

    Args:
        gap: (R,) how much better the last chosen block scores than the first one left
            out, as a share of the row's largest score; at least 0.
        changed: (R,) bool, True where the second computation chose other blocks.
        margin: gap up to which the agreement policy exempts a row.
        name: what the second computation was.

    Returns:
        Figure.

    Raises:
        ValueError: if shapes differ, there are no rows, or a gap is negative or NaN.
    """
    gap, changed = array(gap).ravel().astype(float), array(changed).ravel().astype(bool)
    if gap.shape != changed.shape or not len(gap):
        raise ValueError(
            f"gap and changed must hold the same rows, at least one, "
            f"got {gap.shape} and {changed.shape}"
        )
    if not (gap >= 0).all():
        raise ValueError(f"gaps are at least 0, got {gap[~(gap >= 0)][0]}")
    edges = bin_edges(gap, margin)
    # Exact ties have no place on a logarithmic scale; they stand at its left end.
    shown = gap.clip(edges[0])
    with styled():
        fig = canvas(3.6)
        ax = fig.subplots()
        for rows, color, hatch in (
            (shown, COLOR[State.PAST], None),
            (shown[changed], COLOR[State.SELECTED], CHANGED_HATCH),
        ):
            ax.hist(rows, edges, color=color, edgecolor=LINE, lw=0.8, hatch=hatch)
        ax.axvline(margin, color="black", ls="--", lw=1.5)
        ax.set(xscale="log", yscale="log", ylim=(0.7, None), xlim=edges[[0, -1]])
        name_axes(ax, "gap at the cut, share of the row's largest score", "rows (log)")
        ax.text(
            margin,
            1.01,
            "exempt up to here ",
            transform=ax.get_xaxis_transform(),
            ha="right",
        )
        pairs = [
            (Patch(fc=COLOR[State.PAST], ec=LINE), "all rows"),
            (
                Patch(fc=COLOR[State.SELECTED], ec=LINE, hatch=CHANGED_HATCH),
                f"chosen differently by {name}",
            ),
        ]
        legend(fig, (), extra=pairs)
        return finish(fig, *findings(gap, changed, margin, name))


def bin_edges(gap, margin):
    """Return edges, four per decade, that hold all gaps and the margin.

    Example:
        >>> bin_edges(np.array([0.5]), 0.1)
        array([0.1       , 0.17782794, 0.31622777, 0.56234133])
    """
    seen = np.append(gap[gap > 0], margin)
    low, high = np.log10([seen.min(), seen.max()]) * BINS_PER_DECADE
    return 10.0 ** (np.arange(np.floor(low), np.floor(high) + 2) / BINS_PER_DECADE)


def findings(gap, changed, margin, name):
    """Return title and sentence about the rows that changed."""
    inside = int((gap <= margin).sum())
    verb = "stands" if inside == 1 else "stand"
    near = f"{count(inside, 'near tie')} of {count(len(gap), 'row')} {verb}"
    if not changed.any():
        return (
            f"{name[0].upper()}{name[1:]} chooses the same blocks in all rows",
            f"no bar is hatched; {near} to the left of the dashed line.",
        )
    beyond = (changed & (gap > margin)).sum()
    return (
        f"{name[0].upper()}{name[1:]} chooses differently in {changed.sum():,} of "
        f"{count(len(gap), 'row')}, in {beyond:,} of them at no near tie",
        f"the widest gap that {name} crossed is {gap[changed].max():.1e}, the margin "
        f"is {margin:.0e}; {near} to the left of the dashed line.",
    )

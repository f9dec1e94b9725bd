"""Picture what several programs with the same result compute and fetch."""

import numpy as np
from matplotlib.patches import Patch

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

WASTE_HATCH = "xxxx"


def work_bars(work, wanted):
    """Draw how many scores and fetched keys several programs need for one result.

    Args:
        work: {name of a program: (scores computed, keys fetched)}, at least two.
        wanted: scores that the result needs.

    Returns:
        Figure.

    Raises:
        ValueError: if there are fewer than two programs, a number is less than 1, or a
            program computes fewer scores than are wanted.
    """
    names, numbers = list(work), np.array(list(work.values()), dtype=float)
    if len(names) < 2 or numbers.shape[1:] != (2,) or not (numbers >= 1).all():
        raise ValueError(
            f"work must hold two positive numbers for each of at least two programs, "
            f"got {work}"
        )
    scores, keys = numbers.T
    if not 1 <= wanted <= scores.min():
        raise ValueError(
            f"every program computes the wanted scores and perhaps more, but wanted is "
            f"{wanted:,} and {names[scores.argmin()]} computes {scores.min():,.0f}"
        )
    with styled():
        fig = canvas(1.6 + 0.45 * len(names))
        left, right = fig.subplots(1, 2, sharey=True)
        bars(left, scores, COLOR[State.PAST], WASTE_HATCH)
        bars(left, np.full(len(names), wanted), COLOR[State.SELECTED])
        bars(right, keys, COLOR[State.PAST])
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        right.tick_params(labelleft=False)
        for ax, values in ((left, scores), (right, keys)):
            write_values(ax, values)
            ax.spines[["top", "right"]].set_visible(False)
        name_axes(left, "scores computed", "program")
        name_axes(right, "keys fetched (log)", "")
        pairs = [
            (Patch(fc=COLOR[State.SELECTED], ec=LINE), "wanted scores"),
            (Patch(fc=COLOR[State.PAST], ec=LINE, hatch=WASTE_HATCH), "thrown away"),
        ]
        legend(fig, (), extra=pairs)
        return finish(fig, *findings(names, scores, keys, wanted))


def bars(ax, values, color, hatch=None):
    """Draw one bar for every program."""
    ax.barh(range(len(values)), values, 0.7, color=color, ec=LINE, hatch=hatch)


def write_values(ax, values):
    """Write every number behind its bar, on a log scale where keys are counted."""
    if ax.get_subplotspec().is_last_col():
        ax.set(xscale="log", xlim=(values.min() / 10, values.max() * 30))
    else:
        ax.set_xlim(0, 1.4 * values.max())
        ax.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
    for y, value in enumerate(values):
        ax.annotate(
            f"{value:,.0f}", (value, y), (4, 0), textcoords="offset points", va="center"
        )


def findings(names, scores, keys, wanted):
    """Return title and sentence about the most wasteful and the last program."""
    most, far = scores.argmax(), keys.argmax()
    title = (
        f"The {names[most]} computes {scores[most] / wanted:.1f} scores for one that "
        f"is wanted, the {names[far]} fetches {keys[far] / keys[-1]:,.0f} times the "
        f"keys of {names[-1]}"
    )
    return title, (
        f"{names[-1]}, {scores[-1] / wanted:.1f} scores are computed for one that is "
        f"wanted, and a fetched key serves {scores[-1] / keys[-1]:,.0f} scores."
    )

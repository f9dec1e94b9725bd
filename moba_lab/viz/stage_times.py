"""Picture how long every stage took, and how long the hardware would let it take."""

import numpy as np
from matplotlib.patches import Patch

from moba_lab.viz.stages import (
    STAGES,
    capitalized,
    longest,
    provenance,
    read_rows,
    shape,
    with_blocks,
)
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


def stage_times(rows):
    """Draw how long every stage took, and how long the ceilings would let it take.

    Args:
        rows: one or two recorded measurements; see `moba_lab.viz.stages.stages`.

    Returns:
        Figure.

    Raises:
        ValueError: if there are not one or two rows, or one cannot be read.
    """
    read = read_rows(rows)
    names = [n for n in STAGES if any(s.name == n for found in read for s in found)]
    with styled():
        fig = canvas(2.2 + 0.3 * len(names))
        axes = fig.subplots(1, len(rows), sharey=True, squeeze=False)[0]
        for ax, row, found in zip(axes, rows, read, strict=True):
            draw_times(ax, found, [names.index(stage.name) for stage in found])
            ax.set_title(shape(row))
            ax.set_yticks(range(len(names)), names)
            name_axes(ax, "milliseconds", "stage")
            ax.label_outer()
        axes[0].invert_yaxis()
        pairs = [
            (Patch(fc=COLOR[State.PAST], ec=LINE), "measured"),
            (Patch(fc=COLOR[State.SELECTED], ec="black"), "what the ceilings allow"),
        ]
        legend(fig, (), extra=pairs)
        fig.legends[0].set_title(provenance(rows[0]))
        return finish(fig, *findings(rows, read))


def draw_times(ax, found, at):
    """Draw two bars for every stage, with its time and its share of the ceiling."""
    took = np.array([stage.seconds for stage in found]) * 1e3
    least = np.array([stage.least for stage in found]) * 1e3
    ax.barh(at, took, 0.7, color=COLOR[State.PAST], ec=LINE)
    ax.barh(at, least, 0.35, color=COLOR[State.SELECTED], ec="black", lw=0.8)
    for x, y, stage in zip(took, at, found, strict=True):
        ax.annotate(
            f"{milliseconds(stage.seconds)}, {stage.share:.0%}",
            *((x, y), (4, 0)),
            textcoords="offset points",
            va="center",
        )
    ax.set_xlim(0, 1.7 * took.max())
    ax.spines[["top", "right"]].set_visible(False)


def milliseconds(seconds):
    """Write a time with three digits.

    Example:
        >>> milliseconds(0.0000123), milliseconds(2.1666)
        ('0.0123 ms', '2,167 ms')
    """
    number = seconds * 1e3
    return f"{number:,.0f} ms" if number >= 100 else f"{number:.3g} ms"


def findings(rows, read):
    """Return title and sentence about where the time goes."""
    told, shares = {}, []
    for row, found in zip(rows, read, strict=True):
        where, top = with_blocks(row), longest(found)
        total = sum(stage.seconds for stage in found)
        told.setdefault(top.name, []).append(f"{top.seconds / total:.0%} {where}")
        shares.append(f"{sum(s.least for s in found) / total:.0%} {where}")
    titles = [f"{name} takes most time, {' and '.join(s)}" for name, s in told.items()]
    return capitalized(titles), (
        f"at the ceilings, all stages together would take {' and '.join(shares)} of "
        f"what they took."
    )

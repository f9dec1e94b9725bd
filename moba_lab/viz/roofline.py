"""Picture which ceiling of the hardware every stage has, and how near it comes."""

import numpy as np
from matplotlib.lines import Line2D

from moba_lab.viz.stages import (
    capitalized,
    ceilings,
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

MARKERS = {
    "pool": "v",
    "gate": "s",
    "past": "o",
    "current": "P",
    "combine": "D",
    "backward": "^",
}
# Below this share of all time a stage is not worth a sentence.
SMALL = 0.05


def roofline(rows):
    """Draw the stages of measurements below two ceilings: bandwidth and computation.

    Args:
        rows: one or two recorded measurements; see `moba_lab.viz.stages.stages`.

    Returns:
        Figure. Stages that compute nothing have no place in it; `stage_times` has them.

    Raises:
        ValueError: if there are not one or two rows, or one cannot be read.
    """
    read = read_rows(rows)
    placed = [[s for s in found if s.flops and s.name in MARKERS] for found in read]
    everything = [stage for found in placed for stage in found]
    with styled():
        fig = canvas(4.6)
        axes = fig.subplots(1, len(rows), sharex=True, sharey=True, squeeze=False)[0]
        for ax, row, found in zip(axes, rows, placed, strict=True):
            draw_ceilings(ax, row, everything)
            for stage in found:
                at = stage.intensity, stage.flops / stage.seconds
                ax.plot(*at, MARKERS[stage.name], **look(stage.name))
            ax.set_title(shape(row))
            ax.spines[["top", "right"]].set_visible(False)
            name_axes(ax, "FLOP per byte", "FLOP per second")
            ax.label_outer()
        drawn = {stage.name for stage in everything}
        legend(fig, (), extra=[(handle(n), n) for n in MARKERS if n in drawn])
        fig.legends[0].set_title(provenance(rows[0]))
        return finish(fig, *findings(rows, read))


def look(name):
    """Return size and colours of a stage's mark: forward blue, backward white."""
    fill = "white" if name == "backward" else COLOR[State.SELECTED]
    return {"ms": 9, "mfc": fill, "mec": "black", "ls": ""}


def handle(name):
    """Return the legend entry of a stage."""
    return Line2D([], [], marker=MARKERS[name], **look(name))


def draw_ceilings(ax, row, placed):
    """Draw what copying and multiplying at full speed reach, with room for stages."""
    copy, matmul = ceilings(row)
    ridge = matmul / copy
    far = [stage.intensity for stage in placed]
    x = np.array([min([ridge / 3000, *far]) / 2, ridge, max([ridge * 30, *far]) * 2])
    ax.plot(x, np.minimum(copy * x, matmul), color=LINE, lw=1.5, zorder=1)
    ax.axvline(ridge, color=LINE, lw=0.8, ls=":", zorder=0.5)
    ax.set(xscale="log", yscale="log", xlim=(x[0], x[-1]))
    slowest = min([matmul / 1500, *(stage.flops / stage.seconds for stage in placed)])
    ax.set_ylim(slowest / 2, matmul * 4)
    note = {"textcoords": "offset points", "ha": "right"}
    text = f"matrix product: {matmul / 1e12:,.0f} TFLOP/s"
    ax.annotate(text, (x[-1], matmul), (-4, 4), **note)
    text = f"copy: {copy / 1e12:.2f} TB/s"
    ax.annotate(text, (ridge / 60, matmul / 60), (-4, 6), **note)


def findings(rows, read):
    """Return title and sentence: what the longest stage reaches, and the slowest."""
    told, slow = [], []
    for row, found in zip(rows, read, strict=True):
        where, top = with_blocks(row), longest(found)
        told.append(
            f"{where}, {top.name} reaches {top.share:.0%} of what {top.bound} allows"
        )
        total = sum(stage.seconds for stage in found)
        large = [stage for stage in found if stage.seconds >= SMALL * total]
        far = min(large, key=lambda stage: stage.share)
        slow.append(
            f"{where} {far.name} is farthest below its ceiling, at {far.share:.0%}"
        )
    see = ", and ".join(slow)
    return capitalized(told), (
        f"of the stages that take {SMALL:.0%} of the time or more, {see}."
    )

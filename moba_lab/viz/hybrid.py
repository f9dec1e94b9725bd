"""Picture training that switches from MoBA to full attention near its end."""

import numpy as np

from moba_lab.viz.positions import draw_positions, findings
from moba_lab.viz.style import LINE, canvas, finish, name_axes, styled
from moba_lab.viz.training import LOOKS, explain, plain


def hybrid_curves(
    curves, every, switch, positions, gaps, context, claims, source, shown=0.3
):
    """Draw training loss around the switch, and losses by position at the end.

    Args:
        curves: dict from kind, a key of `training.LOOKS`, to the training losses of
            every seed, each a list of means over `every` steps, in nats.
        every: steps of a mean.
        switch: step from which on attention is full; None if no such run is there.
        positions: as `curves` of `positions.position_losses`.
        gaps: as there.
        context: as there.
        claims: sentences about the switch and the gaps, the first is the title.
        source: hardware, versions and dates.
        shown: share of the steps that the left panel shows, up to the last.

    Returns:
        Figure.
    """
    with styled():
        fig = canvas(4.6)
        axes = fig.subplot_mosaic([["loss", "top"], ["loss", "bottom"]])
        for kind, seeds in curves.items():
            draw_seeds(axes["loss"], kind, seeds, every, shown)
        if switch:
            axes["loss"].axvline(switch, color=LINE, ls=":", lw=1.5)
            axes["loss"].text(
                switch,
                0.98,
                "switch to full ",
                color=LINE,
                ha="right",
                va="top",
                transform=axes["loss"].get_xaxis_transform(),
            )
        name_axes(axes["loss"], "step", "training loss, nats per byte")
        plain(axes["loss"])
        draw_positions(axes["top"], axes["bottom"], positions, gaps, context)
        axes["top"].sharex(axes["bottom"])
        axes["top"].tick_params(labelbottom=False)
        explain(fig, curves, source)
        return finish(fig, *findings(positions, claims))


def draw_seeds(ax, kind, seeds, every, shown):
    """Draw every seed thin, from the step that is the first one shown."""
    _, color, _, line = LOOKS[kind]
    for losses in seeds:
        steps = (np.arange(len(losses)) + 0.5) * every
        last = steps >= (1 - shown) * every * len(losses)
        ax.plot(steps[last], np.array(losses)[last], color=color, ls=line, lw=1)

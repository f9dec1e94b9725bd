"""Picture loss against compute, with power laws and their intervals."""

import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator

from moba_lab.viz.style import canvas, finish, name_axes, styled
from moba_lab.viz.training import LOOKS, explain, plain


def scaling_laws(points, laws, axes, claims, source):
    """Draw one panel for every measure of compute, both scales logarithmic.

    Args:
        points: dict from (kind, axis) to a list of (x, loss, lowest, highest) of
            models, kinds being keys of `training.LOOKS`, losses in nats.
        laws: dict from (kind, axis) to an object that gives the fitted loss at x, and
            has `exponent` and `exponent_interval`; may be empty.
        axes: dict from axis to its name.
        claims: sentences about single models; the last one, of the largest, is the
            title.
        source: hardware, versions and dates.

    Returns:
        Figure.
    """
    kinds = [kind for kind in LOOKS if any(points.get((kind, x)) for x in axes)]
    with styled():
        fig = canvas(4.2)
        row = fig.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for ax, (axis, name) in zip(row, axes.items(), strict=True):
            for kind in kinds:
                draw_kind(ax, kind, points[kind, axis], laws.get((kind, axis)))
            ax.set_xscale("log")
            ax.set_yscale("log")
            name_axes(ax, name, "held-out loss, nats per byte" if ax is row[0] else "")
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_locator(Steps())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))
            plain(ax)
        explain(fig, kinds, source)
        return finish(fig, *findings(laws, axes, claims))


class Steps(NullLocator):
    """Place ticks on a short logarithmic scale at round losses."""

    def __call__(self):
        """Return the ticks between the axis's limits."""
        low, high = self.axis.get_view_interval()
        for step in (0.05, 0.1, 0.2, 0.5, 1.0):
            ticks = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
            if len(ticks) <= 8:
                return ticks
        return ticks


def draw_kind(ax, kind, points, law):
    """Draw the models of a kind, the spread of their seeds, and the fit."""
    _, color, marker, line = LOOKS[kind]
    x, loss, low, high = map(np.array, zip(*points, strict=True))
    ax.plot(x, loss, marker, color=color, ms=6)
    ax.vlines(x, low, high, color=color, lw=3, alpha=0.4)
    if law:
        at = np.geomspace(x.min(), x.max(), 50)
        ax.plot(at, law(at), color=color, ls=line, lw=1.5)


def findings(laws, axes, claims):
    """Return title and sentence."""
    fits = []
    for (kind, axis), law in laws.items():
        if axis == next(iter(axes)):
            low, high = law.exponent_interval
            fits.append(
                f"{LOOKS[kind][0]} falls as {law.factor:.3g} C^{law.exponent:.4f}, "
                f"exponent from {low:.4f} to {high:.4f} at 95 %"
            )
    title = claims[-1] if claims else "Loss against compute, nothing to compare"
    return title, f"{'; '.join([*fits, *claims[:-1]]) or 'no fit yet'}."

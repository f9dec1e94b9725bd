"""Picture loss against compute, with power laws and their intervals."""

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moba_lab.viz.style import LINE, canvas, finish, name_axes, styled
from moba_lab.viz.training import LOOKS, explain, plain


def scaling_laws(points, apart, laws, axes, claims, source, by_heart):
    """Draw one panel for every measure of compute, both scales logarithmic.

    Args:
        points: dict from (kind, axis) to a list of (x, loss, lowest, highest) of
            models, kinds being keys of `training.LOOKS`, losses in nats.
        apart: likewise of models that no law is fitted to, drawn hollow.
        laws: dict from (kind, axis) to an object that gives the fitted loss at x, and
            has `exponent` and `exponent_interval`; may be empty.
        axes: dict from axis to its name.
        claims: sentences about single models; the first one is the title where not
            both kinds have a law.
        source: hardware, versions and dates.
        by_heart: share by which the held-out loss of the models apart at least lies
            above that of training.

    Returns:
        Figure.
    """
    both = {key: [*points[key], *apart.get(key, ())] for key in points}
    kinds = [kind for kind in LOOKS if any(both.get((kind, x)) for x in axes)]
    with styled():
        fig = canvas(4.2)
        row = fig.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for ax, (axis, name) in zip(row, axes.items(), strict=True):
            for kind in kinds:
                draw_kind(ax, kind, points[kind, axis], laws.get((kind, axis)))
                draw_points(ax, kind, apart.get((kind, axis)), fill="none")
            ax.set_xscale("log")
            ax.set_yscale("log")
            name_axes(ax, name, "held-out loss, nats per byte" if ax is row[0] else "")
            plain(ax)
        # The panels share their scale of losses, which every panel has set by now.
        for axis in (row[0].yaxis, *(ax.xaxis for ax in row)):
            axis.set_minor_locator(NullLocator())
            axis.set_major_locator(FixedLocator(ticks(*axis.get_view_interval())))
            axis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        hollow = Line2D([], [], color=LINE, marker="o", ls="", mfc="none")
        more = f"more than {100 * by_heart:.0f} % above training"
        words = f"knows its text by heart: held-out loss {more}"
        explain(fig, kinds, source, [(hollow, words)] if any(apart.values()) else [])
        return finish(fig, *findings(laws, axes, claims))


def ticks(low, high, few=3, most=6):
    """Return round numbers within limits for a logarithmic scale.

    Where a single point makes the limits, it is the only one.

    >>> [round(tick, 2) for tick in ticks(2.32, 3.1)]
    [2.4, 2.6, 2.8, 3.0]
    >>> ticks(15, 110), ticks(0.5, 300)
    ([20.0, 50.0, 100.0], [1.0, 10.0, 100.0])
    """
    if high < 1.001 * low:
        return [float(low)]
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    unit = 10.0 ** np.floor(np.log10(high - low))
    ways = [powers[:: max(1, len(powers) // most)]]
    ways += [np.outer(powers, factors).ravel() for factors in ((1, 3), (1, 2, 5))]
    steps = unit * np.array([5, 2, 1, 0.5])
    ways += [np.arange(low // step, high // step + 1) * step for step in steps]
    for way in ways:
        found = [float(tick) for tick in way if low <= tick <= high]
        if few <= len(found) <= most:
            break
    return found


def short(number):
    """Write a number for a tick.

    >>> short(2.4), short(2e11), short(300)
    ('2.4', '2e11', '300')
    """
    small = 1e-3 < number < 1e5
    return f"{number:.4g}" if small else f"{number:.3g}".replace("e+", "e")


def draw_kind(ax, kind, points, law):
    """Draw the models of a kind, the spread of their seeds, and the fit."""
    _, color, _, line = LOOKS[kind]
    draw_points(ax, kind, points)
    if law:
        x = [point[0] for point in points]
        at = np.geomspace(min(x), max(x), 50)
        ax.plot(at, law(at), color=color, ls=line, lw=1.5)


def draw_points(ax, kind, points, fill=None):
    """Draw models as marks, filled or not, and the spread of their seeds."""
    if points:
        _, color, marker, _ = LOOKS[kind]
        x, loss, low, high = map(np.array, zip(*points, strict=True))
        ax.plot(x, loss, marker, color=color, ms=6, mfc=fill or color)
        ax.vlines(x, low, high, color=color, lw=3, alpha=0.4)


def findings(laws, axes, claims):
    """Return title and sentence; the title compares the exponents of two fits."""
    first = next(iter(axes))
    found = {kind: law for (kind, axis), law in laws.items() if axis == first}
    fits = []
    for kind, law in found.items():
        low, high = law.exponent_interval
        fits.append(
            f"{LOOKS[kind][0]} falls as {short(law.factor)} C^{law.exponent:.4f}, "
            f"exponent from {low:.4f} to {high:.4f} at 95 %"
        )
    title, *claims = claims or ["Loss against compute, nothing to compare"]
    if {"full", "moba"} <= found.keys():
        claims = [title, *claims]
        title = compare_exponents(found["full"], found["moba"])
    return title, f"{'; '.join([*fits, *claims]) or 'no fit yet'}."


def compare_exponents(full, moba):
    """Say how two laws fall, and whether the intervals of their exponents touch."""
    lows, highs = zip(full.exponent_interval, moba.exponent_interval, strict=True)
    apart = max(lows) > min(highs)
    return (
        f"Loss falls as C^{full.exponent:.3f} in full, as C^{moba.exponent:.3f} with "
        f"MoBA; 95 % intervals {'are apart' if apart else 'overlap'}"
    )

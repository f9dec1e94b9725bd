"""Picture time against length, and from where on a program is faster than another."""

import numpy as np
from matplotlib.lines import Line2D

from moba_lab.recorded import faster_from
from moba_lab.viz.curves import (
    PROGRAMS,
    check_panels,
    comparison,
    draw_panels,
    explain,
    shown,
)
from moba_lab.viz.style import LINE, canvas, finish, styled
from moba_lab.viz.words import SECONDS, length, listed


def scaling_curves(panels, source):
    """Draw time against length with the length from which on MoBA is never slower.

    Args:
        panels: dict from title, such as "forward", to a dict from program ("dense",
            "flash", "triton", "torch") to (tokens, medians, lower quartiles, upper
            quartiles), the last three in seconds for one head. A panel may be empty.
        source: hardware, versions and date of the measurement.

    Returns:
        Figure.

    Raises:
        ValueError: as `curves.check_panels`.
    """
    check_panels(panels)
    with styled():
        fig = canvas(4.4)
        row = draw_panels(fig, panels, "time for one head", SECONDS)
        # The panels share their limits, which all curves have set by now.
        for ax, curves in zip(row, panels.values(), strict=True):
            mark_crossovers(ax, curves)
        star = Line2D([], [], color=LINE, ls=":", lw=1.5)
        extra = [(star, "never slower than dense from here on")]
        explain(fig, shown(panels), source, extra if crossings(panels) else ())
        return finish(fig, *findings(panels))


def mark_crossovers(ax, curves):
    """Draw a line from the axis to every curve where it stays below dense."""
    low, high = ax.get_ylim()
    middle = np.sqrt(np.prod(ax.get_xlim()))
    for row, (name, tokens) in enumerate(crossings({"": curves}).values()):
        color = PROGRAMS[name][1]
        curve = dict(zip(*curves[name][:2], strict=True))
        ax.vlines(tokens, low, curve[tokens], color=color, ls=":", lw=1.5)
        ax.text(
            tokens,
            0.02 + 0.08 * row,
            f" from {length(tokens)} ",
            color=color,
            ha="left" if tokens < middle else "right",
            transform=ax.get_xaxis_transform(),
            bbox={"fc": "white", "ec": "none", "pad": 0.5},
        )
    ax.set_ylim(low, high)


def crossings(panels):
    """Return where programs stay below dense, from `faster_from`.

    Returns:
        dict from (title, program) to (program, tokens).
    """
    found = {}
    for title, curves in panels.items():
        for name in shown({title: curves}):
            if name != "dense" and "dense" in curves:
                tokens = faster_from(curves["dense"], curves[name])
                if tokens:
                    found[title, name] = name, tokens
    return found


def findings(panels):
    """Return title and sentence about the fastest program there is."""
    names = shown(panels)
    if "dense" not in names or len(names) == 1:
        return "No two programs to compare", "there is nothing to compare here."
    best = next(name for name in ("triton", "torch", "flash") if name in names)
    found = crossings(panels)
    parts = []
    for title, curves in panels.items():
        if best in curves:
            _, tokens = found.get((title, best), (best, None))
            when = f"from {length(tokens)} tokens on" if tokens else "at no length"
            parts.append(f"{when} ({title})")
    sentences = [
        comparison(title, curves, SECONDS, ("faster", "slower"))
        for title, curves in panels.items()
    ]
    who = PROGRAMS[best][0]
    return (
        f"{who[0].upper()}{who[1:]} is faster than dense attention {listed(parts)}",
        "; ".join(filter(None, sentences)) + ".",
    )

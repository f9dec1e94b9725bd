"""Picture memory against length."""

from moba_lab.viz.curves import (
    PROGRAMS,
    at_longest,
    check_panels,
    comparison,
    draw_panels,
    explain,
    shown,
)
from moba_lab.viz.style import canvas, finish, styled
from moba_lab.viz.words import BYTES, length


def memory_curves(panels, source):
    """Draw the memory that calls take beyond their inputs, against the length.

    Args:
        panels: as in `scaling_curves`, with bytes for one head.
        source: hardware, versions and date of the measurement.

    Returns:
        Figure.

    Raises:
        ValueError: as `curves.check_panels`.
    """
    check_panels(panels)
    with styled():
        fig = canvas(4.2)
        draw_panels(fig, panels, "memory for one head, beyond inputs", BYTES, base=16)
        explain(fig, shown(panels), source)
        return finish(fig, *findings(panels))


def findings(panels):
    """Return title and sentence about the longest lengths."""
    found = {t: at_longest(c) for t, c in panels.items() if at_longest(c)}
    most = [
        (values[name] / values["dense"], name, tokens, title)
        for title, (tokens, values) in found.items()
        for name in values.keys() - {"dense"}
    ]
    if not most:
        return "No two programs to compare", "there is nothing to compare here."
    times, name, tokens, title = max(most)
    sentences = [
        comparison(title, curves, BYTES, ("less", "more"))
        for title, curves in panels.items()
    ]
    return (
        f"At {length(tokens)} tokens ({title}) {PROGRAMS[name][0]} takes {times:.1f} "
        f"times the memory of dense attention",
        "; ".join(filter(None, sentences)) + ".",
    )

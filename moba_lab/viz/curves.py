"""Draw what programs take against the length, and say on what it was measured."""

import textwrap

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from moba_lab.viz.style import FONT, GRID, LINE, legend, name_axes
from moba_lab.viz.words import length, scaled

# Name in a sentence, colour, marker, line; each program differs in all of them.
PROGRAMS = {
    "dense": ("dense attention", "#000000", "s", "--"),
    "flash": ("the paper's pipeline", "#D55E00", "^", "-."),
    "triton": ("our pipeline", "#0072B2", "o", "-"),
    "torch": ("MoBA on the CPU", "#009E73", "D", "-"),
}
NOTHING = "not recorded"


def check_panels(panels):
    """Raise unless panels hold curves of known programs, each with values above 0.

    Raises:
        ValueError: if there is no panel, a program is unknown, the four parts of a
            curve differ in length, are empty or hold a number that is not above 0.
    """
    if not panels:
        raise ValueError("expected at least one panel of curves, got none")
    for title, curves in panels.items():
        for name, curve in curves.items():
            if name not in PROGRAMS:
                raise ValueError(
                    f"{title}: programs are {', '.join(PROGRAMS)}, got {name!r}"
                )
            sizes = {len(part) for part in curve}
            if len(curve) != 4 or len(sizes) != 1 or 0 in sizes:
                raise ValueError(
                    f"{title}, {name}: expected tokens, medians and two quartiles, "
                    f"equally many, got {[len(part) for part in curve]}"
                )
            if not all(number > 0 for part in curve for number in part):
                raise ValueError(f"{title}, {name}: expected numbers above 0")


def draw_panels(fig, panels, label, units, base=10):
    """Draw panels of curves side by side, on one scale of values.

    Args:
        fig: Figure.
        panels: dict from title to a dict from program to curve; one may be empty.
        label: what the values are.
        units: dict from unit to its size; see `words.scaled`.
        base: factor between the ticks of the values.

    Returns:
        axes, from left to right.
    """
    row = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, curves) in zip(row, panels.items(), strict=True):
        ax.set_title(title)
        name_axes(ax, "tokens", label if ax is row[0] else "")
        if curves:
            draw_curves(ax, curves, units, base)
        else:
            say_nothing(ax)
    return row


def draw_curves(ax, curves, units, base=10):
    """Draw curves on two log scales, and their quartiles as bars.

    Args:
        ax: Axes.
        curves: dict from program to (tokens, middle, low, high).
        units: dict from unit to its size; see `words.scaled`.
        base: factor between the ticks of the values.
    """
    for name, (tokens, middle, low, high) in curves.items():
        _, color, marker, line = PROGRAMS[name]
        ax.plot(tokens, middle, color=color, marker=marker, ls=line, ms=5, lw=1.5)
        ax.vlines(tokens, low, high, color=color, lw=3, alpha=0.4)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=base)
    tokens = sorted({n for curve in curves.values() for n in curve[0]})
    ax.set_xticks(tick_lengths(tokens), [length(n) for n in tick_lengths(tokens)])
    ax.xaxis.set_minor_locator(NullLocator())
    values = [value for curve in curves.values() for value in curve[1]]
    # Over a short range one tick per power would leave hardly any.
    parts = (1, 2, 5) if base == 10 and max(values) < 500 * min(values) else (1,)
    ax.yaxis.set_major_locator(LogLocator(base, parts, numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: scaled(y, units)))
    ax.grid(axis="y", color=GRID, lw=0.5)
    ax.spines[["top", "right"]].set_visible(False)


def tick_lengths(tokens):
    """Return lengths far enough apart for ticks, the longest one among them.

    Example:
        >>> tick_lengths([1024, 1536, 2048, 4096])
        [1024, 2048, 4096]
        >>> tick_lengths([2**n for n in range(10, 18)])
        [2048, 8192, 32768, 131072]
        >>> tick_lengths([])
        []
    """
    apart = 2 if not tokens or max(tokens) < 100 * min(tokens) else 4
    ticks = []
    for n in sorted(tokens, reverse=True):
        if not ticks or apart * n <= ticks[0]:
            ticks.insert(0, n)
    return ticks


def say_nothing(ax):
    """Mark a panel for which there is no measurement."""
    ax.text(0.5, 0.5, NOTHING, transform=ax.transAxes, ha="center", color=LINE)
    ax.set(xticks=[], yticks=[])


def explain(fig, names, source, extra=()):
    """Put the programs below the axes, and above them what they were measured on."""
    if not names and not extra:
        return
    pairs = []
    for name in names:
        text, color, marker, line = PROGRAMS[name]
        handle = Line2D([], [], color=color, marker=marker, ls=line, ms=5)
        pairs.append((handle, text))
    legend(fig, (), extra=(*pairs, *extra))
    words = textwrap.fill(f"measured on {source}", int(fig.get_figwidth() * 14))
    fig.legends[-1].set_title(words, prop={"size": FONT})


def shown(panels):
    """Return the programs of all panels, in the order of PROGRAMS."""
    there = {name for curves in panels.values() for name in curves}
    return [name for name in PROGRAMS if name in there]


def at_longest(curves):
    """Return the values of all programs at the longest length that can be compared.

    Returns:
        tokens, and a dict from program to value, of those that have that length; None
        where dense attention has no other program beside it.

    Example:
        >>> dense, ours = ((1, 2, 4), (9, 9, 9)), ((1, 2), (3, 4))
        >>> at_longest({"dense": dense, "triton": ours})
        (2, {'dense': 9, 'triton': 4})
    """
    values = {
        name: dict(zip(*curve[:2], strict=True)) for name, curve in curves.items()
    }
    dense = values.get("dense", {})
    others = {n for name, of in values.items() if name != "dense" for n in of}
    if not dense.keys() & others:
        return None
    tokens = max(dense.keys() & others)
    return tokens, {name: of[tokens] for name, of in values.items() if tokens in of}


def comparison(title, curves, units, words):
    """Compare programs with dense attention at the longest length they have.

    Args:
        title: of the panel.
        curves: dict from program to (tokens, middle, low, high).
        units: as in `words.scaled`.
        words: what a smaller and a larger value is called.

    Returns:
        A clause; None where there is nothing to compare.
    """
    found = at_longest(curves)
    if found is None:
        return None
    tokens, values = found
    dense = values.pop("dense")
    parts = [f"dense attention {scaled(dense, units)}"]
    for name, value in values.items():
        times = max(dense, value) / min(dense, value)
        parts.append(
            f"{PROGRAMS[name][0]} {scaled(value, units)} "
            f"({times:.1f} times {words[value > dense]})"
        )
    return f"{title}, {length(tokens)} tokens: {', '.join(parts)}"

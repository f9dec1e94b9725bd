"""Keep the looks of kinds of training runs, and of what all their figures share."""

import textwrap

from matplotlib.lines import Line2D

from moba_lab.viz.style import FONT, GRID, legend

# Name in a legend, colour, marker, line; each kind differs in all of them.
LOOKS = {
    "full": ("full attention", "#000000", "s", "--"),
    "moba": ("MoBA", "#0072B2", "o", "-"),
    "hybrid": ("MoBA, then full", "#D55E00", "^", "-."),
    "quarter": ("MoBA, topk a quarter of the blocks", "#CC79A7", "v", "-"),
    "matched": ("MoBA, equal work", "#009E73", "D", ":"),
}


def plain(ax, grid="both"):
    """Give an axes the grid and the open frame of all training figures."""
    ax.grid(axis=grid, color=GRID, lw=0.5)
    ax.spines[["top", "right"]].set_visible(False)


def explain(fig, kinds, source, extra=()):
    """Put the kinds below the axes, and above them where the numbers are from."""
    pairs = []
    for kind in kinds:
        text, color, marker, line = LOOKS[kind]
        handle = Line2D([], [], color=color, marker=marker, ls=line, ms=5)
        pairs.append((handle, text))
    if not (pairs or extra):
        return
    legend(fig, (), extra=(*pairs, *extra))
    words = textwrap.fill(f"trained on {source}", int(fig.get_figwidth() * 14))
    fig.legends[-1].set_title(words, prop={"size": FONT})


def finite(low, high, limits):
    """Cut an interval to what is drawn; one without bounds fills the axes.

    >>> finite(float("-inf"), 0.5, (-1, 1))
    (-1, 0.5)
    """
    return max(low, limits[0]), min(high, limits[1])

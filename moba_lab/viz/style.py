"""Keep the look of every figure in one place: colours, marks, sizes, legend."""

import textwrap
from contextlib import contextmanager
from enum import IntEnum

import matplotlib as mpl
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

WIDTH = 8.0
DPI = 100
FONT = 9
TITLE = 11
SCORES = "cividis"
LINE = "#595959"
GRID = "#B3B3B3"
HATCH = "////"


class State(IntEnum):
    """Name what a key block, or a key token, is for a query."""

    FUTURE = 0
    PAST = 1
    SELECTED = 2
    CURRENT = 3
    LEAK = 4


COLOR = {
    State.FUTURE: "#FFFFFF",
    State.PAST: "#D9D9D9",
    State.SELECTED: "#0072B2",
    State.CURRENT: "#E69F00",
    State.LEAK: "#000000",
}
INK = {
    State.FUTURE: "#000000",
    State.PAST: "#000000",
    State.SELECTED: "#FFFFFF",
    State.CURRENT: "#000000",
    State.LEAK: "#FFFFFF",
}
LABEL = {
    State.FUTURE: "future",
    State.PAST: "past, not selected",
    State.SELECTED: "past, selected",
    State.CURRENT: "current",
    State.LEAK: "read against the rules",
}
MARK = {State.SELECTED: "o", State.LEAK: "x"}

SETTINGS = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.monospace": ["DejaVu Sans Mono"],
    "font.size": FONT,
    "axes.labelsize": FONT + 1,
    "axes.titlesize": FONT + 1,
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
    "legend.fontsize": FONT,
    "hatch.linewidth": 0.7,
    "image.interpolation": "nearest",
}


@contextmanager
def styled():
    """Draw in the project's style without touching the reader's own settings."""
    with mpl.style.context("seaborn-v0_8-ticks"), mpl.rc_context(SETTINGS):
        yield


def canvas(height, width=WIDTH):
    """Return an empty figure that pyplot does not know, so it is never shown twice."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def finish(fig, finding, what_to_see):
    """Give a figure its finding as title, its sentence and its text.

    Ticks take their style when they are first drawn, hence the drawing in here.
    """
    title = textwrap.fill(finding, int(fig.get_figwidth() * 11.5))
    fig.suptitle(title, fontsize=TITLE, fontweight="bold", parse_math=False)
    fig.draw_without_rendering()
    return describe(fig, finding, what_to_see)


def describe(picture, finding, what_to_see):
    """Let a picture carry its finding, its sentence, and both for screen readers."""
    picture.finding, picture.what_to_see = finding, what_to_see
    picture.alt = f"{finding}. {what_to_see[0].upper()}{what_to_see[1:]}"
    return picture


def name_axes(ax, x="key block", y="query position"):
    """Name both axes; the names are the same in the whole project."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)


def labels(packed):
    """Return the text of every state; in a pack white also means other sequences."""
    named = dict(LABEL)
    if packed:
        named[State.FUTURE] = "future or other sequence"
    return named


def handle(state, label):
    """Return the legend entry of one state with the mark that cells carry."""
    box = Patch(facecolor=COLOR[state], edgecolor=LINE, label=label)
    if state == State.CURRENT:
        box.set_hatch(HATCH)
    if state not in MARK:
        return box
    dot = Line2D([], [], color=INK[state], marker=MARK[state], ls="", ms=4)
    return (box, dot)


def legend(fig, shown=tuple(State)[:4], packed=False, extra=()):
    """Explain the states below the axes.

    Args:
        fig: Figure.
        shown: the states that appear.
        packed: whether white cells can belong to another sequence.
        extra: further (handle, text) pairs.
    """
    named = labels(packed)
    pairs = [(handle(state, named[state]), named[state]) for state in shown]
    handles, texts = zip(*pairs, *extra, strict=True)
    # In pixels: the mark and the gap of an entry, and its characters.
    wide = sum(55 + 6.5 * len(text) for text in texts)
    rows = -(-wide // (fig.get_figwidth() * DPI))
    fig.legend(
        handles,
        texts,
        loc="outside lower center",
        ncols=-(-len(texts) // int(rows)),
        frameon=False,
        handlelength=2.2,
        handleheight=1.2,
        columnspacing=1.5,
    )

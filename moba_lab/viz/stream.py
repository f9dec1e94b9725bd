"""Picture how the best of a row are kept while its scores stream by."""

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from moba_lab.viz.style import (
    COLOR,
    LINE,
    SCORES,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)
from moba_lab.viz.words import listed

MARK = {"color": "#D55E00", "mfc": "none", "mew": 2, "ms": 8}


def topk_stream(scores, steps, columns, slots):
    """Draw the rounds of a streaming top-k: what is seen, kept, and given up.

    Args:
        scores: (N,) scores of one query, all finite.
        steps: list of (first block of the tile, best block left in it, block that it
            replaces), in order; -1 for an empty place, None where it replaces nothing.
        columns: blocks of a tile.
        slots: how many are kept.

    Returns:
        Figure: a line for every round, a line for what is left in the end.

    Raises:
        ValueError: if there are more than 20 rounds or 32 blocks, or none.
    """
    scores = np.asarray(scores, dtype=float)
    if not 0 < len(steps) <= 20 or not 0 < len(scores) <= 32:
        raise ValueError(
            f"expected 1 to 20 rounds over 1 to 32 blocks, got {len(steps)} and "
            f"{len(scores)}"
        )
    kept, taken, names, rounds = [], set(), [], []
    for start, best, dropped in steps:
        fresh = not rounds or rounds[-1][0] != start
        taken = set() if fresh else taken
        rounds.append((start, best, dropped, list(kept), set(taken)))
        number = 1 if fresh else int(names[-1].split()[-1]) + 1
        names.append(f"tile {start // columns}, round {number}")
        if dropped is not None:
            kept = [n for n in kept if n != dropped] + [best]
            taken.add(best)
    with styled():
        fig = canvas(1.8 + 0.28 * (len(rounds) + 1))
        ax = fig.subplots()
        image = draw_scores(ax, scores, rounds, kept, columns)
        for y, (_, best, dropped, before, _) in enumerate(rounds):
            frame(ax, before, y)
            ax.plot(best, y, "o" if dropped is not None else "D", **MARK)
            if dropped is not None and dropped >= 0:
                ax.plot(dropped, y, "x", **MARK)
        frame(ax, kept, len(rounds))
        ax.set_yticks(range(len(rounds) + 1), [*names, "kept"])
        step = 1 if len(scores) <= 16 else 2
        ax.set_xticks(range(0, len(scores), step))
        name_axes(ax, y="round")
        fig.colorbar(image, ax=ax, label="score", pad=0.02)
        explain(fig)
        return finish(fig, *findings(scores, rounds, kept, columns, slots))


def draw_scores(ax, scores, rounds, kept, columns):
    """Draw the scores a program has in every round: its tile's, and those it kept."""
    shown = np.full((len(rounds) + 1, len(scores)), np.nan)
    for y, (start, _, _, before, taken) in enumerate(rounds):
        tile = [n for n in range(start, start + columns) if n < len(scores)]
        there = [n for n in [*tile, *before] if n not in taken or n in before]
        shown[y, there] = scores[there]
    shown[-1, kept] = scores[kept]
    for y, (*_, before, taken) in enumerate(rounds):
        for n in taken - set(before):
            low = n - 0.5, y - 0.5
            grey = COLOR[State.PAST]
            ax.add_patch(Rectangle(low, 1, 1, fc=grey, ec=LINE, hatch="xx", lw=0))
    edges = np.arange(columns, len(scores), columns) - 0.5
    ax.vlines(edges, -0.5, len(rounds) + 0.5, LINE, lw=1, ls=":")
    return ax.imshow(np.ma.masked_invalid(shown), cmap=SCORES, aspect="auto")


def frame(ax, blocks, y):
    """Frame what is kept before a round."""
    for n in blocks:
        low = n - 0.42, y - 0.42
        ax.add_patch(Rectangle(low, 0.84, 0.84, fc="none", ec="black", lw=2))


def explain(fig):
    """Explain the marks below the axes."""
    pairs = [
        (Patch(fc="none", ec="black", lw=2), "kept so far"),
        (Line2D([], [], marker="o", ls="", **MARK), "maximum, comes in"),
        (Line2D([], [], marker="x", ls="", **MARK), "worst kept, goes out"),
        (Line2D([], [], marker="D", ls="", **MARK), "maximum, not better"),
    ]
    legend(fig, (), extra=pairs)


def findings(scores, rounds, kept, columns, slots):
    """Return title and sentence about how few rounds there are."""
    tiles = -(-len(scores) // columns)
    title = (
        f"{len(rounds)} looks at a maximum keep the best {slots} of {len(scores)} "
        f"scores that come in {tiles} tiles"
    )
    last = [step for step in rounds if step[2] is not None and step[2] >= 0]
    see = f"blocks {listed(sorted(kept))} are left"
    if last:
        start, best, dropped, *_ = last[-1]
        see = (
            f"block {best} of tile {start // columns} replaces block {dropped}, the "
            f"worst of those kept, and {see}"
        )
    return title, f"{see}."

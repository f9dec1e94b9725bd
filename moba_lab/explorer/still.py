"""Draw what a `BlockExplorer` shows where widgets do not run."""

import numpy as np

from moba_lab.viz.cells import decimal, draw_states, tick_blocks, tick_queries
from moba_lab.viz.select import outline, shown_states
from moba_lab.viz.style import (
    COLOR,
    HATCH,
    INK,
    LINE,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)
from moba_lab.viz.words import count, reads

# More bars would not fit beside the map, nor would more characters below a bar.
BARS = 8
CHARACTERS = 36


def still(choice, detail):
    """Draw the map of one head, and beside it the blocks of one query.

    Args:
        choice: Choice.
        detail: what `Call.detail` returned for the query.

    Returns:
        Figure. Of more than eight blocks that are read, those with the largest shares
        are drawn; of more than 36 characters in a block, the last ones.
    """
    grid, query = choice.grid, detail["query"]
    with styled():
        fig = canvas(4.8)
        left, right = fig.subplots(1, 2, gridspec_kw={"width_ratios": [1.1, 1]})
        draw_states(left, choice.cells, grid)
        outline(left, query, grid.N)
        tick_queries(left, np.arange(grid.S), grid.block_size)
        tick_blocks(left, grid.N)
        name_axes(left)
        left.set_title(f"head {choice.head}, topk={choice.topk}")
        draw_shares(right, detail)
        legend(fig, shown_states(choice.cells), grid.packed)
        see = f"row {query} (outlined): {reads(choice.cells[query], query)}."
        return finish(fig, finding(detail), see)


def draw_shares(ax, detail):
    """Draw the share of every block of the query, with its score and its text."""
    rows = heaviest(detail["rows"])
    lines = max(len(rows), 4)
    high = 0.6 if rows[0]["text"] is None else 0.35
    for y, row in enumerate(rows):
        own = row["state"] == State.CURRENT
        look = {"color": COLOR[row["state"]], "hatch": HATCH if own else None}
        share = row["share"] or 0.0
        if share:
            ax.barh(y, share, height=high, edgecolor=LINE, **look)
        ax.text(share + 0.02, y, label(row, detail["left_out"]), va="center")
        if row["text"] is not None:
            write_text(ax, y + 0.26, row)
    ax.set(xlim=(0, 1.55), ylim=(lines - 0.4, -0.6))
    ax.set_yticks(range(len(rows)), [row["block"] for row in rows])
    ax.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    name_axes(ax, "share of attention", "key block")
    read = sum(row["state"] != State.PAST for row in detail["rows"])
    few = f", the {BARS} largest shares of {read}" if read > BARS else ""
    ax.set_title(f"query {detail['query']}{few}")
    ax.spines[["top", "right"]].set_visible(False)


def heaviest(rows):
    """Return the rows to draw, in the order of their blocks, the one left out last."""
    read = [row for row in rows if row["state"] != State.PAST]
    least = sorted((row["share"] or 0 for row in read), reverse=True)[:BARS][-1]
    kept = [row for row in read if (row["share"] or 0) >= least][:BARS]
    return [*kept, *(row for row in rows if row["state"] == State.PAST)]


def label(row, left_out):
    """Return what stands beside a bar.

    Example:
        >>> label({"state": State.SELECTED, "share": 0.5, "score": 1.25}, left_out=3)
        '50%, score 1.2'
    """
    if row["state"] == State.CURRENT:
        return f"{percent(row['share'])}, own block"
    score = "none" if row["score"] is None else decimal(row["score"])
    if row["state"] == State.PAST:
        return f"not read: best of {count(left_out, 'block')} left out, score {score}"
    return f"{percent(row['share'])}, score {score}"


def percent(share):
    """Return a share as text."""
    return "none" if share is None else f"{share:.0%}"


def write_text(ax, y, row):
    """Write the end of a block's text below its bar, the query's own byte marked."""
    text = row["text"][-CHARACTERS:]
    own = row["state"] == State.CURRENT
    font = {"family": "monospace", "parse_math": False}
    at = {"xytext": (3, 0), "textcoords": "offset points", "va": "top"}
    written = ax.annotate(text[:-1] if own else text, (0, y), **at, **font)
    if own:
        box = {"fc": COLOR[State.CURRENT], "ec": "black", "pad": 1}
        at = {"xycoords": written, "xytext": (2, 0), "textcoords": "offset points"}
        mark = {"color": INK[State.CURRENT], "bbox": box, "va": "center"}
        ax.annotate(text[-1], (1, 0.5), **at, **mark, **font)


def finding(detail):
    """Say how much of its attention the query spends on past blocks."""
    past = sum(r["share"] or 0 for r in detail["rows"] if r["state"] == State.SELECTED)
    return (
        f"Head {detail['head']}: query {detail['query']} spends {past:.0%} of its "
        "attention on past blocks"
    )

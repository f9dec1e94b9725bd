"""Draw what a `BlockExplorer` shows where widgets do not run."""

import numpy as np

from moba_lab.viz.cells import decimal, draw_states, tick_blocks, tick_queries
from moba_lab.viz.select import outline, shown_states
from moba_lab.viz.style import (
    COLOR,
    HATCH,
    LINE,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)
from moba_lab.viz.words import reads


def still(choice, detail):
    """Draw the map of one head, and beside it the blocks of one query.

    Args:
        choice: Choice.
        detail: what `Call.detail` returned for the query.

    Returns:
        Figure.
    """
    grid, query = choice.grid, detail["query"]
    with styled():
        fig = canvas(4.6)
        left, right = fig.subplots(1, 2, gridspec_kw={"width_ratios": [1.2, 1]})
        draw_states(left, choice.cells, grid)
        outline(left, query, grid.N)
        tick_queries(left, np.arange(grid.S), grid.block_size)
        tick_blocks(left, grid.N)
        name_axes(left)
        left.set_title(f"head {choice.head}, topk {choice.topk}")
        draw_shares(right, detail)
        legend(fig, shown_states(choice.cells), grid.packed)
        see = f"row {query} (outlined): {reads(choice.cells[query], query)}."
        return finish(fig, finding(detail), see)


def draw_shares(ax, detail):
    """Draw the share of every block of the query, with its score beside it."""
    rows = [row for row in detail["rows"] if row["share"] is not None]
    for y, row in enumerate(rows):
        own = row["state"] == State.CURRENT
        color, hatch = COLOR[row["state"]], HATCH if own else None
        ax.barh(y, row["share"], height=0.7, color=color, hatch=hatch, edgecolor=LINE)
        score = "own block" if own else f"score {decimal(row['score'])}"
        ax.text(row["share"] + 0.02, y, f"{row['share']:.0%} ({score})", va="center")
    ax.set(xlim=(0, 1.6), ylim=(max(len(rows), 4) - 0.4, -0.6))
    ax.set_yticks(range(len(rows)), [row["block"] for row in rows])
    ax.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    name_axes(ax, "share of attention", "key block")
    ax.set_title(f"query {detail['query']}")
    ax.spines[["top", "right"]].set_visible(False)


def finding(detail):
    """Say how much of its attention the query spends on past blocks."""
    past = sum(r["share"] or 0 for r in detail["rows"] if r["state"] == State.SELECTED)
    return (
        f"Head {detail['head']}: query {detail['query']} spends {past:.0%} of its "
        "attention on past blocks"
    )

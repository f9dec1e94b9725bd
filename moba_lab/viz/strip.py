"""Picture the choice of a few queries, with the score in every box."""

import numpy as np
from matplotlib.patches import Rectangle

from moba_lab.viz.cells import decimal
from moba_lab.viz.gate import check_scores
from moba_lab.viz.layout import check_index, layout
from moba_lab.viz.select import shown_states
from moba_lab.viz.states import states
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


def query_strip(selected, scores, queries, blocks, head=0):
    """Draw the blocks of a few queries as boxes with the score in each box.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        scores: (S, H, N) from `gate_scores`.
        queries: about five query numbers.
        blocks: Blocks.
        head: which head.

    Returns:
        Figure.

    Raises:
        ValueError: if queries is empty or a shape does not fit blocks.
        IndexError: if a query or the head does not exist.
    """
    grid = layout(blocks)
    cells, scores = states(selected, blocks), check_scores(scores, grid)
    head = check_index(head, cells.shape[1], "head")
    queries = [check_index(query, grid.S, "query") for query in np.atleast_1d(queries)]
    if not queries:
        raise ValueError("queries must name at least one query, got none")
    cells, scores = cells[queries, head], scores[queries, head]
    with styled():
        fig = canvas(1.5 + (0.4 if grid.N <= 16 else 0.5) * len(queries))
        ax = fig.subplots()
        for row in range(len(queries)):
            for block in range(grid.N):
                draw_box(ax, row, block, cells[row, block], scores[row, block], grid.N)
        ax.set(xlim=(-0.6, grid.N - 0.4), ylim=(len(queries) - 0.4, -0.6))
        ax.set_yticks(range(len(queries)), queries)
        ax.set_xticks(range(0, grid.N, 1 if grid.N <= 16 else 4))
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        name_axes(ax)
        legend(fig, shown_states(cells), grid.packed)
        told = [reads(row, query) for row, query in zip(cells, queries, strict=True)]
        return finish(fig, cut(cells, scores, queries, head), f"{'; '.join(told)}.")


def draw_box(ax, row, block, state, score, N):
    """Draw one block of one query; chosen ones have a thick border and bold text."""
    state, read = State(state), state >= State.SELECTED
    box = Rectangle((block - 0.45, row - 0.4), 0.9, 0.8, ec=LINE, lw=0.8, zorder=2)
    box.set_facecolor(COLOR[state])
    if state == State.CURRENT:
        box.set_hatch(HATCH)
    if read:
        box.set(edgecolor="black", linewidth=2, zorder=3)
    ax.add_patch(box)
    if (not np.isfinite(score) and state != State.CURRENT) or N > 40:
        return
    ax.text(
        block,
        row,
        "own" if state == State.CURRENT else decimal(score),
        color=INK[state],
        fontweight="bold" if read else "normal",
        ha="center",
        va="center",
        rotation=90 if N > 16 else 0,
        zorder=4,
        bbox={"fc": COLOR[state], "ec": "none", "pad": 1}
        if state == State.CURRENT
        else None,
    )


def cut(cells, scores, queries, head):
    """Say how close the choice of the first query with a real choice was."""
    for row, (state, score) in enumerate(zip(cells, scores, strict=True)):
        won, lost = score[state == State.SELECTED], score[state == State.PAST]
        won, lost = won[np.isfinite(won)], lost[np.isfinite(lost)]
        if len(won) and len(lost):
            return (
                f"Head {head}: query {queries[row]} takes the best "
                f"{count(len(won), 'past block')} of {len(won) + len(lost)}: "
                f"{decimal(won.min())} gets in, {decimal(lost.max())} does not"
                if won.min() >= lost.max()
                else f"Head {head}: query {queries[row]} passes over a better score, "
                f"{decimal(lost.max())}, for {decimal(won.min())}"
            )
    return f"Head {head}: these queries read every block of their past"

"""Picture how queries are brought together by the block they chose."""

import numpy as np
from matplotlib.patches import Rectangle

from moba_lab.viz.cells import tick_blocks, tick_queries
from moba_lab.viz.layout import check_index, layout
from moba_lab.viz.load import pair_lists
from moba_lab.viz.style import (
    COLOR,
    GRID,
    State,
    canvas,
    finish,
    name_axes,
    styled,
)
from moba_lab.viz.words import count


def route_picture(routing, blocks, head=0, query=None):
    """Draw the routed pairs of one head before and after arranging them by block.

    Paper: section 2.3, "arrange"; Algorithm 1, lines 9-11.

    Args:
        routing: Routing.
        blocks: Blocks.
        head: which head.
        query: the query to follow, outlined; None: the last one with two pairs or more.

    Returns:
        Figure.

    Raises:
        ValueError: if routing does not fit blocks, or there are more than 64 queries.
        IndexError: if the head or the query does not exist.
    """
    grid = layout(blocks)
    if grid.S > 64:
        raise ValueError(
            f"at most 64 queries fit into this picture, got {grid.S}; "
            f"load_histogram shows larger ones"
        )
    queries, offsets = pair_lists(routing, grid)
    offsets = offsets[check_index(head, len(offsets), "head")]
    block = np.repeat(np.arange(grid.N), np.diff(offsets))
    queries = queries[offsets[0] : offsets[-1]]
    if query is None:
        query = np.bincount(queries, minlength=1)[::-1].argmax()
        query = queries.max(initial=0) - query if len(queries) else 0
    query = check_index(query, grid.S, "query")
    rank = np.arange(len(queries)) - (offsets[:-1] - offsets[0])[block]
    with styled():
        fig = canvas(min(8.0, 1.9 + 0.155 * grid.S))
        before, after = fig.subplots(1, 2)
        draw_pairs(before, block, queries, queries, query, grid)
        draw_pairs(after, block, rank, queries, query, grid)
        before.set_title("before: a row for every query")
        after.set_title("after: a list for every block")
        tick_queries(before, np.arange(grid.S), grid.block_size)
        name_axes(before)
        name_axes(after, y="place in the block's list")
        mark_offsets(after, offsets)
        return finish(fig, *follow(block, queries, offsets, query, head))


def draw_pairs(ax, column, row, queries, query, grid):
    """Draw one box per pair, with the number of its query; outline one query."""
    for x, y, number in zip(column, row, queries, strict=True):
        followed = number == query
        ax.add_patch(
            Rectangle(
                (x - 0.44, y - 0.44),
                0.88,
                0.88,
                fc="white" if followed else COLOR[State.SELECTED],
                ec="black",
                lw=2 if followed else 0.5,
            )
        )
        ink = "black" if followed else "white"
        ax.text(x, y, str(number), color=ink, ha="center", va="center_baseline")
    ax.vlines(np.arange(grid.N + 1) - 0.5, -0.6, grid.S - 0.4, GRID, lw=0.5)
    ax.set(xlim=(-0.6, grid.N - 0.4), ylim=(grid.S - 0.4, -0.6))
    tick_blocks(ax, grid.N)


def mark_offsets(ax, offsets):
    """Write the offsets of the lists at their edges, above the picture."""
    top = ax.secondary_xaxis("top")
    step = -(-len(offsets) // 12)
    top.set_xticks(np.arange(len(offsets))[::step] - 0.5, offsets[::step])
    top.set_xlabel("cu_pairs: first pair of every list")


def follow(block, queries, offsets, query, head):
    """Return title and sentence that follow one query through the arrangement."""
    pairs = np.flatnonzero(queries == query)
    title = (
        f"Head {head}: {count(len(queries), 'pair')} sorted by block, so that each "
        f"block is read once for all its queries"
    )
    first = offsets[block[pairs]]
    places = [
        f"place {place} of block {n} (pair {start} + {place})"
        for n, start, place in zip(
            block[pairs], first, offsets[0] + pairs - first, strict=True
        )
    ]
    see = f"query {query} (white boxes) stands at {' and '.join(places) or 'no place'}"
    return title, f"{see}; inside a list queries stay in ascending order."

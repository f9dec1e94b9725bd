"""Picture the life of a tile: what it gathers, what it reads once, where it writes."""

import numpy as np
from matplotlib.patches import Polygon, Rectangle

from moba_lab.viz.layout import array, check_index, check_selected, layout
from moba_lab.viz.style import COLOR, GRID, State, canvas, finish, name_axes, styled
from moba_lab.viz.words import count

# Where the columns stand: keys, queries, the tile, partial results.
KEYS, QUERIES, TILE, PARTS = 0.0, 1.6, 3.4, 5.2


def tile_life(lists, selected, blocks, entry, rows, tile=0):
    """Draw one tile of a list: the rows it gathers, its block, the rows it writes.

    Args:
        lists: what has `pairs` and `cu_pairs`, as `moba_fast.route.Lists`.
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.
        entry: which list, key head times N plus block.
        rows: pairs of a tile.
        tile: which tile of the list.

    Returns:
        Figure.

    Raises:
        ValueError: if there are more than 64 queries, or topk is 1.
        IndexError: if the list or its tile does not exist.
    """
    grid = layout(blocks)
    n_queries, heads, topk = check_selected(selected, grid).shape
    if n_queries > 64 or topk < 2:
        raise ValueError(
            f"expected at most 64 queries and topk of 2 or more, got {n_queries} "
            f"and {topk}"
        )
    cu_pairs = array(lists.cu_pairs).astype(int)
    entry = check_index(entry, len(cu_pairs) - 1, "list")
    begin, end = cu_pairs[entry : entry + 2]
    tile = check_index(tile, -(-(end - begin) // rows), f"tile of list {entry}")
    pairs = array(lists.pairs)[begin + tile * rows : end][:rows].astype(int)
    row, slot = pairs // (topk - 1), pairs % (topk - 1)
    with styled():
        fig = canvas(1.5 + 0.15 * n_queries)
        ax = fig.subplots()
        place = place_rows(rows, n_queries)
        draw_keys(ax, grid, entry % grid.N, place)
        draw_gather(ax, row // heads, place, n_queries)
        draw_scatter(ax, row // heads, slot, place, (n_queries, topk - 1))
        names = (
            "k and v,\nread once",
            "q,\ngathered",
            f"tile {tile} of\nthe list",
            "partial results,\na row per slot",
        )
        middle = PARTS + (topk - 2) / 2
        ax.set_xticks((KEYS, QUERIES, TILE, middle), names)
        ax.set_yticks(range(0, n_queries, grid.block_size))
        ax.set(xlim=(-0.8, PARTS + topk - 1.3), ylim=(n_queries - 0.3, -0.7))
        ax.tick_params(length=0)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        name_axes(ax, "rows in memory, and a tile in a program")
        return finish(fig, *findings(row, slot, entry, rows, grid, heads))


def place_rows(rows, n_queries):
    """Return where the rows of a tile stand, in the middle of the picture."""
    step = min(1.0, n_queries / rows)
    return (n_queries - 1) / 2 + step * (np.arange(rows) - (rows - 1) / 2)


def box(ax, x, y, fill, text="", width=0.7, height=0.9, ink="black"):
    """Draw one row."""
    low = x - width / 2, y - height / 2
    ax.add_patch(Rectangle(low, width, height, fc=fill, ec=GRID, lw=0.6))
    if text:
        ax.text(x, y, text, color=ink, ha="center", va="center_baseline")


def draw_keys(ax, grid, block, place):
    """Draw all keys, those of the block filled, and a band from them to the tile."""
    for token in range(grid.SK):
        mine = grid.of_token[token] == block
        box(ax, KEYS, token, COLOR[State.SELECTED if mine else State.FUTURE])
    first, last = grid.start[block] - 0.5, grid.end[block] - 0.5
    left, right = KEYS + 0.35, TILE - 0.35
    corners = (left, first), (right, place[0] - 0.5)
    corners += (right, place[-1] + 0.5), (left, last)
    ax.add_patch(Polygon(corners, fc=COLOR[State.SELECTED], alpha=0.15, ec="none"))


def draw_gather(ax, queries, place, n_queries):
    """Draw all queries, those of the pairs filled, and a line from each to its row."""
    blue, grey = COLOR[State.SELECTED], COLOR[State.PAST]
    for query in range(n_queries):
        mine = query in queries
        fill = blue if mine else COLOR[State.FUTURE]
        box(ax, QUERIES, query, fill, str(query) if mine else "", ink="white")
    for i, y in enumerate(place):
        filled = i < len(queries)
        text = str(queries[i]) if filled else ""
        box(ax, TILE, y, blue if filled else grey, text, ink="white")
        if filled:
            ax.plot((QUERIES + 0.35, TILE - 0.35), (queries[i], y), color=blue, lw=1)


def draw_scatter(ax, queries, slots, place, shape):
    """Draw a row per query and slot, and a line to each that the tile writes."""
    blue, wrote = COLOR[State.SELECTED], set(zip(queries, slots, strict=True))
    for query, slot in np.ndindex(*shape):
        fill = blue if (query, slot) in wrote else COLOR[State.FUTURE]
        box(ax, PARTS + slot, query, fill, width=0.8)
    for query, slot, y in zip(queries, slots, place, strict=False):
        ends = (TILE + 0.35, PARTS + slot - 0.4), (y, query)
        ax.plot(*ends, color=blue, lw=1)


def findings(row, slot, entry, rows, grid, heads):
    """Return title and sentence about what is read, written, and left empty."""
    queries, block = row // heads, entry % grid.N
    length = grid.end[block] - grid.start[block]
    empty = rows - len(row)
    title = (
        f"A tile gathers {count(len(row), 'query')}, reads the "
        f"{count(int(length), 'key')} of block {block} once for all of them, and "
        f"writes {count(len(row), 'row')} of its own"
    )
    see = (
        f"query {queries[0]} of head {row[0] % heads} stands in row 0 of the tile and "
        f"gets its partial result in slot {slot[0]}"
    )
    left = f"; {empty} of {rows} rows of the tile stay empty" if empty else ""
    return title, f"{see}{left}."

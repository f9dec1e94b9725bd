"""Say which program of a kernel works on which block for which query.

The launch grids of `moba_fast.kernels`, written out as maps of cells: (S, H, N) program
ids, -1 where no program of the kernel has to do with the cell. The sizes of tiles are
arguments, so that nothing here needs triton.
"""

import numpy as np

from moba_lab.viz.layout import array, check_selected, layout
from moba_lab.viz.states import chosen


def gate_programs(blocks, heads, heads_k, rows):
    """Map `choose_best`: a program holds `rows` queries and scores all their blocks.

    Args:
        blocks: Blocks.
        heads: query heads.
        heads_k: key heads; divides heads.
        rows: queries of a tile, those of all heads of a group counted.

    Returns:
        (S, H, N): the program that scores a past block for a query.

    Example: the programs of the late queries come first.
        >>> from moba_ref import partition
        >>> gate_programs(partition([0, 6], block_size=2), 1, 1, rows=4)[:, 0]
        array([[-1, -1, -1],
               [-1, -1, -1],
               [ 1, -1, -1],
               [ 1, -1, -1],
               [ 0,  0, -1],
               [ 0,  0, -1]])
    """
    grid, ratio = layout(blocks), heads // heads_k
    query, head = np.arange(grid.S)[:, None], np.arange(heads)
    tiles = -(-grid.S * ratio // rows)
    row = query * ratio + head % ratio
    program = head // ratio * tiles + tiles - 1 - row // rows
    block = np.arange(grid.N)
    past = (block >= grid.first_of_query[:, None]) & (block < grid.of_query[:, None])
    return np.where(past[:, None], program[..., None], -1)


def list_programs(pairs, cu_pairs, selected, blocks, rows):
    """Map `attend_past` and `past_kernel`: a program takes `rows` pairs of one list.

    Args:
        pairs: ids of the routed pairs, list after list, as `Lists` has them. Where
            every query head has a key head of its own, `moba_fast.route(...).place`.
        cu_pairs: (HK * N + 1,) first pair of every list.
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.
        rows: pairs of a program.

    Returns:
        (S, H, N): the program that attends from a query to a past block.

    Raises:
        ValueError: if there is not the same number of lists for every block.
    """
    grid = layout(blocks)
    n_queries, heads, topk = check_selected(selected, grid).shape
    cu_pairs = array(cu_pairs).astype(int)
    if (len(cu_pairs) - 1) % max(1, grid.N):
        raise ValueError(
            f"expected lists for each of {grid.N} blocks, got {len(cu_pairs) - 1}"
        )
    pairs = array(pairs)[: cu_pairs[-1]].astype(int)
    entry = np.repeat(np.arange(len(cu_pairs) - 1), np.diff(cu_pairs))
    place = np.arange(len(pairs)) - cu_pairs[entry]
    row, block = pairs // (topk - 1), entry % grid.N
    program = np.full((n_queries, heads, grid.N), -1)
    # What `tile_map` says: list i has room from this tile on.
    first_tile = cu_pairs[entry] // rows + entry
    program[row // heads, row % heads, block] = first_tile + place // rows
    return program


def query_programs(selected, blocks, rows):
    """Map `combine_tile`: a program takes `rows` queries and all that they read.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.
        rows: queries of a tile.

    Returns:
        (S, H, N): the program that reads the own block of a query, and the partial
        result of a past one.
    """
    grid = layout(blocks)
    read = chosen(selected, grid)
    heads = read.shape[1]
    program = np.arange(grid.S)[:, None] // rows * heads + np.arange(heads)
    return np.where(read, program[..., None], -1)


def own_programs(blocks, heads, heads_k):
    """Map `current_kernel`: a program has the keys of a block and walks its queries.

    Args:
        blocks: Blocks, none longer than a tile of keys.
        heads: query heads.
        heads_k: key heads; divides heads.

    Returns:
        (S, H, N): the program of the own block of every query.
    """
    grid = layout(blocks)
    own = grid.of_query[:, None] == np.arange(grid.N)
    first = np.arange(heads) // (heads // heads_k) * grid.N
    return np.where(own[:, None], first[:, None] + np.arange(grid.N), -1)


def gradient_programs(selected, blocks, rows):
    """Map `queries_kernel`: a program writes dq of up to `rows` queries of a block.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.
        rows: queries of a tile.

    Returns:
        (S, H, N): the program that reads the own block of a query, and the row that a
        past block left for it.
    """
    grid = layout(blocks)
    read = chosen(selected, grid)
    heads = read.shape[1]
    first_query = np.searchsorted(grid.of_query, grid.of_query)
    tile = (np.arange(grid.S) - first_query) // rows
    longest = (grid.end - grid.start).max(initial=0)
    tiles = -(-longest // rows)
    program = (grid.of_query * tiles + tile)[:, None] * heads + np.arange(heads)
    return np.where(read, program[..., None], -1)

"""Say what every block is for every query: the one place that computes states."""

import numpy as np

from moba_lab.viz.layout import array, check_selected, layout
from moba_lab.viz.style import State


def chosen(selected, grid):
    """Return (S, H, N) bool: which blocks every query reads, by its own list."""
    selected = check_selected(selected, grid)
    # One column more than there are blocks catches the -1 of the padding.
    flags = np.zeros((*selected.shape[:2], grid.N + 1), dtype=bool)
    np.put_along_axis(flags, selected.astype(int), True, axis=2)
    return flags[..., :-1]


def classify(past, own, read):
    """Return the state of cells from three masks that broadcast to one shape."""
    known = np.where(own | past, State.PAST, State.FUTURE)
    if_read = np.where(past, State.SELECTED, np.where(own, State.CURRENT, State.LEAK))
    return np.where(read, if_read, known).astype(np.int8)


def states(selected, blocks):
    """Return what every block is for every query and head.

    A current block that its query does not read counts as not selected, and a block
    that is read although it lies in the future or in another sequence as a leak.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.

    Returns:
        (S, H, N) int8 of `State`.

    Raises:
        ValueError: if selected has another rank or number of queries, or ids >= N.

    Example: 6 tokens, blocks of 2, two blocks for every query.
        >>> from moba_ref.blocks import partition
        >>> rows = [[-1, 0], [-1, 0], [0, 1], [0, 1], [1, 2], [0, 2]]
        >>> states(np.array(rows)[:, None], partition([0, 6], block_size=2))[2:, 0]
        array([[2, 3, 0],
               [2, 3, 0],
               [1, 2, 3],
               [2, 1, 3]], dtype=int8)
    """
    grid = layout(blocks)
    ids = np.arange(grid.N)
    current = grid.of_query[:, None]
    past = (ids >= grid.first_of_query[:, None]) & (ids < current)
    own = ids == current
    return classify(past[:, None], own[:, None], chosen(selected, grid))


def token_states(mask, blocks):
    """Return what every key token is for every query and head.

    Args:
        mask: (S, H, SK) bool, True where the query reads the key; or `selected`,
            (S, H, topk) integers, which is read causally inside the current block.
        blocks: Blocks.

    Returns:
        (S, H, SK) int8 of `State`.

    Raises:
        ValueError: if the shape fits neither.
    """
    grid, mask = layout(blocks), array(mask)
    keys, query = np.arange(grid.SK), grid.position[:, None]
    in_sequence = grid.of_token >= grid.first_of_query[:, None]
    own = (grid.of_token == grid.of_query[:, None]) & (keys <= query)
    past = in_sequence & (grid.of_token < grid.of_query[:, None])
    if mask.dtype != bool:
        read = chosen(mask, grid)[:, :, grid.of_token] & (past | own)[:, None]
    elif mask.ndim == 3 and mask.shape[::2] == (grid.S, grid.SK):
        read = mask
    else:
        raise ValueError(
            f"mask must be (S, H, SK) = ({grid.S}, H, {grid.SK}), got {mask.shape}"
        )
    return classify(past[:, None], own[:, None], read)

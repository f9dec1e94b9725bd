"""Count what several loop orders compute and move for one choice of blocks.

For one head of D numbers per row in 16 bits. Bytes are those that programs ask for, as
if no cache helped; own blocks are left out, all orders do the same for them.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """Hold the counts of one loop order.

    Attributes:
        scores: products of a query and a key that are computed.
        keys: rows of k that are fetched, and of v as many.
        bytes: all that is fetched and written.
    """

    scores: int
    keys: int
    bytes: int

    def seconds(self, matmul, copy, D=128):
        """Return the time at two ceilings, FLOP per second and bytes per second."""
        return max(4 * D * self.scores / matmul, self.bytes / copy)


def draw_choice(tokens, block_size, slots, alike=1, seed=0):
    """Draw past blocks at random for queries that have enough of them.

    Args:
        tokens: queries, and keys.
        block_size: keys of a block; divides tokens.
        slots: past blocks of a query.
        alike: neighbours that choose the same blocks; divides block_size.
        seed: of the draw.

    Returns:
        (tokens, slots) block ids, different and ascending in a row; rows with fewer
        than `slots` past blocks are all -1.

    Example:
        >>> draw_choice(8, block_size=2, slots=2, alike=2).tolist()[3:]
        [[-1, -1], [0, 1], [0, 1], [1, 2], [1, 2]]
    """
    rng = np.random.default_rng(seed)
    past = np.arange(0, tokens, alike) // block_size
    room = np.maximum(past - slots + 1, 1)[:, None]
    picks = np.sort((rng.random((len(past), slots)) * room).astype(int), axis=1)
    picks = np.where((past >= slots)[:, None], picks + np.arange(slots), -1)
    return picks.repeat(alike, axis=0)


def union_of_blocks(chosen, block_size, rows=64, D=128):
    """Outer loop over query tiles: each reads all blocks that one of its queries chose.

    Scores that nobody chose are masked.
    """
    tile = np.arange(len(chosen))[:, None] // rows
    n_blocks = chosen.max() + 1
    read = np.unique((tile * n_blocks + chosen)[chosen >= 0])
    keys = len(read) * block_size
    return Schedule(keys * rows, keys, 4 * D * keys + 4 * D * len(chosen))


def walk_of_blocks(chosen, block_size, rows=1024, step=64, D=128):
    """Outer loop over large query tiles that walk all blocks, as in FlashMoBA.

    For every block the tile gathers those of its queries that chose it, `step` at a
    time, and their sums so far in float32, which are written back (arXiv 2511.11571).
    """
    tile = np.arange(len(chosen))[:, None] // rows
    n_blocks = chosen.max() + 1
    listed = np.bincount((tile * n_blocks + chosen)[chosen >= 0])
    steps = (-(-listed // step)).sum()
    keys = steps * block_size
    return Schedule(keys * step, keys, 4 * D * keys + (2 + 8) * D * listed.sum())


def blocks_outer(chosen, block_size, pairs=1024, step=64, D=128):
    """Outer loop over key blocks: each gathers the queries that chose it, as here.

    A program takes up to `pairs` of them, `step` at a time, for one read of the block.
    Partial results are written in 16 bits with their lse, and read again to be merged.
    """
    listed = np.bincount(chosen[chosen >= 0])
    keys = (-(-listed // pairs)).sum() * block_size
    scores = (-(-listed // step)).sum() * step * block_size
    return Schedule(scores, keys, 4 * D * keys + (6 * D + 8) * listed.sum())

"""Turn the choice around: from the blocks of a query to the queries of a block."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Routing:
    """List, for every head and block, the queries that chose it as a past block.

    The list of head h and block n is entry h * N + n. Entry e owns the pairs
    range(cu_pairs[e], cu_pairs[e + 1]).

    Attributes:
        query: (P,) the query of every pair, ascending inside a list.
        slot: (P,) the column of `selected` in which the query named the block.
        cu_pairs: (H*N+1,) first pair of every list, then P.
    """

    query: np.ndarray
    slot: np.ndarray
    cu_pairs: np.ndarray

    @property
    def entry(self):
        """The list of every pair, (P,): head * N + block."""
        return np.repeat(np.arange(len(self.cu_pairs) - 1), np.diff(self.cu_pairs))


def route(selected, blocks):
    """Sort the routed pairs by head, block and query.

    Paper: section 2.3, "arrange"; Algorithm 1, lines 9-11.

    Args:
        selected: (S, H, topk) integers from `select_blocks`. The current block, in the
            last column, is not routed: its queries are already next to each other.
        blocks: Blocks.

    Returns:
        Routing.

    Example: block 0 was chosen by queries 2, 4 and 5, block 1 by query 5.
        >>> from moba_ref.blocks import partition
        >>> rows = [[-1, -1, 0], [-1, -1, 0], [0, -1, 1], [-1, -1, 1]]
        >>> rows += [[0, -1, 2], [0, 1, 2]]
        >>> routing = route(np.array(rows)[:, None], partition([0, 6], block_size=2))
        >>> routing.query, routing.cu_pairs
        (array([2, 4, 5, 5]), array([0, 3, 4, 4]))
    """
    lists = [[] for _ in range(selected.shape[1] * len(blocks.start))]
    for i, heads in enumerate(selected):
        for h, row in enumerate(heads):
            for slot, block in enumerate(row[:-1]):
                if block >= 0:
                    lists[h * len(blocks.start) + block].append((i, slot))
    pairs = np.array([pair for entry in lists for pair in entry], dtype=int)
    pairs = pairs.reshape(-1, 2)
    cu_pairs = np.cumsum([0] + [len(entry) for entry in lists])
    return Routing(query=pairs[:, 0], slot=pairs[:, 1], cu_pairs=cu_pairs)

"""Say where every partial attention of one head stands, step after step."""

from dataclasses import dataclass

import numpy as np

from moba_lab.viz.layout import layout
from moba_lab.viz.load import pair_lists
from moba_lab.viz.merge import block_weights


@dataclass(frozen=True)
class Parts:
    """Hold the M partial attentions of one head, block after block.

    In a block the queries that stand in it come first, then those that chose it.

    Attributes:
        query: (M,) query of every part.
        block: (M,) key block that the part reads, ascending.
        place: (M,) place of the part among those of its block.
        own: (M,) bool, True where the block is the query's current one.
        share: (M,) weight in the query's softmax, exp(lse of the part - merged lse).
        left: (M,) weights of the query's parts in lower blocks, added up.
    """

    query: np.ndarray
    block: np.ndarray
    place: np.ndarray
    own: np.ndarray
    share: np.ndarray
    left: np.ndarray


def pipeline_parts(routing, lse_current, lse_past, blocks, head=0):
    """Follow the partial attentions of one head from their lists to their queries.

    Args:
        routing: Routing.
        lse_current: (S, H) from `attend_current`.
        lse_past: (P,) from `attend_past`.
        blocks: Blocks.
        head: which head.

    Returns:
        Parts, one for every query and one for every routed pair of the head.

    Raises:
        ValueError: if a shape does not fit blocks or routing.
        IndexError: if the head does not exist.

    Example: 4 tokens, blocks of 2; query 3 also reads block 0, with equal weight.
        >>> from moba_ref import partition, route
        >>> blocks = partition([0, 4], block_size=2)
        >>> selected = np.array([[[-1, 0]], [[-1, 0]], [[-1, 1]], [[0, 1]]])
        >>> routing = route(selected, blocks)
        >>> parts = pipeline_parts(routing, np.zeros((4, 1)), np.zeros(1), blocks)
        >>> parts.query.tolist(), parts.place.tolist(), parts.share.tolist()
        ([0, 1, 3, 2, 3], [0, 1, 2, 0, 1], [1.0, 1.0, 0.5, 1.0, 0.5])
    """
    weights = block_weights(lse_current, lse_past, routing, blocks, head)
    grid = layout(blocks)
    queries, offsets = pair_lists(routing, grid)
    offsets = offsets[head]
    query = np.concatenate([np.arange(grid.S), queries[offsets[0] : offsets[-1]]])
    listed = np.repeat(np.arange(grid.N), np.diff(offsets))
    block = np.concatenate([grid.of_query, listed])
    order = np.lexsort((query, np.arange(len(query)) >= grid.S, block))
    query, block = query[order], block[order]
    left = weights.cumsum(axis=1) - weights
    return Parts(
        query=query,
        block=block,
        place=np.arange(len(block)) - np.searchsorted(block, block),
        own=order < grid.S,
        share=weights[query, block],
        left=left[query, block],
    )

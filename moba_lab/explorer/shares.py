"""Say how the attention of one query divides over blocks."""

import numpy as np

from moba_lab.viz.layout import array, layout


def block_shares(q, k, selected, blocks, query, head=0, softmax_scale=None):
    """Return the share of every block in the attention of one query of one head.

    Paper: Eq. 2, softmax(q K[I]^T), its weights added up block by block.

    Args:
        q: (S, H, D) queries.
        k: (SK, HK, D) keys; HK divides H.
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.
        query: which query.
        head: which query head.
        softmax_scale: factor on the scores. None: D ** -0.5.

    Returns:
        (N,) float64 that adds up to 1; blocks that are not read have 0.

    Example: the third of 4 equal keys reads two of block 0 and one of its own.
        >>> from moba_ref.blocks import partition
        >>> x, selected = np.zeros((4, 1, 1)), np.array([[[0, 1]]] * 4)
        >>> block_shares(x, x, selected, partition([0, 4], 2), query=2)
        array([0.66666667, 0.33333333])
    """
    grid, ratio = layout(blocks), q.shape[1] // k.shape[1]
    one, keys = array(q[query, head]), array(k[:, head // ratio])
    reads = np.isin(grid.of_token, array(selected[query, head]))
    reads &= np.arange(grid.SK) <= grid.position[query]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    logits = keys[reads] @ one * scale
    weights = np.exp(logits - logits.max())
    shares = np.bincount(grid.of_token[reads], weights, minlength=grid.N)
    return shares / weights.sum()

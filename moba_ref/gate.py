"""Choose the blocks that every query reads."""

import numpy as np
from einops import repeat


def pool_keys(k, blocks):
    """Average the keys of every block.

    Paper: Eq. 6, mean_pool(K[I_i]).

    Args:
        k: (SK, HK, D) keys.
        blocks: Blocks.

    Returns:
        k_mean: (N, HK, D).

    Example: blocks of 2 tokens over 3 tokens, the last block is short.
        >>> from moba_ref.blocks import partition
        >>> k = np.array([[[1.0, 0.0]], [[3.0, 0.0]], [[0.0, 5.0]]])
        >>> pool_keys(k, partition([0, 3], block_size=2))[:, 0]
        array([[2., 0.],
               [0., 5.]])
    """
    k_mean = np.zeros((len(blocks.start), *k.shape[1:]))
    for n, (start, end) in enumerate(zip(blocks.start, blocks.end, strict=True)):
        k_mean[n] = k[start:end].mean(axis=0)
    return k_mean


def gate_scores(q, k_mean, blocks):
    """Score every block for every query, with the causal rules as infinities.

    Paper: Eq. 6 for past blocks; section 2.2 for the two causal rules: no future
    block (-inf), always the current block (+inf). Blocks of other sequences are -inf.

    Args:
        q: (S, H, D) queries.
        k_mean: (N, HK, D) block means.
        blocks: Blocks.

    Returns:
        scores: (S, H, N) float64.

    Example: the last of 6 tokens scores two past blocks.
        >>> from moba_ref.blocks import partition
        >>> k_mean = np.array([[[1.0]], [[-1.0]], [[9.0]]])
        >>> gate_scores(np.full((6, 1, 1), 2.0), k_mean, partition([0, 6], 2))[5, 0]
        array([ 2., -2., inf])
    """
    k_mean = repeat(k_mean, "n hk d -> n (hk g) d", g=q.shape[1] // k_mean.shape[1])
    scores = np.full((len(q), q.shape[1], len(k_mean)), -np.inf)
    for i in range(len(q)):
        first, current = blocks.first_of_query[i], blocks.of_query[i]
        for h in range(q.shape[1]):
            # A matrix product may round equal rows differently; a sum per row cannot.
            scores[i, h, first:current] = (k_mean[first:current, h] * q[i, h]).sum(-1)
        scores[i, :, current] = np.inf
    return scores


def select_blocks(q, k_mean, blocks, topk):
    """Choose the topk best blocks of every query, its current block among them.

    Paper: Eq. 5 and footnote 3. Ties go to the lower block id.

    Args:
        q: (S, H, D) queries.
        k_mean: (N, HK, D) block means.
        blocks: Blocks.
        topk: blocks per query, at least 1.

    Returns:
        selected: (S, H, topk) int32. Column -1 is the current block; the columns
        before it are past blocks in ascending order, then -1 where there are fewer.

    Example: topk=2 is the current block and the better one of the past blocks.
        >>> from moba_ref.blocks import partition
        >>> k_mean = np.array([[[1.0]], [[-1.0]], [[9.0]]])
        >>> q, blocks = np.full((6, 1, 1), 2.0), partition([0, 6], block_size=2)
        >>> select_blocks(q, k_mean, blocks, topk=2)[:, 0]
        array([[-1,  0],
               [-1,  0],
               [ 0,  1],
               [ 0,  1],
               [ 0,  2],
               [ 0,  2]], dtype=int32)
    """
    scores = gate_scores(q, k_mean, blocks)
    selected = np.full((*q.shape[:2], topk), -1, dtype=np.int32)
    for i in range(len(q)):
        for h in range(q.shape[1]):
            best = np.argsort(-scores[i, h], kind="stable")[:topk]
            *past, current = sorted(n for n in best if scores[i, h, n] > -np.inf)
            selected[i, h, : len(past)] = past
            selected[i, h, -1] = current
    return selected

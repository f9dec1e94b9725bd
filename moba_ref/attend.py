"""Attend to one block at a time, and keep the log-sum-exp of every part."""

from itertools import pairwise

import numpy as np


def softmax_attention(q, k, v, mask, softmax_scale):
    """Attend densely under a mask and return the log-sum-exp beside the output.

    Paper: Eq. 1, with the normaliser that online softmax needs.

    Args:
        q: (M, D) queries.
        k: (L, D) keys.
        v: (L, D) values.
        mask: (M, L) bool, True where a query may read a key; at least one per row.
        softmax_scale: factor on the scores.

    Returns:
        out: (M, D).
        lse: (M,) log of the sum of exp(score) over the keys read.

    Example: two keys with the same score.
        >>> one = np.ones((1, 1))
        >>> softmax_attention(one, np.ones((2, 1)), np.array([[1.], [3.]]), one > 0, 1.)
        (array([[2.]]), array([1.69314718]))
    """
    scores = np.where(mask, q @ k.T * softmax_scale, -np.inf)
    largest = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(axis=1, keepdims=True)
    return weights @ v / total, (largest + np.log(total))[:, 0]


def attend_current(q, k, v, blocks, softmax_scale):
    """Attend from every query to the keys of its own block up to its own position.

    Paper: section 2.2, "current block attention"; Algorithm 1, line 12.

    Args:
        q: (S, H, D) queries.
        k: (SK, HK, D) keys.
        v: (SK, HK, D) values.
        blocks: Blocks.
        softmax_scale: factor on the scores.

    Returns:
        out: (S, H, D).
        lse: (S, H).

    Example: the first token of a block reads only itself.
        >>> from moba_ref.blocks import partition
        >>> v = np.array([[[1.0]], [[3.0]], [[5.0]]])
        >>> q = k = np.zeros((3, 1, 1))
        >>> attend_current(q, k, v, partition([0, 3], block_size=2), 1.0)[0].ravel()
        array([1., 2., 5.])
    """
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:2])
    ratio = q.shape[1] // k.shape[1]
    for n, (start, end) in enumerate(zip(blocks.start, blocks.end, strict=True)):
        queries = np.flatnonzero(blocks.of_query == n)
        if len(queries) == 0:
            continue
        causal = np.arange(start, end) <= blocks.position[queries, None]
        for h in range(q.shape[1]):
            out[queries, h], lse[queries, h] = softmax_attention(
                q[queries, h],
                k[start:end, h // ratio],
                v[start:end, h // ratio],
                causal,
                softmax_scale,
            )
    return out, lse


def attend_past(q, k, v, routing, blocks, softmax_scale):
    """Attend from the queries of every list to all keys of the list's block.

    Paper: Algorithm 1, lines 13-14. Past blocks are complete, so no mask is needed.

    Args:
        q: (S, H, D) queries.
        k: (SK, HK, D) keys.
        v: (SK, HK, D) values.
        routing: Routing.
        blocks: Blocks.
        softmax_scale: factor on the scores.

    Returns:
        out: (P, D) one partial output per pair.
        lse: (P,).

    Example: query 2 chose block 0 and gets the mean of its values.
        >>> from moba_ref.blocks import partition
        >>> from moba_ref.route import route
        >>> blocks = partition([0, 3], block_size=2)
        >>> routing = route(np.array([[[-1, 0]], [[-1, 0]], [[0, 1]]]), blocks)
        >>> q, v = np.zeros((3, 1, 1)), np.array([[[1.0]], [[3.0]], [[5.0]]])
        >>> attend_past(q, q, v, routing, blocks, 1.0)
        (array([[2.]]), array([0.69314718]))
    """
    out, lse = np.zeros((len(routing.query), q.shape[2])), np.zeros(len(routing.query))
    ratio = q.shape[1] // k.shape[1]
    for entry, (a, b) in enumerate(pairwise(routing.cu_pairs)):
        if a == b:
            continue
        h, n = divmod(entry, len(blocks.start))
        tokens = slice(blocks.start[n], blocks.end[n])
        keys, values = k[tokens, h // ratio], v[tokens, h // ratio]
        every_key = np.ones((b - a, len(keys)), dtype=bool)
        out[a:b], lse[a:b] = softmax_attention(
            q[routing.query[a:b], h], keys, values, every_key, softmax_scale
        )
    return out, lse

"""Differentiate the attention over the chosen blocks."""

import numpy as np

from moba_ref.route import route


def moba_attention_backward(dout, q, k, v, out, lse, selected, blocks, softmax_scale):
    """Compute the gradients of q, k and v; the choice of blocks has none.

    Paper: implied by Eq. 2. With the merged out and lse of the forward pass, every
    block's part is the backward of FlashAttention-2 (arXiv 2307.08691, Algorithm 2):
    the weights are exp(score - lse) whichever block a key stands in.

    Args:
        dout: (S, H, D) gradient of out.
        q: (S, H, D) queries.
        k: (SK, HK, D) keys.
        v: (SK, HK, D) values.
        out: (S, H, D) merged output.
        lse: (S, H) merged log-sum-exp.
        selected: (S, H, topk) block ids.
        blocks: Blocks.
        softmax_scale: factor on the scores.

    Returns:
        dq: (S, H, D).
        dk: (SK, HK, D).
        dv: (SK, HK, D).

    Example: one query that reads one key has weight 1, so dv is dout.
        >>> from moba_ref.blocks import partition
        >>> one = np.ones((1, 1, 1))
        >>> lse, selected = one[..., 0], np.zeros((1, 1, 1), dtype=int)
        >>> dq, dk, dv = moba_attention_backward(
        ...     3 * one, one, one, one, one, lse, selected, partition([0, 1], 1), 1.0)
        >>> dq.item(), dk.item(), dv.item()
        (0.0, 0.0, 3.0)
    """
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    delta = (dout * out).sum(axis=-1)
    routing = route(selected, blocks)
    n_blocks, ratio = len(blocks.start), q.shape[1] // k.shape[1]
    for entry in range(q.shape[1] * n_blocks):
        h, n = divmod(entry, n_blocks)
        pairs = slice(routing.cu_pairs[entry], routing.cu_pairs[entry + 1])
        own = np.flatnonzero(blocks.of_query == n)
        rows = np.concatenate([own, routing.query[pairs]])
        keys = np.arange(blocks.start[n], blocks.end[n])
        # Past queries stand after every key of the block: the mask only cuts `own`.
        mask = keys <= blocks.position[rows, None]
        scores = q[rows, h] @ k[keys, h // ratio].T * softmax_scale
        weights = np.where(mask, np.exp(scores - lse[rows, h, None]), 0.0)
        dweights = dout[rows, h] @ v[keys, h // ratio].T
        dscores = weights * (dweights - delta[rows, h, None]) * softmax_scale
        dq[rows, h] += dscores @ k[keys, h // ratio]
        dk[keys, h // ratio] += dscores.T @ q[rows, h]
        dv[keys, h // ratio] += weights.T @ dout[rows, h]
    return dq, dk, dv

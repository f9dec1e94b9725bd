"""The definition of MoBA, written from the equations and from nothing else.

This is the oracle for the pipeline: it shares no function with the other files.
"""

import numpy as np


def token_mask(q, k, *, block_size, topk, cu_seqlens=None, cu_seqlens_k=None):
    """Mark the keys that every query reads.

    Paper: Eq. 2-6 and the two causal rules of section 2.2.

    Args:
        q: (S, H, D) queries.
        k: (SK, HK, D) keys.
        block_size: tokens per block.
        topk: blocks per query, the current one included.
        cu_seqlens: (B+1,) offsets of the queries. None: one sequence.
        cu_seqlens_k: (B+1,) offsets of the keys. None: as `cu_seqlens`.

    Returns:
        mask: (S, H, SK) bool.

    Example: four tokens, two blocks, topk=1: nobody leaves their own block.
        >>> x = np.ones((4, 1, 1))
        >>> token_mask(x, x, block_size=2, topk=1)[:, 0].astype(int)
        array([[1, 0, 0, 0],
               [1, 1, 0, 0],
               [0, 0, 1, 0],
               [0, 0, 1, 1]])
    """
    cu_q = [0, len(q)] if cu_seqlens is None else cu_seqlens
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k
    mask = np.zeros((len(q), q.shape[1], len(k)), dtype=bool)
    for b in range(len(cu_q) - 1):
        for i in range(cu_q[b], cu_q[b + 1]):
            position = cu_k[b + 1] - cu_q[b + 1] + i - cu_k[b]
            for h in range(q.shape[1]):
                keys = k[cu_k[b] : cu_k[b + 1], h * k.shape[1] // q.shape[1]]
                reads = read_positions(q[i, h], keys, position, block_size, topk)
                mask[i, h, cu_k[b] + reads] = True
    return mask


def read_positions(q, keys, position, block_size, topk):
    """List the positions I of Eq. 2 for one query of one sequence."""
    # Rule 1: only blocks that lie wholly before the query compete.
    past = range(position // block_size)
    means = [keys[n * block_size : (n + 1) * block_size].mean(0) for n in past]
    affinity = [(q * mean).sum() for mean in means]
    best = sorted(past, key=lambda n: (-affinity[n], n))[: topk - 1]
    # Rule 2: the current block always, up to the query itself.
    union = [range(n * block_size, (n + 1) * block_size) for n in best]
    union.append(range(position // block_size * block_size, position + 1))
    return np.concatenate(union)


def moba_attention_definition(
    q,
    k,
    v,
    *,
    block_size,
    topk,
    cu_seqlens=None,
    cu_seqlens_k=None,
    softmax_scale=None,
    return_aux=False,
):
    """Attend densely under `token_mask`.

    Paper: Eq. 2, softmax(q K[I]^T) V[I].

    Args:
        q: (S, H, D) queries.
        k: (SK, HK, D) keys.
        v: (SK, HK, D) values.
        block_size: tokens per block.
        topk: blocks per query, the current one included.
        cu_seqlens: (B+1,) offsets of the queries. None: one sequence.
        cu_seqlens_k: (B+1,) offsets of the keys. None: as `cu_seqlens`.
        softmax_scale: factor on the scores. None: D ** -0.5.
        return_aux: also return lse.

    Returns:
        out: (S, H, D) float64; with return_aux also lse (S, H).

    Example:
        >>> x, v = np.zeros((4, 1, 1)), np.arange(4.0)[:, None, None]
        >>> moba_attention_definition(x, x, v, block_size=2, topk=1).ravel()
        array([0. , 0.5, 2. , 2.5])
    """
    where = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    mask = token_mask(q, k, block_size=block_size, topk=topk, **where)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:2])
    for i, h in np.ndindex(q.shape[:2]):
        reads, head = mask[i, h], h * k.shape[1] // q.shape[1]
        scores = k[reads, head] @ q[i, h] * scale
        exponentials = np.exp(scores - scores.max())
        out[i, h] = exponentials @ v[reads, head] / exponentials.sum()
        lse[i, h] = scores.max() + np.log(exponentials.sum())
    return (out, lse) if return_aux else out

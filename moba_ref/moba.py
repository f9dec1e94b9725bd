"""Mixture of Block Attention: the four steps in a row."""

import numpy as np

from moba_ref.attend import attend_current, attend_past
from moba_ref.blocks import partition
from moba_ref.combine import combine
from moba_ref.gate import pool_keys, select_blocks
from moba_ref.route import route


def moba_attention(
    q,
    k,
    v,
    *,
    block_size,
    topk,
    cu_seqlens=None,
    cu_seqlens_k=None,
    softmax_scale=None,
    selected=None,
    return_aux=False,
):
    """Attend from every query to its own block and its topk - 1 best past blocks.

    Paper: Algorithm 1.

    Args:
        q: (S, H, D) queries.
        k: (SK, HK, D) keys; HK divides H.
        v: (SK, HK, D) values.
        block_size: tokens per block, at least 1.
        topk: blocks per query, the current one included, at least 1.
        cu_seqlens: (B+1,) offsets of the queries, `cu_seqlens_q` of `partition`, whose
            `cu_seqlens` are those of the keys. None: one sequence.
        cu_seqlens_k: (B+1,) offsets of the keys, where sequences have more keys than
            queries; the queries are the last tokens. None: as `cu_seqlens`.
        softmax_scale: factor on the scores. None: D ** -0.5.
        selected: (S, H, topk) block ids that replace the gate's choice.
        return_aux: also return lse and selected.

    Returns:
        out: (S, H, D) float64; with return_aux also lse (S, H) and selected
        (S, H, topk).

    Raises:
        ValueError: if shapes or offsets do not fit together, block_size or topk is
            less than 1, or selected could not have come from `select_blocks`.

    Example: with topk=1 every query reads its own block only.
        >>> q = k = np.zeros((4, 1, 1))
        >>> v = np.arange(4.0)[:, None, None]
        >>> moba_attention(q, k, v, block_size=2, topk=1).ravel()
        array([0. , 0.5, 2. , 2.5])
        >>> moba_attention(q, k, v, block_size=2, topk=2).ravel()
        array([0. , 0.5, 1. , 1.5])
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    check_shapes(q, k, v, topk, selected)
    if cu_seqlens is None:
        cu_seqlens = [0, len(q)]
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    softmax_scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale

    blocks = partition(cu_seqlens_k, block_size, cu_seqlens)
    check_lengths(q, k, blocks)
    if selected is None:
        selected = select_blocks(q, pool_keys(k, blocks), blocks, topk)
    else:
        check_selected(selected, blocks)
    routing = route(selected, blocks)
    out_current, lse_current = attend_current(q, k, v, blocks, softmax_scale)
    out_past, lse_past = attend_past(q, k, v, routing, blocks, softmax_scale)
    out, lse = combine(out_current, lse_current, out_past, lse_past, routing)
    return (out, lse, selected) if return_aux else out


def check_shapes(q, k, v, topk, selected):
    """Raise ValueError unless q, k, v and selected fit together."""
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"expected q (S, H, D) and k, v (SK, HK, D) with the same D, "
            f"got {q.shape}, {k.shape} and {v.shape}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the {k.shape[1]} key/value heads must divide the {q.shape[1]} query heads"
        )
    if topk < 1:
        raise ValueError(f"topk counts the current block, so at least 1; got {topk}")
    if selected is not None and selected.shape != (*q.shape[:2], topk):
        raise ValueError(
            f"selected must be (S, H, topk) = {(*q.shape[:2], topk)}, "
            f"got {selected.shape}"
        )


def check_lengths(q, k, blocks):
    """Raise ValueError unless the offsets end at the numbers of queries and keys."""
    if len(blocks.position) != len(q) or len(blocks.of_token) != len(k):
        raise ValueError(
            f"the offsets end at {len(blocks.position)} queries and "
            f"{len(blocks.of_token)} keys, but q has {len(q)} and k has {len(k)} tokens"
        )


def check_selected(selected, blocks):
    """Raise ValueError unless selected could have come from `select_blocks`."""
    for i, h in np.ndindex(selected.shape[:2]):
        *past, current = row = selected[i, h].tolist()
        readable = range(blocks.first_of_query[i], blocks.of_query[i])
        named = sorted({n for n in past if n in readable})
        expected = named + [-1] * (len(past) - len(named))
        if past != expected or current != readable.stop:
            raise ValueError(
                f"selected must hold past blocks of the query's own sequence in "
                f"ascending order, then -1, and the current block in its last column; "
                f"query {i}, head {h} stands in block {readable.stop}, may read the "
                f"past blocks {list(readable)[:9]}, and has {row}"
            )

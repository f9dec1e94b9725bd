"""Run the four steps by the Triton kernels of `moba_fast.kernels`.

`op` imports this module where a call runs them, so that moba_fast needs no Triton. The
heads that share keys stay together, and no tensor is copied to be in another order.
"""

import torch

from moba_fast.kernels.attend import attend_past
from moba_fast.kernels.backward import attention_backward
from moba_fast.kernels.combine import attend_current
from moba_fast.kernels.gate import select_blocks
from moba_fast.kernels.pool import pool_keys
from moba_fast.kernels.route import build_lists
from moba_fast.workspace import fused_parts, most_counters


def select(q, k, blocks, topk):
    """Step 1, assign: choose the blocks of every query, (S, H, topk) int32."""
    return select_blocks(q, pool_keys(k, blocks), blocks, topk)


def attend(q, k, v, selected, blocks, softmax_scale, limit):
    """Steps 2 to 4: arrange, attend and combine.

    Args:
        q: (S, H, D) queries.
        k: (SK, HK, D) keys.
        v: (SK, HK, D) values.
        selected: (S, H, topk) int32 block ids.
        blocks: Blocks.
        softmax_scale: positive factor on the scores.
        limit: what temporary tensors may take, in bytes.

    Returns:
        out: (S, H, D) in q's dtype.
        lse: (S, H) float32.
    """
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    counters = most_counters(limit)
    for part in fused_parts(q, k, blocks.block_size, selected.shape[2], limit):
        keys, values = some_of((k, v), (0, k.shape[0]), part.heads_k)
        for share in part.queries:
            some_q, chosen, *results = some_of(
                (q, selected, out, lse), share, part.heads
            )
            these = blocks.of_queries(*share)
            lists = build_lists(chosen, these, keys.shape[1], counters)
            inputs = some_q, keys, values
            # No name keeps the results of one share while the next one is computed.
            attend_current(
                *inputs,
                *attend_past(*inputs, lists, these, softmax_scale),
                *(chosen, these, softmax_scale, *results),
            )
    return out, lse


def some_of(tensors, share, heads):
    """Take the tokens from share[0] to share[1] - 1 and some heads of tensors.

    All of a tensor is the tensor itself, for the host needs time for every view.

    Args:
        tensors: tuple of tensors (tokens, heads, ...), alike in these two axes.
        share: first token, and one past the last.
        heads: slice.
    """
    whole = tensors[0].shape[:2]
    if (*share, heads.start, heads.stop) == (0, whole[0], 0, whole[1]):
        return tensors
    return [x[slice(*share), heads] for x in tensors]


def attend_backward(dout, q, k, v, out, lse, selected, blocks, softmax_scale, limit):
    """Differentiate `attend`; every sum is taken in a fixed order.

    Args:
        dout: (S, H, D) gradient of out.
        q: (S, H, D) queries.
        k: (SK, HK, D) keys.
        v: (SK, HK, D) values.
        out: (S, H, D) from `attend`.
        lse: (S, H) from `attend`.
        selected: (S, H, topk) int32 block ids.
        blocks: Blocks.
        softmax_scale: positive factor on the scores.
        limit: what temporary tensors may take, in bytes.

    Returns:
        dq, dk, dv: in the shapes and dtype of q, k, v.
    """
    results = [torch.empty_like(x) for x in (q, k, v)]
    inputs, counters = (dout, q, k, v, out, lse, selected), most_counters(limit)
    sizes = blocks.block_size, selected.shape[2], limit
    for part in fused_parts(q, k, *sizes, backward=True):
        differentiate_part(results, part, *inputs, blocks, softmax_scale, counters)
    return tuple(results)


def differentiate_part(
    results, part, dout, q, k, v, out, lse, selected, blocks, softmax_scale, counters
):
    """Differentiate with respect to some heads, one share of the queries at a time.

    What it holds is gone when it returns.
    """
    all_keys = (0, k.shape[0]), part.heads_k
    keys, values = some_of((k, v), *all_keys)
    dk, dv = k.new_zeros((2, *keys.shape), dtype=torch.float32).unbind()
    for share in part.queries:
        these = blocks.of_queries(*share)
        some_dout, some_q, some_out, some_lse, chosen, dq = some_of(
            (dout, q, out, lse, selected, results[0]), share, part.heads
        )
        attention_backward(
            *(some_dout, some_q, keys, values, some_out, some_lse, chosen),
            build_lists(chosen, these, keys.shape[1], counters),
            *(these, softmax_scale, dq, dk, dv),
            deterministic=True,
        )
    for result, gradient in zip(some_of(results[1:], *all_keys), (dk, dv), strict=True):
        result.copy_(gradient)

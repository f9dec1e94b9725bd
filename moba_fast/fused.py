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
        keys, values = k[:, part.heads_k], v[:, part.heads_k]
        for a, b in part.queries:
            some_q, chosen, *results = (
                x[a:b, part.heads] for x in (q, selected, out, lse)
            )
            these = blocks.of_queries(a, b)
            lists = build_lists(chosen, these, keys.shape[1], counters)
            inputs = some_q, keys, values
            # No name keeps the results of one share while the next one is computed.
            attend_current(
                *inputs,
                *attend_past(*inputs, lists, these, softmax_scale),
                *(chosen, these, softmax_scale, *results),
            )
    return out, lse


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
    keys, values = k[:, part.heads_k], v[:, part.heads_k]
    dk, dv = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for x in (keys, values)
    )
    for a, b in part.queries:
        these = blocks.of_queries(a, b)
        some_dout, some_q, some_out, some_lse, chosen, dq = (
            x[a:b, part.heads] for x in (dout, q, out, lse, selected, results[0])
        )
        attention_backward(
            *(some_dout, some_q, keys, values, some_out, some_lse, chosen),
            build_lists(chosen, these, keys.shape[1], counters),
            *(these, softmax_scale, dq, dk, dv, True),
        )
    results[1][:, part.heads_k], results[2][:, part.heads_k] = dk, dv

"""Mixture of Block Attention: the four steps in a row."""

import torch
from torch.autograd.function import once_differentiable

from moba_fast.attend import attend_current, attend_past
from moba_fast.backends import choose_backend
from moba_fast.backward import moba_attention_backward
from moba_fast.blocks import partition
from moba_fast.checks import (
    check_integer,
    check_offsets,
    check_queries_fit,
    check_selected,
    check_tensors,
)
from moba_fast.combine import combine
from moba_fast.gate import pool_keys, select_blocks
from moba_fast.route import route


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
    backend="auto",
    deterministic=False,
    return_aux=False,
):
    """Attend from every query to its own block and its topk - 1 best past blocks.

    Same contract as moba_ref.moba_attention, differentiable in q, k and v.

    Args:
        q: (S, H, D) queries: float64, float32, bfloat16 or float16.
        k: (SK, HK, D) keys; HK divides H.
        v: (SK, HK, D) values.
        block_size: tokens per block, at least 1.
        topk: blocks per query, the current one included, at least 1.
        cu_seqlens: (B+1,) int32 offsets of the sequences. None: one sequence.
        cu_seqlens_k: (B+1,) int32 offsets of the keys, where sequences have more keys
            than queries; the queries are the last tokens. None: as `cu_seqlens`.
        softmax_scale: factor on the scores. None: D ** -0.5.
        selected: (S, H, topk) int32 block ids that replace the gate's choice.
        backend: "auto" or a name from `backends()`.
        deterministic: ask for bit-identical results on every run. Backend "torch"
            always gives them.
        return_aux: also return lse and selected.

    Returns:
        out: (S, H, D) in q's dtype; with return_aux also lse (S, H), float32 or
        float64 for float64 inputs and without a gradient, and selected (S, H, topk)
        int32.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, offsets, block_size, topk, selected or backend are not
            as described; the message says what was expected and what came.

    Example: with topk=1 every query reads its own block only.
        >>> q = k = torch.zeros(4, 1, 1)
        >>> v = torch.arange(4.0)[:, None, None]
        >>> moba_attention(q, k, v, block_size=2, topk=1).ravel()
        tensor([0.0000, 0.5000, 2.0000, 2.5000])
    """
    check_tensors(q, k, v)
    check_integer(block_size, "block_size")
    check_integer(topk, "topk")
    choose_backend(backend)
    cu_q = check_offsets(cu_seqlens, "cu_seqlens", len(q), q.device)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_q
    cu_k = check_offsets(cu_seqlens_k, "cu_seqlens_k", len(k), q.device)
    check_queries_fit(cu_q, cu_k)
    softmax_scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale

    blocks = partition(cu_k, block_size, cu_q)
    if selected is None:
        with torch.no_grad():
            selected = select_blocks(q, pool_keys(k, blocks), blocks, topk)
    else:
        check_selected(selected, q, topk, blocks)
    out, lse = BlockAttention.apply(q, k, v, selected, blocks, softmax_scale)
    return (out, lse, selected) if return_aux else out


class BlockAttention(torch.autograd.Function):
    """Attend over chosen blocks, with the merged lse kept for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, selected, blocks, softmax_scale):
        """Arrange, attend and combine."""
        routing = route(selected, blocks)
        out_current, lse_current = attend_current(q, k, v, blocks, softmax_scale)
        out_past, lse_past = attend_past(q, k, v, routing, blocks, softmax_scale)
        out, lse = combine(out_current, lse_current, out_past, lse_past, routing)
        ctx.save_for_backward(q, k, v, out, lse, selected)
        ctx.blocks, ctx.softmax_scale = blocks, softmax_scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        """Differentiate with respect to q, k and v."""
        grads = moba_attention_backward(
            dout, *ctx.saved_tensors, ctx.blocks, ctx.softmax_scale
        )
        return *grads, None, None, None

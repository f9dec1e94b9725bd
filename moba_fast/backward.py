"""Differentiate the attention over the chosen blocks."""

import torch

from moba_fast import _flash
from moba_fast.attend import current_groups, head_groups, past_groups, share
from moba_fast.combine import by_slot
from moba_fast.gate import gate_dtype
from moba_fast.route import route


def moba_attention_backward(dout, q, k, v, out, lse, selected, blocks, softmax_scale):
    """Compute the gradients of q, k and v; the choice of blocks has none.

    Same contract as moba_ref.moba_attention_backward, with gradients in the dtype of
    the inputs. Every sum is taken in a fixed order, in float32 or better.

    Example: one query that reads one key has weight 1, so dv is dout.
        >>> from moba_fast.blocks import partition
        >>> one = torch.ones(1, 1, 1)
        >>> lse, selected = one[..., 0], torch.zeros(1, 1, 1, dtype=torch.int32)
        >>> dq, dk, dv = moba_attention_backward(
        ...     3 * one, one, one, one, one, lse, selected, partition([0, 1], 1), 1.0)
        >>> dq.item(), dk.item(), dv.item()
        (0.0, 0.0, 3.0)
    """
    merged = (dout, q, k, v, out, lse)
    current = backward_current(*merged, blocks, softmax_scale)
    past = backward_past(*merged, route(selected, blocks), blocks, softmax_scale)
    return tuple(
        (a + b).to(x.dtype) for a, b, x in zip(current, past, (q, k, v), strict=True)
    )


def backward_current(dout, q, k, v, out, lse, blocks, softmax_scale):
    """Differentiate the causal part inside every block."""
    dq, dk, dv = (torch.zeros_like(x, dtype=gate_dtype(x)) for x in (q, k, v))
    for group in current_groups(blocks):
        for hk, heads in head_groups(q, k):
            queries, keys = (group.queries, heads), (group.keys, hk)
            part = _flash.attention_backward(
                dout[queries].transpose(1, 2),
                q[queries].transpose(1, 2),
                share(k[keys], heads),
                share(v[keys], heads),
                out[queries].transpose(1, 2),
                lse[queries].transpose(1, 2),
                True,
                softmax_scale,
            )
            dq[queries] = part[0].transpose(1, 2).to(dq.dtype)
            dk[keys] = part[1].sum(1, dtype=dk.dtype)
            dv[keys] = part[2].sum(1, dtype=dv.dtype)
    return dq, dk, dv


def backward_past(dout, q, k, v, out, lse, routing, blocks, softmax_scale):
    """Differentiate the part that comes from past blocks.

    Gradients are kept per pair, and per query head, until all lists are done: so no
    two lists write to one place, and the sums have an order.
    """
    ratio, wide = q.shape[1] // k.shape[1], gate_dtype(q)
    if len(routing.query) == 0:
        return 0, 0, 0
    dq = q.new_empty(len(routing.query), q.shape[2], dtype=wide)
    dk = k.new_zeros(len(k), q.shape[1], k.shape[2], dtype=wide)
    dv = torch.zeros_like(dk)
    for group in past_groups(routing, blocks):
        head = group.head[:, None]
        rows, keys = (routing.query[group.pairs], head), (group.keys, head // ratio)
        lse_rows = lse[rows].masked_fill(~group.valid, torch.inf)
        operands = (dout[rows], q[rows], k[keys], v[keys], out[rows], lse_rows)
        part = _flash.attention_backward(
            *(x[:, None] for x in operands), False, softmax_scale
        )
        dq[group.pairs[group.valid]] = part[0][:, 0][group.valid].to(wide)
        dk[group.keys, head] = part[1][:, 0].to(wide)
        dv[group.keys, head] = part[2][:, 0].to(wide)
    dk, dv = (x.unflatten(1, (-1, ratio)).sum(2) for x in (dk, dv))
    return by_slot(dq, routing, q.shape[:2]).sum(2), dk, dv

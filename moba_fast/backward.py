"""Differentiate the attention over the chosen blocks."""

import torch

from moba_fast.attend import current_pack, gather_keys, gather_rows, past_lists
from moba_fast.combine import (
    add_rows,
    adds_in_one_pass,
    pairs_by_slot,
    pairs_of_rows,
    pick,
)
from moba_fast.gate import gate_dtype
from moba_fast.route import route
from moba_fast.varlen import attention_backward


def moba_attention_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    selected,
    blocks,
    softmax_scale,
    deterministic=True,
    kernel=None,
):
    """Compute the gradients of q, k and v; the choice of blocks has none.

    Same contract as moba_ref.moba_attention_backward, with gradients in the dtype of
    the inputs. With `deterministic` every sum is taken in a fixed order.

    Example: one query that reads one key has weight 1, so dv is dout.
        >>> import torch
        >>> from moba_fast.blocks import partition
        >>> one = torch.ones(1, 1, 1)
        >>> lse, selected = one[..., 0], torch.zeros(1, 1, 1, dtype=torch.int32)
        >>> dq, dk, dv = moba_attention_backward(
        ...     3 * one, one, one, one, one, lse, selected, partition([0, 1], 1), 1.0)
        >>> dq.item(), dk.item(), dv.item()
        (0.0, 0.0, 3.0)
    """
    merged, options = (dout, q, k, v, out, lse), (softmax_scale, deterministic, kernel)
    sums = [torch.zeros_like(x, dtype=gate_dtype(q)) for x in (k, v)]
    grads = torch.empty_like(q, dtype=gate_dtype(q)), *sums
    add_current(grads, *merged, blocks, *options)
    add_past(grads, *merged, route(selected, blocks), blocks, *options)
    return tuple(grad.to(q.dtype) for grad in grads)


def add_current(
    grads,
    dout,
    q,
    k,
    v,
    out,
    lse,
    blocks,
    softmax_scale,
    deterministic,
    kernel,
    first=0,
):
    """Write the causal part inside every block to dq and add it to dk and dv.

    `grads` are these three. Where q is a share of the queries, `first` is the one that
    it begins with.
    """
    keys, pack = current_pack(blocks, first, first + len(q))
    parts = attention_backward(
        *(dout, q, k[keys], v[keys], out, lse, pack, True, softmax_scale),
        *(deterministic, kernel),
    )
    grads[0].copy_(parts[0])
    for grad, part in zip(grads[1:], parts[1:], strict=True):
        grad[keys] += part


def add_past(
    grads,
    dout,
    q,
    k,
    v,
    out,
    lse,
    routing,
    blocks,
    softmax_scale,
    deterministic,
    kernel,
):
    """Add the part that comes from past blocks to [dq, dk, dv], in place.

    The gradient of a query is kept per pair until all lists are done, so that no two
    lists write to one place and the sum over a query's slots has an order.
    """
    if len(routing.query) == 0:
        return
    lists = past_lists(routing, blocks, q, k, kernel)
    rows = [gather_rows(x, lists) for x in (dout, q, out)]
    keys = gather_keys(k, lists), gather_keys(v, lists)
    lse_rows = lse.flatten().index_select(0, lists.rows)
    if lists.valid is not None:
        # Padding gets no weight, so it adds nothing to dk and dv.
        lse_rows = lse_rows.masked_fill(~lists.valid, torch.inf)
    dq, *sums = attention_backward(
        *(rows[0], rows[1], *keys, rows[2], lse_rows[:, None], lists.pack, False),
        *(softmax_scale, deterministic, kernel),
    )
    named = routing, q.shape[:2], lists.place_of_pairs()
    if adds_in_one_pass(dq, grads[0]):
        grads[0].add_(add_rows(dq[:, 0], pairs_of_rows(*named)).view(q.shape))
    else:
        for pair in pairs_by_slot(*named):
            grads[0].add_(pick(dq[:, 0], pair, q.shape[:2]))
    for grad, part in zip(grads[1:], sums, strict=True):
        by_head = grad.transpose(0, 1)
        if lists.keys is None:
            by_head += part.view(by_head.shape)
        else:
            token = lists.keys % len(k), lists.keys // len(k)
            grad[token] += part[:, 0].to(grad.dtype)

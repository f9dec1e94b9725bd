"""Register the steps as operators of PyTorch, so that torch.compile takes them whole.

Inside the operators sizes depend on data; outside, all shapes follow from the inputs.
"""

from functools import cache, wraps
from importlib import import_module

import torch
from torch import Tensor

from moba_fast import _flash
from moba_fast.attend import attend_current, attend_lists, past_lists
from moba_fast.backends import FUSED, kernel_of
from moba_fast.backward import add_current, add_past
from moba_fast.blocks import lay_out_once
from moba_fast.checks import (
    check_key_offsets,
    check_offsets,
    check_queries_fit,
    check_selected,
)
from moba_fast.combine import combine_lists
from moba_fast.gate import gate_dtype, pool_keys, select_blocks
from moba_fast.registration import operator, register_gradient
from moba_fast.route import route
from moba_fast.torch_kernels import COMPILED
from moba_fast.workspace import parts

# Modules of the kernels that have all four steps of their own.
PATHS = {FUSED: "moba_fast.fused", COMPILED: "moba_fast.compiled"}


def without_autocast(function):
    """Keep a surrounding torch.autocast from rounding scores and sums inside."""

    @wraps(function)
    def run(q, *args):
        if not torch.is_autocast_enabled(q.device.type):
            return function(q, *args)
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args)

    return run


@without_autocast
def run_select(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    topk: int,
    backend: str,
) -> Tensor:
    """Step 1, assign: choose the blocks of every query, (S, H, topk) int32."""
    kernel = kernel_of(backend, q)
    blocks = blocks_of(q, k, cu_seqlens, cu_seqlens_k, block_size)
    if kernel in PATHS:
        return path_of(kernel).select(q, k, blocks, topk)
    return select_blocks(q, pool_keys(k, blocks), blocks, topk)


def fake_select(q, k, cu_seqlens, cu_seqlens_k, block_size, topk, backend):
    """Return what `run_select` returns, without data."""
    return q.new_empty((*q.shape[:2], topk), dtype=torch.int32)


select = operator("select", run_select, fake_select)


@without_autocast
def run_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    softmax_scale: float,
    backend: str,
    deterministic: bool,
    workspace_bytes: int,
    check: bool,
) -> tuple[Tensor, Tensor]:
    """Steps 2 to 4: arrange, attend and combine; out (S, H, D) and lse (S, H)."""
    blocks = blocks_of(q, k, cu_seqlens, cu_seqlens_k, block_size)
    if check:
        check_selected(selected, blocks)
    kernel = kernel_of(backend, q)
    if kernel in PATHS:
        options = blocks, softmax_scale, workspace_bytes
        return path_of(kernel).attend(q, k, v, selected, *options)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=gate_dtype(q))
    inputs = q, k, v, selected, blocks, softmax_scale, kernel
    for part in parts(q, k, block_size, selected.shape[2], workspace_bytes):
        attend_part((out, lse), part, *inputs)
    return out, lse


def attend_part(results, part, q, k, v, selected, blocks, softmax_scale, kernel):
    """Attend from the queries of some heads, one share after the other.

    What it holds is gone when it returns, as is what `attend_share` holds.
    """
    keys, values = (heads_first(x[:, part.heads_k]) for x in (k, v))
    q, selected = q[:, part.heads], selected[:, part.heads]
    for share in part.queries:
        found = attend_share(
            q, keys, values, selected, blocks, share, softmax_scale, kernel
        )
        for result, x in zip(results, found, strict=True):
            result[slice(*share), part.heads] = x


def attend_share(q, k, v, selected, blocks, share, softmax_scale, kernel):
    """Take steps 2 to 4 for the queries from share[0] to share[1] - 1."""
    a, b = share
    tensors, these = (q[a:b], k, v), blocks.of_queries(a, b)
    current = attend_current(*tensors, blocks, softmax_scale, kernel, a)
    routing = route(selected[a:b], these)
    lists = past_lists(routing, these, q, k, kernel)
    past = attend_lists(*tensors, lists, softmax_scale, kernel)
    return combine_lists(*current, *past, routing, lists.place_of_pairs())


def fake_attend(q, k, v, selected, *options):
    """Return what `run_attend` returns, without data."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=gate_dtype(q))


attend = operator("attend", run_attend, fake_attend)


@without_autocast
def run_attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    softmax_scale: float,
    backend: str,
    deterministic: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `attend`; dq, dk, dv in the shapes and dtype of q, k, v."""
    blocks = blocks_of(q, k, cu_seqlens, cu_seqlens_k, block_size)
    kernel = kernel_of(backend, q)
    if kernel == FUSED:
        return path_of(kernel).attend_backward(
            *(dout, q, k, v, out, lse, selected, blocks, softmax_scale),
            workspace_bytes,
        )
    if kernel == COMPILED:
        kernel = _flash.default_kernel(q)
    inputs = dout, q, k, v, out, lse, selected, blocks
    results = [torch.empty_like(x) for x in (q, k, v)]
    sizes = block_size, selected.shape[2], workspace_bytes
    for part in parts(q, k, *sizes, True, deterministic):
        differentiate_part(results, part, *inputs, softmax_scale, deterministic, kernel)
    return tuple(results)


def differentiate_part(
    results, part, dout, q, k, v, out, lse, selected, blocks, *options
):
    """Differentiate with respect to some heads, one share of the queries at a time.

    What it holds is gone when it returns.
    """
    keys, values = (heads_first(x[:, part.heads_k]) for x in (k, v))
    dk, dv = (torch.zeros_like(x, dtype=gate_dtype(q)) for x in (keys, values))
    for a, b in part.queries:
        some_dout, some_q, some_out, some_lse, chosen = (
            x[a:b, part.heads] for x in (dout, q, out, lse, selected)
        )
        tensors = some_dout, some_q, keys, values, some_out, some_lse
        grads = torch.empty_like(some_q, dtype=dk.dtype), dk, dv
        add_current(grads, *tensors, blocks, *options, a)
        these = blocks.of_queries(a, b)
        add_past(grads, *tensors, route(chosen, these), these, *options)
        results[0][a:b, part.heads] = grads[0]
    results[1][:, part.heads_k], results[2][:, part.heads_k] = dk, dv


def fake_attend_backward(dout, q, k, v, *rest):
    """Return what `run_attend_backward` returns, without data."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


attend_backward = operator("attend_backward", run_attend_backward, fake_attend_backward)


def keep(ctx, inputs, results):
    """Keep what `attend_backward` needs."""
    q, k, v, selected, *ctx.offsets = inputs[:6]
    ctx.options = inputs[6:11]
    ctx.save_for_backward(q, k, v, *results, selected)
    # No zeros are made for its gradient.
    ctx.mark_non_differentiable(results[1])
    ctx.set_materialize_grads(False)


def differentiate(ctx, dout, _):
    """Differentiate with respect to q, k and v; the lse has no gradient.

    There is a gradient or None for each of the twelve arguments of `attend`.
    """
    if dout is None:
        return (None,) * 12
    grads = attend_backward(dout, *ctx.saved_tensors, *ctx.offsets, *ctx.options)
    return *grads, *[None] * 9


def refuse(ctx, *grads):
    """Raise: there is no second derivative."""
    raise RuntimeError(
        "moba_fast::attend_backward cannot be differentiated: gradients of "
        "moba_attention have no gradients of their own"
    )


register_gradient(attend, keep, differentiate)
register_gradient(attend_backward, lambda *_: None, refuse)


@cache
def path_of(kernel):
    """Import the module of a kernel's path where it is taken; it may need Triton."""
    return import_module(PATHS[kernel])


def blocks_of(q, k, cu_seqlens, cu_seqlens_k, block_size):
    """Check the offsets and cut the sequences into blocks, on q's device."""
    n_queries, n_keys = q.shape[0], k.shape[0]
    if cu_seqlens is None and cu_seqlens_k is None and n_queries == n_keys:
        cu = (0, n_keys)
        return lay_out_once(cu, cu, block_size, q.device)
    cu_q = check_offsets(cu_seqlens, "cu_seqlens", n_queries)
    cu_k = check_key_offsets(cu_seqlens_k, cu_q, n_keys)
    check_queries_fit(cu_q, cu_k)
    offsets = (tuple(cu.tolist()) for cu in (cu_k, cu_q))
    return lay_out_once(*offsets, block_size, q.device)


def heads_first(x):
    """Copy x (S, H, D) so that the rows of one head lie in a row; same shape.

    On a GPU one head alone stays where it is: its kernels read rows at any distance.
    """
    if x.shape[1] == 1 and x.device.type == "cuda":
        return x
    return x.transpose(0, 1).contiguous().transpose(0, 1)

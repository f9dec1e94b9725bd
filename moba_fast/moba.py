"""Mixture of Block Attention: the four steps in a row."""

import torch

from moba_fast import op, workspace
from moba_fast.checks import (
    as_offsets,
    check_integer,
    check_selected_shape,
    check_tensors,
)


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
    workspace_bytes=workspace.DEFAULT,
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
        cu_seqlens: (B+1,) integers, offsets of the sequences. None: one sequence.
        cu_seqlens_k: (B+1,) integers, offsets of the keys, where sequences have more
            keys than queries; the queries are the last tokens. None: as `cu_seqlens`.
        softmax_scale: factor on the scores. None: D ** -0.5.
        selected: (S, H, topk) int32 block ids that replace the gate's choice.
        backend: "auto" or a name from `backends()`. "flash:aten", "torch:compiled",
            "torch:cpu" and the like name the kernel, too; for "flash" so does the
            environment variable MOBA_FAST_KERNEL.
        deterministic: ask for bit-identical gradients on every run. The forward pass
            and backend "torch" always give them.
        workspace_bytes: what temporary tensors may take by estimate, 2 GiB by
            default. A call that needs more goes through heads and queries in turn.
        return_aux: also return lse and selected.

    Returns:
        out: (S, H, D) in q's dtype; with return_aux also lse (S, H), float32 or
        float64 for float64 inputs and without a gradient, and selected (S, H, topk)
        int32.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, offsets, block_size, topk, selected or backend are not
            as described, or workspace_bytes is too small; the message says what was
            expected and what came.

    Example: with topk=1 every query reads its own block only.
        >>> q = k = torch.zeros(4, 1, 1)
        >>> v = torch.arange(4.0)[:, None, None]
        >>> moba_attention(q, k, v, block_size=2, topk=1).ravel()
        tensor([0.0000, 0.5000, 2.0000, 2.5000])
    """
    check_tensors(q, k, v)
    block_size = check_integer(block_size, "block_size")
    topk = check_integer(topk, "topk")
    workspace_bytes = check_integer(workspace_bytes, "workspace_bytes")
    if selected is not None:
        check_selected_shape(selected, q, topk)
    q, k, v = under_autocast(q, k, v)
    offsets = (
        as_offsets(cu_seqlens, "cu_seqlens"),
        as_offsets(cu_seqlens_k, "cu_seqlens_k"),
    )
    softmax_scale = (
        q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    )

    given = selected is not None
    if not given:
        sizes = block_size, topk, backend
        selected = op.select(q.detach(), k.detach(), *offsets, *sizes)
    # Kernels mask with -inf before they scale, so the sign of the factor goes to q.
    if softmax_scale <= 0:
        q, softmax_scale = q * (-1 if softmax_scale else 0), -softmax_scale or 1.0
    out, lse = op.attend(
        *(q, k, v, selected, *offsets, block_size, softmax_scale),
        *(backend, deterministic, workspace_bytes, given),
    )
    return (out, lse, selected) if return_aux else out


def under_autocast(q, k, v):
    """Cast to the dtype of a surrounding torch.autocast, as PyTorch's own does."""
    device = q.device.type
    if not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)

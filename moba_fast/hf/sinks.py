"""Add attention sinks to a result: logits that take weight and give no value."""

import torch

from moba_fast import op, workspace


def merge_sink(out, lse, s_aux):
    """Scale a result as if its softmax had had one more logit, without a gradient.

    Args:
        out: (..., H, D) result.
        lse: (..., H) its log-sum-exp.
        s_aux: (H,) logits, or None.

    Returns:
        out: (..., H, D).

    Example: a sink as heavy as all keys together takes half.
        >>> merge_sink(torch.ones(1, 1, 1), torch.zeros(1, 1), torch.zeros(1)).item()
        0.5
    """
    if s_aux is None:
        return out
    return out * (lse - s_aux).sigmoid()[..., None].to(out.dtype)


def attend_with_sink(
    q, k, v, s_aux, *, block_size, topk, cu_seqlens, cu_seqlens_k, softmax_scale
):
    """Attend as `moba_attention` does with a sink per head, differentiable in all four.

    Args:
        q: (S, H, D) queries.
        k: (SK, HK, D) keys.
        v: (SK, HK, D) values.
        s_aux: (H,) logits of the sinks.
        block_size: tokens per block.
        topk: blocks per query.
        cu_seqlens: as in `moba_attention`.
        cu_seqlens_k: as in `moba_attention`.
        softmax_scale: factor on the scores, above 0.

    Returns:
        out: (S, H, D).
        selected: (S, H, topk) int32.
    """
    offsets = [
        x if x is None else torch.as_tensor(x) for x in (cu_seqlens, cu_seqlens_k)
    ]
    selected = op.select(q.detach(), k.detach(), *offsets, block_size, topk, "auto")
    options = (*offsets, block_size, softmax_scale)
    out, lse = AttendWithLse.apply(q, k, v, selected, *options)
    return merge_sink(out, lse, s_aux), selected


class AttendWithLse(torch.autograd.Function):
    """Attend with a gradient through the log-sum-exp, too.

    The score of query i and key j has the gradient p_ij (dout_i . v_j - dout_i . out_i
    + dlse_i). `attend_backward` has the first two terms; one more element, dlse in
    dout, 1 in v and 0 in out, gives it the third.
    """

    @staticmethod
    def forward(ctx, q, k, v, selected, cu_q, cu_k, block_size, softmax_scale):
        """Attend; see `attend_with_sink`."""
        ctx.options = (cu_q, cu_k, block_size, softmax_scale, "auto", False)
        options = (*ctx.options, workspace.DEFAULT, False)
        out, lse = op.attend(q, k, v, selected, *options)
        ctx.save_for_backward(q, k, v, out, lse, selected)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        """Differentiate; see the class."""
        q, k, v, out, lse, selected = ctx.saved_tensors
        size = q.shape[2]
        last = [
            dlse[..., None].to(q.dtype),
            *(x.new_zeros(*x.shape[:2], 1) for x in (q, k)),
        ]
        dout, q, k = (
            torch.cat([x, e], -1) for x, e in zip((dout, q, k), last, strict=True)
        )
        v = torch.cat([v, v.new_ones(*v.shape[:2], 1)], -1)
        out = torch.cat([out, out.new_zeros(*out.shape[:2], 1)], -1)
        grads = op.attend_backward(
            dout, q, k, v, out, lse, selected, *ctx.options, workspace.DEFAULT
        )
        return *(x[..., :size] for x in grads), *[None] * 5

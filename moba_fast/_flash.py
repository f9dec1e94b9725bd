"""Attend to the keys of one block, for a batch of blocks, on whatever device.

The only file that calls PyTorch's private flash operators.
"""

import torch

aten = torch.ops.aten


def attention(q, k, v, causal, softmax_scale):
    """Attend and return the log-sum-exp, on a CPU by PyTorch's flash operator.

    Args:
        q: (batch, heads, M, D) queries; M, and batch and heads, at least 1.
        k: (batch, heads, L, D) keys; may be an expanded view.
        v: (batch, heads, L, D) values.
        causal: True where the queries stand at the last M keys and read no key behind
            theirs; False where they read all keys.
        softmax_scale: factor on the scores.

    Returns:
        out: (batch, heads, M, D) in q's dtype.
        lse: (batch, heads, M) float32, or float64 for float64 inputs.
    """
    if q.device.type == "cpu":
        q, k, v = map(with_adjacent_elements, (q, k, v))
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, **cpu_mask(q, k, causal), scale=softmax_scale
        )
    scores = masked_scores(q, k, causal, softmax_scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return (weights @ v.to(weights.dtype)).to(q.dtype), lse


def attention_backward(dout, q, k, v, out, lse, causal, softmax_scale):
    """Differentiate one part of an attention whose out and lse may be merged ones.

    Args:
        dout: (batch, heads, M, D) gradient of the merged output.
        q: (batch, heads, M, D) queries.
        k: (batch, heads, L, D) keys.
        v: (batch, heads, L, D) values.
        out: (batch, heads, M, D) merged output.
        lse: (batch, heads, M) merged log-sum-exp; +inf for a row that does not count.
        causal: as in `attention`.
        softmax_scale: factor on the scores.

    Returns:
        dq, dk, dv: this part's share, in the shapes of q, k and v.
    """
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(with_adjacent_elements, (dout, q, k, v, out)),
            lse,
            dropout_p=0.0,
            **cpu_mask(q, k, causal),
            scale=softmax_scale,
        )
    scores = masked_scores(q, k, causal, softmax_scale)
    weights = (scores - lse[..., None]).exp()
    wide = {"dtype": weights.dtype}
    dout, out = dout.to(**wide), out.to(**wide)
    dweights = dout @ v.to(**wide).transpose(-1, -2)
    delta = (dout * out).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta) * softmax_scale
    dq = dscores @ k.to(**wide)
    dk = dscores.transpose(-1, -2) @ q.to(**wide)
    return dq, dk, weights.transpose(-1, -2) @ dout


def with_adjacent_elements(x):
    """Return x with stride 1 in its last axis, which the CPU operator takes as given.

    It checks nothing and reads wrong memory otherwise.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def masked_scores(q, k, causal, softmax_scale):
    """Multiply queries and keys in float32 or better; -inf behind a query."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * softmax_scale
    return scores.masked_fill(behind(q, k), -torch.inf) if causal else scores


def cpu_mask(q, k, causal):
    """Return the CPU operator's arguments for a causal or a full attention.

    Its own causal mask puts the first query at the first key, so it serves only where
    there are as many queries as keys.
    """
    if not causal or q.shape[-2] == k.shape[-2]:
        return {"is_causal": causal}
    mask = q.new_zeros(q.shape[-2], k.shape[-2])
    return {"is_causal": False, "attn_mask": mask.masked_fill(behind(q, k), -torch.inf)}


def behind(q, k):
    """Mark the keys that stand behind each query, (M, L) bool."""
    m, n = q.shape[-2], k.shape[-2]
    return torch.ones(m, n, dtype=torch.bool, device=q.device).triu(n - m + 1)

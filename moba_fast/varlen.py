"""Attend within packed sequences, as FlashAttention's variable-length functions do."""

import torch
from torch.nn.functional import pad

from moba_fast._flash import GPU_KERNELS, KERNELS, default_kernel
from moba_fast._packs import Pack

# CUDA's limit for the grid axis over which these kernels spread sequences.
MOST_SEQUENCES = 65_535


def attention(q, k, v, pack, causal, softmax_scale, kernel=None):
    """Attend within every sequence of a pack.

    Args:
        q: (T, H, D) queries of all sequences in a row.
        k: (TK, HK, D) keys; HK divides H.
        v: (TK, HK, D) values.
        pack: Pack.
        causal: True where the queries of a sequence stand at its last keys and read no
            key after their own; False where they read all keys.
        softmax_scale: factor on the scores.
        kernel: name in KERNELS; None: the one of backend "torch" on q's device.

    Returns:
        out: (T, H, D) in q's dtype.
        lse: (T, H) float32, or float64 for float64 inputs.
    """
    kernel = kernel or default_kernel(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    # Kernels for GPUs refuse a launch without queries.
    size, parts = q.shape[-1], [(q[:0], q.new_empty(0, q.shape[1], dtype=wide))]
    for a, b, c, d, part in split(pack, kernel, q, k):
        if a == b:
            continue
        x = [
            fit_head(x, KERNELS[kernel].head_multiple) if kernel in GPU_KERNELS else x
            for x in (q[a:b], k[c:d], v[c:d])
        ]
        parts.append(KERNELS[kernel].forward(*x, part, causal, softmax_scale))
    parts = [(out[..., :size], lse) for out, lse in parts]
    if len(parts) == 2:
        return parts[1]
    out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return out, lse


def attention_backward(
    dout, q, k, v, out, lse, pack, causal, softmax_scale, deterministic, kernel=None
):
    """Differentiate a part of an attention whose out and lse may be merged ones.

    Args:
        dout: (T, H, D) gradient of the merged output.
        q: (T, H, D) queries.
        k: (TK, HK, D) keys.
        v: (TK, HK, D) values.
        out: (T, H, D) merged output.
        lse: (T, H) merged log-sum-exp.
        pack: Pack.
        causal: as in `attention`.
        softmax_scale: factor on the scores.
        deterministic: whether every sum must be taken in a fixed order.
        kernel: as in `attention`.

    Returns:
        dq, dk, dv: this part's share, in the shapes of q, k and v; zero for keys that
        no query reads.
    """
    kernel = kernel or default_kernel(q)
    size, parts = q.shape[-1], []
    for a, b, c, d, part in split(pack, kernel, q, k):
        if a == b:
            parts.append([torch.zeros_like(x) for x in (q[a:b], k[c:d], v[c:d])])
            continue
        x = dout[a:b], q[a:b], k[c:d], v[c:d], out[a:b]
        if kernel in GPU_KERNELS:
            x = [fit_head(x, KERNELS[kernel].head_multiple) for x in x]
        options = part, causal, softmax_scale, deterministic
        parts.append(KERNELS[kernel].backward(*x, lse[a:b], *options))
    if len(parts) == 1:
        return tuple(x[..., :size] for x in parts[0])
    return tuple(torch.cat(x)[..., :size] for x in zip(*parts, strict=True))


def split(pack, kernel, q, k):
    """Cut a pack into calls that the kernel's launch grid can take.

    Yields:
        a, b, c, d, pack: queries a to b - 1 and keys c to d - 1 with their own Pack.
    """
    count = len(pack.cu_q) - 1
    if kernel not in GPU_KERNELS or count <= MOST_SEQUENCES:
        yield 0, len(q), 0, len(k), pack
        return
    cuts = [*range(0, count, MOST_SEQUENCES), count]
    at = torch.stack([pack.cu_q[cuts], pack.cu_k[cuts]]).T.tolist()
    for i, j, (a, c), (b, d) in zip(cuts, cuts[1:], at, at[1:], strict=False):
        cu_q, cu_k = pack.cu_q[i : j + 1] - a, pack.cu_k[i : j + 1] - c
        # Rows that no sequence holds go with the last call.
        b, d = (len(q), len(k)) if j == count else (b, d)
        yield a, b, c, d, Pack(cu_q, cu_k, pack.max_q, pack.max_k)


def fit_head(x, multiple):
    """Give the rows adjacent elements, as many as `multiple` divides."""
    if x.shape[-1] % multiple:
        x = pad(x, (0, -x.shape[-1] % multiple))
    return x if x.stride(-1) == 1 else x.contiguous()

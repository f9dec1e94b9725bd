"""Attend to packed sequences in batches of one shape, for kernels that want batches."""

from dataclasses import dataclass

import torch

from moba_fast._packs import similar_runs, sizes_of

# Scores that plain_attention holds at once: 128 MiB of float32.
SCORES_AT_ONCE = 2**25


@dataclass(frozen=True)
class Batch:
    """Hold sequences that go through the kernel together.

    Attributes:
        queries: rows of the queries: a slice where they follow each other, otherwise
            (sequences, M); padding repeats a sequence's last query.
        keys: rows of the keys: a slice or (sequences, L).
        count: number of sequences.
        valid: (sequences, M) bool, False where a row is padding; None: all count.
    """

    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    count: int
    valid: torch.Tensor | None


def forward(kernel, q, k, v, pack, causal, softmax_scale):
    """Attend with a kernel that takes (batch, heads, M, D); see `_flash.attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    count = len(q) if pack.rows_q is None else len(pack.rows_q)
    out = q.new_empty(count, *q.shape[1:])
    lse = q.new_empty(out.shape[:2], dtype=wide)
    for batch in batches(pack, causal):
        for heads, kv in head_groups(q, k):
            rows = take(q[:, heads], batch.queries, batch.count, pack.rows_q)
            keys, values = (
                take(x[:, kv], batch.keys, batch.count, pack.rows_k).expand(
                    -1, rows.shape[1], -1, -1
                )
                for x in (k, v)
            )
            part = kernel(rows, keys, values, causal, softmax_scale)
            put(out[:, heads], batch.queries, part[0].transpose(1, 2), batch.valid)
            put(lse[:, heads], batch.queries, part[1].transpose(1, 2), batch.valid)
    return out, lse


def backward(kernel, dout, q, k, v, out, lse, pack, causal, softmax_scale):
    """Differentiate with such a kernel; see `_flash.attention_backward`.

    Returns:
        dq, dk, dv: float32 or better.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = q.new_empty(q.shape, dtype=wide)
    dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    for batch in batches(pack, causal):
        for heads, kv in head_groups(q, k):
            rows, drows, outs, sums = (
                take(x[:, heads], batch.queries, batch.count)
                for x in (q, dout, out, lse)
            )
            if batch.valid is not None:
                sums = sums.masked_fill(~batch.valid[:, None], torch.inf)
            keys, values = (
                take(x[:, kv], batch.keys, batch.count).expand(
                    -1, rows.shape[1], -1, -1
                )
                for x in (k, v)
            )
            part = kernel(drows, rows, keys, values, outs, sums, causal, softmax_scale)
            put(dq[:, heads], batch.queries, part[0].transpose(1, 2), batch.valid)
            for whole, each in zip((dk, dv), part[1:], strict=True):
                if keys.shape[1] != whole[:, kv].shape[1]:
                    each = each.sum(1, keepdim=True, dtype=wide)
                put(whole[:, kv], batch.keys, each.transpose(1, 2), None)
    return dq, dk, dv


def batches(pack, causal):
    """Group the sequences of a pack that have queries.

    Those of a batch have the same number of keys; of queries, too, under a causal mask
    and where the pack is even, otherwise about the same.

    Yields:
        Batch.
    """
    cu_q, cu_k, sizes = pack.cu_q.tolist(), pack.cu_k.tolist(), sizes_of(pack)
    for a, b in similar_runs([s[:2] for s in sizes], causal or pack.even):
        members = [i for _, _, i in sizes[a:b]]
        n, m = sizes[a][:2]
        together = members == list(range(members[0], members[0] + len(members)))
        even = sizes[b - 1][1] == m
        queries, valid = slice(cu_q[members[0]], cu_q[members[-1] + 1]), None
        if not (together and even):
            queries, valid = index_rows(pack.cu_q, members, m)
        keys = slice(cu_k[members[0]], cu_k[members[-1] + 1])
        if not together:
            keys, _ = index_rows(pack.cu_k, members, n)
        yield Batch(queries, keys, b - a, None if even else valid)


def index_rows(offsets, members, width):
    """List the rows of some sequences, the last one repeated up to a width.

    Returns:
        rows: (sequences, width) int64.
        valid: (sequences, width) bool.
    """
    members = torch.tensor(members, device=offsets.device)
    first, last = offsets[members].long()[:, None], offsets[members + 1].long()[:, None]
    rows = first + torch.arange(width, device=offsets.device)
    return rows.minimum(last - 1), rows < last


def take(x, places, count, rows=None):
    """Return rows of x (T, H, ...) as (sequences, H, M, ...).

    Args:
        x: (T, H, ...).
        places: a slice, or (sequences, M).
        count: number of sequences.
        rows: the row at every place; None: places are rows, and a slice is not copied.
    """
    if rows is not None:
        some = rows[places].flatten()
        x = x.index_select(0, some).unflatten(0, (count, -1))
    else:
        x = x[places]
        x = x.unflatten(0, (count, -1)) if isinstance(places, slice) else x
    return x.transpose(1, 2)


def put(x, rows, values, valid):
    """Write values (sequences, M, H, ...) to rows of x (T, H, ...), less padding."""
    if isinstance(rows, slice):
        x[rows] = values.flatten(0, 1)
    elif valid is None:
        x[rows] = values.to(x.dtype)
    else:
        x[rows[valid]] = values[valid].to(x.dtype)


def head_groups(q, k):
    """List which query heads go through the kernel with which key/value heads."""
    heads, ratio = q.shape[1], q.shape[1] // k.shape[1]
    if ratio == 1:
        return [(slice(0, heads), slice(0, heads))]
    starts = range(0, heads, ratio)
    return [(slice(h, h + ratio), slice(h // ratio, h // ratio + 1)) for h in starts]


def plain_attention(q, k, v, causal, softmax_scale):
    """Attend with matrix products, some queries at a time.

    Args:
        q: (batch, heads, M, D) queries; M, and batch and heads, at least 1.
        k: (batch, heads, L, D) keys; may be an expanded view.
        v: (batch, heads, L, D) values.
        causal: True where the queries stand at the last M keys and read no key after
            theirs; False where they read all keys.
        softmax_scale: factor on the scores.

    Returns:
        out: (batch, heads, M, D) in q's dtype.
        lse: (batch, heads, M) float32, or float64 for float64 inputs.
    """
    parts = []
    for rows, keys in chunks(q, k, causal):
        scores = masked_scores(q[..., rows, :], k[..., keys, :], causal, softmax_scale)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        parts.append((weights @ v[..., keys, :].to(weights.dtype), lse))
    out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out.to(q.dtype), lse


def plain_backward(dout, q, k, v, out, lse, causal, softmax_scale):
    """Differentiate `plain_attention`, whose out and lse may be merged ones.

    Args:
        dout: (batch, heads, M, D) gradient of the merged output.
        q: (batch, heads, M, D) queries.
        k: (batch, heads, L, D) keys.
        v: (batch, heads, L, D) values.
        out: (batch, heads, M, D) merged output.
        lse: (batch, heads, M) merged log-sum-exp; +inf for a row that does not count.
        causal: as in `plain_attention`.
        softmax_scale: factor on the scores.

    Returns:
        dq, dk, dv: in the shapes of q, k and v, float32 or better.
    """
    wide = {"dtype": lse.dtype}
    dq, dk, dv = (torch.zeros(x.shape, **wide, device=x.device) for x in (q, k, v))
    for rows, keys in chunks(q, k, causal):
        some_q, some_k = q[..., rows, :], k[..., keys, :]
        scores = masked_scores(some_q, some_k, causal, softmax_scale)
        weights = (scores - lse[..., rows, None]).exp()
        some_dout = dout[..., rows, :].to(**wide)
        delta = (some_dout * out[..., rows, :]).sum(-1, keepdim=True)
        dweights = some_dout @ v[..., keys, :].to(**wide).transpose(-1, -2)
        dscores = weights * (dweights - delta) * softmax_scale
        dq[..., rows, :] = dscores @ some_k.to(**wide)
        dk[..., keys, :] += dscores.transpose(-1, -2) @ some_q.to(**wide)
        dv[..., keys, :] += weights.transpose(-1, -2) @ some_dout
    return dq, dk, dv


def chunks(q, k, causal):
    """Yield slices of queries, with the keys that they read, of bounded size."""
    m, n = q.shape[-2], k.shape[-2]
    step = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * n))
    for a in range(0, m, step):
        b = min(m, a + step)
        yield slice(a, b), slice(0, n - m + b if causal else n)


def masked_scores(q, k, causal, softmax_scale):
    """Multiply queries and keys in float32 or better; -inf for keys after a query."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * softmax_scale
    return scores.masked_fill(after(q, k), -torch.inf) if causal else scores


def after(q, k):
    """Mark the keys that stand after each query, (M, L) bool."""
    m, n = q.shape[-2], k.shape[-2]
    return torch.ones(m, n, dtype=torch.bool, device=q.device).triu(n - m + 1)

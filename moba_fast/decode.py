"""Attend from single queries to the pages of a cache, reading only what they chose."""

import torch

from moba_fast import pages as paging
from moba_fast.combine import merge
from moba_fast.device import upload
from moba_fast.gate import gate_dtype, top_blocks


def choose_past(q, k_mean, pages, current, count):
    """Choose the count best past blocks of every query.

    The scores and the rule for ties are those of `select_blocks`. Every query has the
    blocks of its own sequence in its row, so that sequences of different lengths are
    scored in one call.

    Args:
        q: (R, H, D) queries.
        k_mean: (pages, HK, D) means of complete pages.
        pages: (R, n) first pages of each query's sequence; n is at least the current
            block of every query.
        current: (R,) block in which every query stands, counted in its sequence.
        count: blocks to choose, at most n.

    Returns:
        past: (R, H, count) int64 blocks, counted in their sequence, ascending, then -1
        where a query has fewer past blocks.

    Example: of three past blocks the first scores best, and then the last.
        >>> k_mean = torch.tensor([3.0, 1.0, 2.0])[:, None, None]
        >>> pages, current = torch.tensor([[0, 1, 2]]), torch.tensor([3])
        >>> choose_past(torch.ones(1, 1, 1), k_mean, pages, current, 2)
        tensor([[[0, 2]]])
    """
    past = torch.full((*q.shape[:2], count), -1, device=q.device)
    elements = pages.shape[1] * k_mean[:1].numel()
    for rows in row_slices(len(q) if count else 0, elements):
        past[rows] = choose_past_of_rows(
            q[rows], k_mean, pages[rows], current[rows], count
        )
    return past


def choose_past_of_rows(q, k_mean, pages, current, count):
    """Choose as `choose_past` does, for so many rows as fit into the workspace."""
    R, H, n = *q.shape[:2], pages.shape[1]
    block = torch.arange(n, device=q.device)
    readable = block < current[:, None]
    means = k_mean[pages.masked_fill(~readable, 0)]
    scores = score(q.to(means.dtype), means)
    scores = scores.masked_fill(~readable[:, None], -torch.inf)
    # Every sequence has its own means: to `top_blocks` a row is a head.
    q_norm = q.to(means.dtype).norm(dim=-1).view(1, R * H)
    # Means that are not written yet may hold anything.
    k_norm = means.norm(dim=-1).masked_fill(~readable[..., None], 0).transpose(1, 2)
    k_norm = k_norm.repeat_interleave(H // k_norm.shape[1], dim=1).reshape(R * H, n)
    past = top_blocks(scores.reshape(1, R * H, n), count, q_norm, k_norm)
    past = past.view(R, H, count)
    past = past.masked_fill(past >= current[:, None, None], n).sort(dim=-1).values
    return past.masked_fill(past == n, -1)


def attend_chosen(q, pool, pages, position, past, softmax_scale):
    """Attend from every query to its current page and to the past pages it chose.

    Args:
        q: (R, H, D) queries.
        pool: PagePool.
        pages: (R, n) pages of each query's sequence, its current page included.
        position: (R,) place of every query in its sequence.
        past: (R, H, count) past blocks, counted in their sequence; -1 is none.
        softmax_scale: factor on the scores.

    Returns:
        out: (R, H, D) in q's dtype.
        lse: (R, H), at least float32.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=gate_dtype(q))
    elements = (past.shape[2] * q.shape[1] + pool.k.shape[2]) * pool.k[0, :, 0].numel()
    for rows in row_slices(len(q), elements):
        out[rows], lse[rows] = attend_chosen_of_rows(
            q[rows], pool, pages[rows], position[rows], past[rows], softmax_scale
        )
    return out, lse


def attend_chosen_of_rows(q, pool, pages, position, past, softmax_scale):
    """Attend as `attend_chosen` does, for so many rows as fit into the workspace.

    The heads of a group share the current page; of the past pages each head reads its
    own choice and the one key/value head that belongs to it.
    """
    block_size, wide = pool.k.shape[1], q.to(gate_dtype(q))
    current = pages.gather(1, position[:, None] // block_size)[:, 0]
    chosen = pages.gather(1, past.clamp(min=0).flatten(1)).view(past.shape)
    head = torch.arange(q.shape[1], device=q.device)[:, None]
    head_k = head // (q.shape[1] // pool.k.shape[2])

    def read(pool_tensor):
        past_part = pool_tensor[chosen, :, head_k].to(wide.dtype).flatten(2, 3)
        return pool_tensor[current].to(wide.dtype), past_part

    offset = torch.arange(block_size, device=q.device)
    later = (offset > position[:, None] % block_size)[:, None]
    missing = (past < 0).repeat_interleave(block_size, dim=2)
    k_current, k_past = read(pool.k)
    on_past = torch.einsum("rhd,rhtd->rht", wide, k_past)
    scores = torch.cat([score(wide, k_current), on_past], dim=-1) * softmax_scale
    unread = torch.cat([later.expand(-1, q.shape[1], -1), missing], dim=-1)
    weights, lse = softmax(scores.masked_fill(unread, -torch.inf))
    v_current, v_past = read(pool.v)
    # What stands after a query has no weight, but NaN times zero is NaN.
    v_current.masked_fill_(later[:, 0, :, None, None], 0)
    v_past.masked_fill_(missing[..., None], 0)
    w_current, w_past = weights.split([block_size, missing.shape[2]], dim=-1)
    out = weigh(w_current, v_current) + torch.einsum("rht,rhtd->rhd", w_past, v_past)
    return out.to(q.dtype), lse


def attend_all(q, pool, pages, position, softmax_scale):
    """Attend from every query to all tokens of its sequence up to its own.

    Args:
        q: (R, H, D) queries.
        pool: PagePool.
        pages: (R, n) pages of each query's sequence.
        position: (R,) place of every query in its sequence, int64 on the host.
        softmax_scale: factor on the scores.

    Returns:
        out: (R, H, D) in q's dtype.
        lse: (R, H), at least float32.
    """
    wide = q.to(gate_dtype(q))
    out, lse = torch.zeros_like(wide), wide.new_full(q.shape[:2], -torch.inf)
    block_size, elements = pool.k.shape[1], pool.k[0].numel()
    # Longest sequences first: the rows that still have pages are the first ones.
    order = position.argsort(descending=True, stable=True)
    at, placed = upload(torch.stack([order, position[order]]), q.device)
    for rows in row_slices(len(q), elements):
        n_rows = rows.stop - rows.start
        columns = max(1, paging.ELEMENTS_PER_COPY // (n_rows * elements))
        for first in range(0, pages.shape[1], columns):
            reach = int((position >= first * block_size).sum())
            part = at[rows.start : min(rows.stop, reach)]
            if len(part) == 0:
                break
            last = placed[rows.start : rows.start + len(part)] - first * block_size
            some_pages = pages[part, first : first + columns]
            result = attend_pages(wide[part], pool, some_pages, last, softmax_scale)
            out[part], lse[part] = merge(out[part], lse[part], *result)
    return out.to(q.dtype), lse


def attend_pages(q, pool, pages, last, softmax_scale):
    """Attend from every query to the tokens 0 to last of the listed pages.

    Args:
        q: (R, H, D) queries, at least float32.
        pool: PagePool.
        pages: (R, n) pages; those after the last token may be -1.
        last: (R,) the last of these tokens that a query reads, or any number above.
        softmax_scale: factor on the scores.
    """
    pages = pages.clamp(min=0)
    token = torch.arange(pages.shape[1] * pool.k.shape[1], device=q.device)
    later = token > last[:, None]
    k, v = (x[pages].flatten(1, 2).to(q.dtype) for x in (pool.k, pool.v))
    scores = score(q, k) * softmax_scale
    weights, lse = softmax(scores.masked_fill(later[:, None], -torch.inf))
    return weigh(weights, v.masked_fill_(later[..., None, None], 0)), lse


def score(q, k):
    """Multiply (R, H, D) queries with their own (R, T, HK, D) keys: (R, H, T)."""
    grouped = q.unflatten(1, (k.shape[2], -1))
    return torch.einsum("rkgd,rtkd->rkgt", grouped, k).flatten(1, 2)


def weigh(weights, v):
    """Sum (R, T, HK, D) values by their (R, H, T) weights: (R, H, D)."""
    grouped = weights.unflatten(1, (v.shape[2], -1))
    return torch.einsum("rkgt,rtkd->rkgd", grouped, v).flatten(1, 2)


def softmax(scores):
    """Return the softmax over the last axis and its log-sum-exp."""
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp(), lse


def row_slices(n, elements):
    """Cut n rows that copy so many elements each into slices that fit at once.

    Example:
        >>> row_slices(5, 2**23)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    rows = max(1, paging.ELEMENTS_PER_COPY // max(1, elements))
    return [slice(a, min(a + rows, n)) for a in range(0, n, rows)]

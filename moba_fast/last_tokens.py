"""Attend from the last tokens of every sequence of a cache to all before them."""

import torch
from torch.nn.functional import pad

from moba_fast.blocks import partition
from moba_fast.decode import attend_all, attend_chosen, choose_past
from moba_fast.device import upload
from moba_fast.gate import gate_dtype, select_blocks
from moba_fast.moba import moba_attention
from moba_fast.pages import expand_ranges


def attend_last(cache, q, count, topk, softmax_scale, selected):
    """Attend by pages where that reads less than copying all keys, else by a copy.

    Args:
        cache: PagedKVCache.
        q: (S, H, D) queries.
        count: (B,) int64 on the host, queries of every sequence.
        topk: blocks per query; None: all.
        softmax_scale: factor on the scores.
        selected: (S, H, topk) block ids of the pack, or None.

    Returns:
        out: (S, H, D) in q's dtype.
        lse: (S, H).
        selected: (S, H, topk) int32 block ids of the pack; None with topk=None.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=gate_dtype(q))
    chosen = None
    if topk is not None:
        chosen = q.new_empty(*q.shape[:2], topk, dtype=torch.int32)
    by_copy = copying_reads_less(cache, count, q.shape[1], topk)
    first = count.cumsum(0) - count
    for part, attend in (
        (count * ~by_copy, attend_by_pages),
        (count * by_copy, attend_by_copy),
    ):
        if not part.any():
            continue
        token = upload(expand_ranges(first, part)[1], q.device)
        given = None if selected is None else selected[token]
        result = attend(cache, q[token], part, topk, softmax_scale, given)
        out[token], lse[token] = result[:2]
        if chosen is not None:
            chosen[token] = result[2].int()
    return out, lse, chosen


def copying_reads_less(cache, count, heads, topk):
    """Mark the sequences whose keys are read more often by pages than there are keys.

    By pages, every query reads topk - 1 pages per query head, its current page, and
    all block means. A single query never copies. (B,) bool on the host.
    """
    if topk is None:
        return count > 1
    _, block_size, kv_heads, _ = cache.pool.k.shape
    n_blocks = blocks_in_use(cache)
    past = heads * (n_blocks - 1).clamp(min=0, max=topk - 1) * block_size
    rows = count * (past + kv_heads * (block_size + n_blocks))
    return (count > 1) & (rows > kv_heads * block_size * n_blocks)


def attend_by_pages(cache, q, count, topk, softmax_scale, selected):
    """Attend with every query on its own to the pages that it chooses.

    Takes and returns what `attend_last` does; q has the queries counted by count only.
    """
    sequence, position = expand_ranges(cache.lengths - count, count)
    n_blocks = blocks_in_use(cache)
    first = (n_blocks.cumsum(0) - n_blocks)[sequence]
    row, at, first = upload(torch.stack([sequence, position, first]), q.device)
    n = int(position.max()) // cache.block_size
    pages = cache.table.on_device[row, : n + 1]
    if topk is None:
        return *attend_all(q, cache.pool, pages, position, softmax_scale), None
    current, first = at // cache.block_size, first[:, None, None]
    if selected is None:
        k_mean, most = cache.pool.k_mean, min(n, topk - 1)
        past = choose_past(q, k_mean, pages[:, :n], current, most)
        selected = torch.full((*q.shape[:2], topk), -1, device=q.device)
        selected[..., :most] = torch.where(past < 0, -1, past + first)
        selected[..., -1:] = current[:, None, None] + first
    else:
        past = selected[..., :-1].long()
        past = torch.where(past < 0, -1, past - first)
    out = attend_chosen(q, cache.pool, pages, at, past, softmax_scale)
    return *out, selected


def attend_by_copy(cache, q, count, topk, softmax_scale, selected):
    """Attend with `moba_attention` to a copy of the keys in the order of their tokens.

    Takes and returns what `attend_last` does; q has the queries counted by count only.
    It costs a copy of the keys and values of the sequences that have such queries.
    """
    sequences = count.nonzero()[:, 0]
    k, v = gather(cache, sequences)
    cu_q, cu_k = offsets(count[sequences]), offsets(cache.lengths[sequences])
    where = {"cu_seqlens": cu_q, "cu_seqlens_k": cu_k, "softmax_scale": softmax_scale}
    if topk is None:
        # Where a sequence is one block, its current block is all of it.
        longest = int(cache.lengths[sequences].max())
        own = torch.arange(len(sequences)).repeat_interleave(count[sequences])
        own = upload(own.int(), q.device)[:, None, None].expand(-1, q.shape[1], 1)
        where.update(block_size=longest, topk=1, selected=own, return_aux=True)
        return *moba_attention(q, k, v, **where)[:2], None
    shift = block_shift(cache, sequences).repeat_interleave(count[sequences])
    shift = upload(shift, q.device)[:, None, None]
    if selected is None:
        cu_q, cu_k = upload(cu_q, q.device), upload(cu_k, q.device)
        blocks = partition(cu_k, cache.block_size, cu_q)
        selected = select_blocks(q, gather_means(cache, sequences), blocks, topk)
    else:
        selected = torch.where(selected < 0, -1, selected - shift).int()
    where.update(block_size=cache.block_size, topk=topk, selected=selected)
    out, lse, selected = moba_attention(q, k, v, **where, return_aux=True)
    return out, lse, torch.where(selected < 0, -1, selected + shift)


def blocks_of(cache, count):
    """Cut the sequences of a cache into blocks, count of whose last tokens are queries.

    Args:
        cache: PagedKVCache.
        count: (B,) int64 on the host.

    Returns:
        Blocks.
    """
    device = cache.pool.k.device
    cu_k, cu_q = (upload(offsets(x), device) for x in (cache.lengths, count))
    return partition(cu_k, cache.block_size, cu_q)


def gather(cache, sequences):
    """Copy the keys and values of the listed sequences out of the pages.

    Returns:
        k: (SK, HK, D).
        v: (SK, HK, D).
    """
    lengths, block_size = cache.lengths[sequences], cache.block_size
    n_blocks = -(-lengths // block_size)
    row, block = expand_ranges(0, n_blocks)
    page = cache.table.host[sequences[row], block]
    tokens = (lengths[row] - block * block_size).clamp(max=block_size)
    page, tokens = upload(torch.stack([page, tokens]), cache.pool.k.device)
    total = int(lengths.sum())
    index, offset = expand_ranges(0, tokens, total)
    return tuple(x[page[index], offset] for x in (cache.pool.k, cache.pool.v))


def gather_means(cache, sequences):
    """Copy the block means of the listed sequences, zeros for short last blocks."""
    n_blocks = blocks_in_use(cache)[sequences]
    row, block = expand_ranges(0, n_blocks)
    complete = block < (cache.lengths[sequences] // cache.block_size)[row]
    page = cache.table.host[sequences[row], block]
    page, complete = upload(torch.stack([page, complete.long()]), cache.pool.k.device)
    return cache.pool.k_mean[page].masked_fill(complete[:, None, None] == 0, 0)


def block_shift(cache, sequences):
    """Return what to add to block ids of the listed sequences' pack, for the cache's.

    Blocks are counted through all sequences of a pack. (B',) int64 on the host.
    """
    n_blocks = blocks_in_use(cache)
    listed = n_blocks[sequences]
    first = (n_blocks.cumsum(0) - n_blocks)[sequences]
    return first - (listed.cumsum(0) - listed)


def blocks_in_use(cache):
    """Count the blocks of every sequence, (B,) int64 on the host."""
    return -(-cache.lengths // cache.block_size)


def offsets(count):
    """Return the (B+1,) int32 offsets, on the host, of so many tokens each."""
    return pad(count.cumsum(0), (1, 0)).int()

"""Choose the best past blocks of every query without writing scores down.

A program holds the queries of a few rows, streams over the means of all blocks that one
of them may read, and keeps the best of every row. A score becomes an integer key that
also names its column, so that a row's maximum says which block it is, and keys below it
need no mark of what was taken.

Example: with 2 levels per score, a score of 1.5 is level 3. In column 5 of a tile of 64
its key is 3 * 128 + (63 - 5) = 442; back again, 442 >> 7 is the level, and
63 - (442 & 127) the column. In column 9 the same score has key 438, so that ties go to
the lower block.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl

from moba_fast.kernels.gate_means import levels_per_score, split_means
from moba_fast.kernels.tilings import FAMILIES, cdiv, gpu_family, padded, power_of_2

# Past blocks that one pass over the means can keep per row.
MOST_KEPT = 32
# A float32 between 2^23 and 2^24 has the integers as its last bits.
MAGIC = tl.constexpr(2.0**23 + 2.0**22)
COLUMN_BITS = tl.constexpr(7)
NO_KEY = tl.constexpr(-(2**31))
NO_SCORE = tl.constexpr(-(2**24))
LAST = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class Config:
    """Hold the tile of select_blocks.

    Attributes:
        rows: queries, of all heads of a group, per program.
        columns: blocks at a time, at most 128.
        width: D, padded to a power of two.
        parts: numbers of q's dtype whose sum stands for a float32 mean.
        num_warps: warps per program.
    """

    rows: int
    columns: int
    width: int
    parts: int
    num_warps: int


@lru_cache
def config(dtype, D, rows, family):
    """Choose the tile for a dtype, D dimensions and rows that read the same blocks.

    `family` is one of `moba_fast.kernels.tilings.FAMILIES`: Hopper's tensor cores leave
    enough registers for larger tiles.

    Example: prefill, and a decoding step with four query heads per key head.
        >>> config(torch.bfloat16, 128, 4096, "hopper")
        Config(rows=128, columns=64, width=128, parts=2, num_warps=8)
        >>> config(torch.bfloat16, 128, 4, "hopper")
        Config(rows=16, columns=64, width=128, parts=2, num_warps=4)
    """
    width, hopper = padded(D), family == "hopper"
    if dtype.itemsize > 2:
        columns = 16 if width > 128 else 32
        return Config(16, columns, width, parts=1, num_warps=8 if width > 64 else 4)
    if rows < 64 or (width > 128 and not hopper):
        return Config(16, 64, width, parts=2, num_warps=4)
    if rows < 128 or width > (128 if hopper else 64):
        return Config(64, 64, width, parts=2, num_warps=4)
    return Config(128, 64, width, parts=2, num_warps=8)


def configurations():
    """List every configuration that `config` may return, with the arguments for it."""
    return {
        inputs: config(*inputs)
        for inputs in product(
            (torch.bfloat16, torch.float16, torch.float32),
            (16, 32, 64, 128, 256),
            (16, 64, 128),
            FAMILIES,
        )
    }


def select_blocks(q, k_mean, blocks, topk):
    """Choose the topk best blocks of every query, its current block among them.

    Same contract as moba_fast.select_blocks, but for how near scores must be to tie:
    there it is TIE_ROUNDINGS roundings of |q| |k_mean| around the cut, here scores are
    rounded to multiples of 2^-22 |q| max |k_mean|, two roundings of the largest score
    that a block of the key head could have, and equal multiples are tied. Ties go to
    the lower block.

    Means count as the sum of two numbers of q's dtype, 16 bits for bfloat16. A score
    that is NaN or infinite counts as the largest. Nothing waits for the device.

    Args:
        q: (S, H, D) queries of bfloat16, float16 or float32, D at most 256.
        k_mean: (N, HK, D) float32.
        blocks: moba_fast.Blocks.
        topk: blocks per query, at least 1.

    Returns:
        selected: (S, H, topk) int32.
    """
    (n_queries, heads, D), heads_k = q.shape, k_mean.shape[1]
    selected = q.new_empty((n_queries, heads, topk), dtype=torch.int32)
    if topk == 1 or selected.numel() == 0:
        return selected.copy_(blocks.of_query[:, None, None].expand_as(selected))
    if q.stride(2) != 1:
        q = q.contiguous()
    ratio, slots = heads // heads_k, topk - 1
    n_rows = n_queries * ratio
    sequences = max(1, blocks.cu_seqlens.shape[0] - 1)
    tile = config(q.dtype, D, n_rows // sequences, gpu_family())
    means, norms = split_means(k_mean, q.dtype, tile)
    passes, worst = cdiv(slots, MOST_KEPT), None
    if passes > 1:
        worst = q.new_empty((n_queries, heads), dtype=torch.int64)
    kept = max(2, power_of_2(min(slots, MOST_KEPT)))
    grid = (cdiv(n_rows, tile.rows) * heads_k,)
    for first in range(0, slots, MOST_KEPT):
        choose_best[grid](
            *(q, means, norms, blocks.first_of_query, blocks.of_query),
            *(selected, worst, *q.stride()[:2]),
            *(n_rows, heads_k, blocks.start.shape[0], means.shape[2], ratio, topk),
            *(first, min(MOST_KEPT, slots - first)),
            *(D, tile.width, tile.rows, tile.columns, tile.parts, kept),
            *(first > 0, first + MOST_KEPT < slots),
            num_warps=tile.num_warps,
        )
    if passes > 1:
        past, missing = selected[..., :-1], blocks.start.shape[0]
        past.copy_(past.masked_fill(past < 0, missing).sort(-1).values)
        past.masked_fill_(past == missing, -1)
    return selected


@triton.jit
def no_choice(readable, COUNT: tl.constexpr, KEPT: tl.constexpr):
    """Return the kept ones of rows that have none: COUNT of NO_SCORE, the rest full.

    A kept one is its score in the upper 32 bits and LAST - block in the lower ones: the
    smallest is the one to give up, of equal scores that of the highest block. LAST - x
    is written x ^ LAST.
    """
    i = tl.arange(0, KEPT).to(tl.int64)[None, :]
    empty = (i < COUNT) & readable[:, None]
    score = tl.where(empty, NO_SCORE, LAST).to(tl.int64)
    return (score << 32) + i


@triton.jit
def choose_best(
    q,
    means,
    norms,
    first_of_query,
    of_query,
    selected,
    worst,
    stride_query,
    stride_head,
    n_rows,
    heads_k,
    n_blocks,
    padded_blocks,
    ratio,
    topk,
    first_slot,
    count,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    KEPT: tl.constexpr,
    AFTER: tl.constexpr,
    MORE: tl.constexpr,
):
    """Write the `count` best past blocks of some rows, ascending, and the current one.

    A row is a query and a head of the group that reads kv_head. `worst` (S, H) holds
    what the pass before kept last; with AFTER only what comes after that counts.
    """
    tiles = tl.cdiv(n_rows, ROWS)
    # Late queries have more to read, so they go first.
    tile = tiles - 1 - tl.program_id(0) % tiles
    kv_head = tl.program_id(0) // tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    readable = row < n_rows
    query = (row // ratio).to(tl.int64)
    head = kv_head * ratio + row % ratio
    first = tl.load(first_of_query + query, mask=readable, other=LAST).to(tl.int32)
    current = tl.load(of_query + query, mask=readable, other=0).to(tl.int32)
    dim = tl.arange(0, WIDTH)
    address = q + (query * stride_query + head.to(tl.int64) * stride_head)[:, None]
    q_tile = tl.load(
        address + dim[None, :], mask=readable[:, None] & (dim < D)[None, :], other=0
    )
    largest = tl.load(norms + heads_k + kv_head).to(tl.float32, bitcast=True)
    levels = levels_per_score(q_tile, largest)
    chosen = query * (heads_k * ratio) + head
    kept = no_choice(readable, count, KEPT)
    if AFTER:
        before = tl.load(worst + chosen, mask=readable, other=0)

    last = tl.max(current, 0)
    # Between these two all rows may read every block.
    all_from = tl.max(tl.where(readable, first, 0), 0)
    all_to = tl.min(tl.where(readable, current, LAST), 0)
    column = tl.arange(0, COLUMNS)
    address = (
        means + (kv_head.to(tl.int64) * padded_blocks + column[:, None]) * WIDTH + dim
    )
    for start in range(tl.min(first, 0) // COLUMNS * COLUMNS, last, COLUMNS):
        score = tl.zeros((ROWS, COLUMNS), tl.float32)
        for part in tl.static_range(PARTS - 1, -1, -1):
            offset = (part * heads_k * padded_blocks.to(tl.int64) + start) * WIDTH
            mean = tl.load(address + offset)
            score = tl.dot(q_tile, tl.trans(mean), score, input_precision="ieee")
        integer = (score * levels[:, None] + MAGIC).to(tl.int32, bitcast=True)
        key = (integer << COLUMN_BITS) + (COLUMNS - 1 - column)[None, :]
        block = start + column[None, :]
        if (start < all_from) | (start + COLUMNS > all_to):
            past = (block >= first[:, None]) & (block < current[:, None])
            key = tl.where(past, key, NO_KEY)
        if AFTER:
            left = comes_after(key, block, before)
            key = tl.where(left, key, NO_KEY)
        kept = keep_best(key, kept, start, COLUMNS)

    ids = ascending((kept & LAST).to(tl.int32) ^ LAST, KEPT)
    slot = tl.arange(0, KEPT)
    address = selected + chosen * topk
    tl.store(
        address[:, None] + first_slot + slot[None, :],
        tl.where(ids < n_blocks, ids, -1),
        mask=readable[:, None] & (slot < count)[None, :],
    )
    tl.store(address + topk - 1, current, mask=readable)
    if MORE:
        tl.store(worst + chosen, tl.min(kept, 1), mask=readable)


@triton.jit
def ascending(ids, KEPT: tl.constexpr):
    """Sort every row of ids (ROWS, KEPT), which are different, by taking the lowest."""
    slot = tl.arange(0, KEPT)[None, :]
    in_order = ids
    for i in range(KEPT):
        lowest = tl.min(ids, 1)[:, None]
        in_order = tl.where(slot == i, lowest, in_order)
        ids = tl.where(ids == lowest, LAST, ids)
    return in_order


@triton.jit
def comes_after(key, block, before):
    """Say which blocks are worse than one, or as good but after it."""
    score, last = (before >> 32).to(tl.int32), (before & LAST).to(tl.int32) ^ LAST
    tied = (key >> COLUMN_BITS == score[:, None]) & (block > last[:, None])
    return tied | (key >> COLUMN_BITS < score[:, None])


@triton.jit
def keep_best(key, kept, start, COLUMNS: tl.constexpr):
    """Replace kept ones by better ones of a tile, the best first.

    Args:
        key: (ROWS, COLUMNS) keys, different within a row.
        kept: (ROWS, KEPT) kept ones.
        start: first block of the tile.
        COLUMNS: blocks of the tile.
    """
    worst = tl.min(kept, 1)
    best = tl.max(key, 1)
    better = (best >> COLUMN_BITS) > (worst >> 32).to(tl.int32)
    while tl.max(better.to(tl.int32), 0) > 0:
        block = start + COLUMNS - 1 - (best & (2**COLUMN_BITS - 1))
        new = ((best >> COLUMN_BITS).to(tl.int64) << 32) + (block ^ LAST)
        replaced = (kept == worst[:, None]) & better[:, None]
        kept = tl.where(replaced, new[:, None], kept)
        worst = tl.min(kept, 1)
        # The largest key below the best: unsigned, the others are small.
        below = (key - best[:, None]).to(tl.uint32, bitcast=True)
        step = tl.max(below, 1).to(tl.int32, bitcast=True)
        best = tl.where(step < 0, best + step, NO_KEY)
        better = (best >> COLUMN_BITS) > (worst >> 32).to(tl.int32)
    return kept

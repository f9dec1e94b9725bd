"""Attend from every query to its own block, and merge what it read in past blocks.

A program takes a tile of queries of one head. The partial results of a query lie next
to each other, so that all are read once and in order, and out is written once.
"""

import triton
import triton.language as tl

from moba_fast.kernels.tiles import (
    LN2,
    LOG2E,
    add_keys,
    column_mask,
    load_keys,
    precision,
)
from moba_fast.kernels.tilings import (
    LARGE,
    cdiv,
    combine_tiling,
    gpu_family,
    padded,
    power_of_2,
)

# Slots under way at once, plus one.
SLOT_STAGES = 4


def attend_current(
    q, k, v, out_past, lse_past, selected, blocks, softmax_scale, out, lse
):
    """Attend to the own blocks, merge the past ones, and write the result.

    Args:
        q: (S, H, D) queries, float32, float16 or bfloat16.
        k: (SK, HK, D) keys; HK divides H.
        v: (SK, HK, D) values.
        out_past: (S * H * slots, D) from `attend_past`.
        lse_past: (S * H * slots,) from `attend_past`.
        selected: (S, H, slots + 1) int32.
        blocks: Blocks of these queries.
        softmax_scale: positive factor on the scores.
        out: (S, H, D) in q's dtype, is written.
        lse: (S, H) float32, is written, natural logarithm.
    """
    n_queries, heads, D = q.shape
    if n_queries * heads == 0:
        return
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    slots = selected.shape[2] - 1
    tiling = combine_tiling(q.dtype, D, blocks.longest, gpu_family())
    combine_tile[(cdiv(n_queries, tiling.rows) * heads,)](
        *(q, k, v, out_past, lse_past, selected, out, lse),
        *(blocks.of_query, blocks.position, blocks.start, blocks.end),
        *(q.stride()[:2], k.stride()[:2], v.stride()[:2]),
        *(selected.stride(), out.stride(), lse.stride()),
        *(n_queries, softmax_scale * LOG2E.value),
        *(heads // k.shape[1], slots, power_of_2(max(slots, 1)), heads, D, padded(D)),
        *(tiling.rows, tiling.keys, tiling.stages, SLOT_STAGES),
        *(blocks.longest >= LARGE, precision(q.dtype)),
        **tiling.options,
    )


@triton.jit(do_not_specialize=["n_queries"])
def combine_tile(
    q, k, v, out_past, lse_past, selected, out, lse, of_query, position, start, end,
    q_strides, k_strides, v_strides, selected_strides, out_strides, lse_strides,
    n_queries, scale,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, SLOTS_PADDED: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    SLOT_STAGES: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from a tile of queries of one head to their own blocks, add the slots."""
    # Heads that share keys run next to each other.
    head = tl.program_id(0) % HEADS
    query = tl.program_id(0) // HEADS * ROWS
    last = tl.minimum(query + ROWS, n_queries)
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    # One pass where the tile lies in one block; otherwise one pass a block, so that no
    # query meets the values of a block that it does not read.
    while query < last:
        block = tl.load(of_query + query)
        at = tl.load(position + query).to(tl.int32)
        first = tl.load(start + block).to(tl.int32)
        # The queries of a block follow each other, up to its end.
        count = tl.minimum(tl.load(end + block).to(tl.int32) - at, last - query)
        valid, line = row < count, (query + row).to(tl.int64)
        mask = column_mask(valid[:, None], column, D, WIDTH)
        offset = line * q_strides[0] + head.to(tl.int64) * q_strides[1]
        queries = tl.load(q + offset[:, None] + column[None, :], mask, 0.0)
        acc, largest, total = attend_own(
            k, v, k_strides, v_strides, queries, head // RATIO, first, at, count, scale,
            D, WIDTH, ROWS, KEYS, STAGES, SPLIT, PRECISION,
        )  # fmt: skip
        acc, largest, total = add_slots(
            acc, largest, total, out_past, lse_past, selected, selected_strides,
            line, head, valid, SLOTS, SLOTS_PADDED, HEADS, D, WIDTH, SLOT_STAGES,
        )  # fmt: skip
        offset = line * out_strides[0] + head.to(tl.int64) * out_strides[1]
        at_column = out + offset[:, None] + column[None, :] * out_strides[2]
        tl.store(at_column, acc.to(out.dtype.element_ty), mask)
        offset = line * lse_strides[0] + head.to(tl.int64) * lse_strides[1]
        tl.store(lse + offset, (largest + tl.log2(total)) * LN2, valid)
        query += count


@triton.jit
def attend_own(
    k, v, k_strides, v_strides, queries, head, first, at, count, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend causally from queries of one block to its keys.

    The block begins at key `first`. `count` queries stand at the keys from `at` on; the
    rows after them may hold anything. Returns a running attention, see `add_keys`.
    """
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    begin = first
    if SPLIT:
        # Every query reads the keys up to the first one's.
        begin = first + (at + 1 - first) // KEYS * KEYS
        for n in tl.range(first, begin, KEYS, num_stages=STAGES):
            keys = load_keys(k, k_strides, head, n, KEYS, D, WIDTH, KEYS, False, False)
            values = load_keys(
                v, v_strides, head, n, KEYS, D, WIDTH, KEYS, False, False
            )
            acc, largest, total = add_keys(
                acc, largest, total, queries, keys, values, None, scale,
                False, PRECISION,
            )  # fmt: skip
    end = at + count
    for n in tl.range(begin, end, KEYS, num_stages=STAGES):
        keys = load_keys(k, k_strides, head, n, end - n, D, WIDTH, KEYS, True, False)
        values = load_keys(v, v_strides, head, n, end - n, D, WIDTH, KEYS, True, False)
        readable = (n + key)[None, :] <= (at + row)[:, None]
        acc, largest, total = add_keys(
            acc, largest, total, queries, keys, values, readable, scale, True, PRECISION
        )
    return acc, largest, total


@triton.jit
def add_slots(
    acc, largest, total, out_past, lse_past, selected, strides, line, head, valid,
    SLOTS: tl.constexpr, SLOTS_PADDED: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of the queries `line` with their running attention.

    Returns acc normalised, and largest and total over all that was merged, see
    `add_keys`. Rows that are not valid read nothing.
    """
    if SLOTS == 0:
        return acc * (1.0 / total)[:, None], largest, total
    slot, column = tl.arange(0, SLOTS_PADDED), tl.arange(0, WIDTH)
    offset = line * strides[0] + head.to(tl.int64) * strides[1]
    named = valid[:, None] & (slot < SLOTS)[None, :]
    chosen = selected + offset[:, None] + slot[None, :] * strides[2]
    block, pair = tl.load(chosen, named, -1), (line * HEADS + head) * SLOTS
    lse = tl.load(lse_past + pair[:, None] + slot[None, :], block >= 0, float("-inf"))
    lse = lse * LOG2E
    before, largest = largest, tl.maximum(largest, tl.max(lse, 1))
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    shrink, weights = tl.exp2(before - origin), tl.exp2(lse - origin[:, None])
    total = total * shrink + tl.sum(weights, 1)
    weights = weights * (1.0 / total)[:, None]
    acc = acc * (shrink / total)[:, None]
    for s in tl.range(0, SLOTS, num_stages=STAGES):
        weight = tl.sum(tl.where((slot == s)[None, :], weights, 0.0), 1)
        # A slot of no pair weighs 0, and its row may hold anything.
        mask = column_mask((weight != 0.0)[:, None], column, D, WIDTH)
        part = out_past + (pair + s)[:, None] * D + column[None, :]
        acc += weight[:, None] * tl.load(part, mask, 0.0).to(tl.float32)
    return acc, largest, total

"""Attend from the queries of every list to the keys of its block.

A program takes some pairs of one list. Keys and values of a small block stay in shared
memory while tiles of queries pass by; with a large block a tile of queries stays while
tiles of keys and values pass by. Either way they are read once for many queries.
"""

import torch
import triton
import triton.language as tl

from moba_fast.kernels.route import tile_map
from moba_fast.kernels.tiles import (
    LN2,
    LOG2E,
    add_keys,
    column_mask,
    describe,
    load_keys,
    precision,
)
from moba_fast.kernels.tilings import attend_tiling, gpu_family, padded


def attend_past(q, k, v, lists, blocks, softmax_scale):
    """Attend from the queries of every list to all keys of the list's block.

    Args:
        q: (S, H, D) queries, float32, float16 or bfloat16.
        k: (SK, HK, D) keys; HK divides H.
        v: (SK, HK, D) values.
        lists: Lists of these queries and heads.
        blocks: Blocks of these queries.
        softmax_scale: positive factor on the scores.

    Returns:
        out_past: (S * H * slots, D) in q's dtype; row (query * H + head) * slots + slot
            is that of a pair, normalised. Rows of no pair are undefined.
        lse_past: (S * H * slots,) float32, natural logarithm; undefined likewise.
    """
    n_pairs, D, block_size = lists.pairs.shape[0], q.shape[2], blocks.block_size
    out = q.new_empty(n_pairs, D)
    lse = q.new_empty(n_pairs, dtype=torch.float32)
    # Past blocks are complete.
    if n_pairs == 0 or blocks.longest < block_size:
        return out, lse
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    family = gpu_family()
    tiling = attend_tiling(q.dtype, D, block_size, family)
    list_of_tile, first_tile = tile_map(lists, tiling.rows * tiling.tiles)
    streamed, described = tiling.tiles == 1, None
    if streamed and family == "hopper" and q.element_size() == 2:
        described = [describe(x, tiling.keys) for x in (k, v)]
        described = None if None in described else described
    kernel = attend_streamed if streamed else attend_resident
    kernel[(list_of_tile.shape[0],)](
        *(q, *(described or (k, v)), out, lse),
        *(lists.pairs, lists.cu_pairs, list_of_tile, first_tile, blocks.start),
        *(q.stride()[:2], k.stride()[:2], v.stride()[:2]),
        *(blocks.start.shape[0], block_size, softmax_scale * LOG2E.value),
        *(lists.slots, q.shape[1], D, padded(D)),
        *(tiling.rows, tiling.keys, tiling.tiles, tiling.stages),
        *(block_size % tiling.keys == 0, described is not None, precision(q.dtype)),
        **tiling.options,
    )
    return out, lse


@triton.jit(do_not_specialize=["n_blocks"])
def attend_resident(
    q, k, v, out, lse, pairs, cu_pairs, list_of_tile, first_tile, start,
    q_strides, k_strides, v_strides, n_blocks, block_size, scale,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pass the queries of a list by its block, which has at most KEYS keys."""
    i, begin, end = pairs_of_tile(cu_pairs, list_of_tile, first_tile, ROWS * TILES)
    if i < 0:
        return
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    left = end - begin
    pair = tl.load(pairs + begin + row, row < left, 0)
    next_pair = tl.load(pairs + begin + ROWS + row, row < left - ROWS, 0)
    queries = gather_queries(q, q_strides, pair, row < left, SLOTS, HEADS, D, WIDTH)
    head, first = i // n_blocks, tl.load(start + i % n_blocks)
    keys = load_keys(
        k, k_strides, head, first, block_size, D, WIDTH, KEYS, not EVEN, False
    )
    values = load_keys(
        v, v_strides, head, first, block_size, D, WIDTH, KEYS, not EVEN, False
    )
    for at in tl.range(begin, end, ROWS, num_stages=STAGES):
        left = end - at
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)
        # A query is loaded one tile and its pair two tiles ahead: an address depends on
        # the load before, and there is little else to do while both are on their way.
        far_pair = tl.load(pairs + at + 2 * ROWS + row, row < left - 2 * ROWS, 0)
        next_queries = gather_queries(
            q, q_strides, next_pair, row < left - ROWS, SLOTS, HEADS, D, WIDTH
        )
        # Loads do not move below it.
        tl.debug_barrier()
        if not EVEN:
            scores = tl.where((key < block_size)[None, :], scores, float("-inf"))
        largest = tl.max(scores, 1) * scale
        weights = tl.exp2(scores * scale - largest[:, None])
        total = tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        store_pairs(out, lse, pair, row < left, acc, largest, total, D, WIDTH)
        pair, next_pair, queries = next_pair, far_pair, next_queries


@triton.jit(do_not_specialize=["n_blocks"])
def attend_streamed(
    q, k, v, out, lse, pairs, cu_pairs, list_of_tile, first_tile, start,
    q_strides, k_strides, v_strides, n_blocks, block_size, scale,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pass the keys of a block by a tile of the queries that chose it."""
    i, begin, end = pairs_of_tile(cu_pairs, list_of_tile, first_tile, ROWS * TILES)
    if i < 0:
        return
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    valid = row < end - begin
    pair = tl.load(pairs + begin + row, valid, 0)
    queries = gather_queries(q, q_strides, pair, valid, SLOTS, HEADS, D, WIDTH)
    head, first = i // n_blocks, tl.load(start + i % n_blocks).to(tl.int32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    whole = block_size // KEYS * KEYS
    for n in tl.range(0, whole, KEYS, num_stages=STAGES):
        keys = load_keys(
            k, k_strides, head, first + n, KEYS, D, WIDTH, KEYS, False, DESCRIBED
        )
        values = load_keys(
            v, v_strides, head, first + n, KEYS, D, WIDTH, KEYS, False, DESCRIBED
        )
        acc, largest, total = add_keys(
            acc, largest, total, queries, keys, values, None, scale, False, PRECISION
        )
    if not EVEN:
        for n in tl.range(whole, block_size, KEYS, num_stages=1):
            count = block_size - n
            keys = load_keys(
                k, k_strides, head, first + n, count, D, WIDTH, KEYS, True, DESCRIBED
            )
            values = load_keys(
                v, v_strides, head, first + n, count, D, WIDTH, KEYS, True, DESCRIBED
            )
            readable = (key < count)[None, :]
            acc, largest, total = add_keys(
                acc,
                largest,
                total,
                queries,
                keys,
                values,
                readable,
                scale,
                True,
                PRECISION,
            )
    # Loaded again, the pairs take no registers in the loop. The compiler would make one
    # load of two equal ones.
    pair = tl.load(pairs + begin + row, valid, 0, eviction_policy="evict_first")
    store_pairs(out, lse, pair, valid, acc, largest, total, D, WIDTH)


@triton.jit
def pairs_of_tile(cu_pairs, list_of_tile, first_tile, pairs_per_tile):
    """Find the list of this program, -1 if none, and where its pairs begin and end."""
    tile = tl.program_id(0)
    i = tl.load(list_of_tile + tile)
    some = tl.maximum(i, 0)
    begin = tl.load(cu_pairs + some)
    begin += (tile - tl.load(first_tile + some)) * pairs_per_tile
    end = tl.load(cu_pairs + some + 1)
    return i, begin, begin + tl.minimum(pairs_per_tile, end - begin)


@triton.jit
def gather_queries(
    q, strides, pair, valid,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Load the query of every pair, (ROWS, WIDTH), zeros where it is not valid."""
    column, row = tl.arange(0, WIDTH), pair // SLOTS
    offset = (row // HEADS).to(tl.int64) * strides[0]
    offset += (row % HEADS).to(tl.int64) * strides[1]
    mask = column_mask(valid[:, None], column, D, WIDTH)
    return tl.load(q + offset[:, None] + column[None, :], mask, 0.0)


@triton.jit
def store_pairs(
    out, lse, pair, valid, acc, largest, total, D: tl.constexpr, WIDTH: tl.constexpr
):
    """Normalise a tile of partial results and store each where its pair belongs."""
    column = tl.arange(0, WIDTH)
    mask = column_mask(valid[:, None], column, D, WIDTH)
    acc = acc * (1.0 / total)[:, None]
    at = out + pair.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask)
    tl.store(lse + pair, (largest + tl.log2(total)) * LN2, valid)

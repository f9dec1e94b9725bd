"""Differentiate the attention of queries to the past blocks that they chose.

The loop over key blocks is the outer one: a program holds a tile of keys and walks the
list of queries that chose their block, so that gradients of keys and values are sums in
registers, of all query heads that share the key head, and need no atomics.
"""

import triton
import triton.language as tl

from moba_fast.kernels.backward_tile import (
    LOG2E,
    add_key_gradients,
    load_tile,
    query_gradients,
    store_tile,
    within,
)


@triton.jit
def locate_keys(tile_list, start, n_blocks, key_tiles, KEYS: tl.constexpr):
    """Return list, key head and first key of a program; the list may be -1: none."""
    this = tl.load(tile_list + tl.program_id(0) // key_tiles, volatile=True)
    block = tl.maximum(this, 0) % n_blocks
    head_k = (tl.maximum(this, 0) // n_blocks).to(tl.int64)
    first_key = tl.load(start + block) + tl.program_id(0) % key_tiles * KEYS
    return this, head_k, first_key


@triton.jit
def locate_sums(
    this, head_k, first_key, cu_pairs, first_tile, dk, dv, sums, dk_strides, dv_strides,
    part_rows, key_tiles, KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return which part of its list a program has and where it adds what it finds.

    The part is followed by pointers to the first row of the keys' gradients and of the
    values', and the strides of these rows.
    """
    part = tl.program_id(0) // key_tiles - tl.load(first_tile + this)
    step_k = tl.where(part == 0, dk_strides[0], D)
    step_v = tl.where(part == 0, dv_strides[0], D)
    place = (tl.load(cu_pairs + this) // part_rows + part - 1).to(tl.int64) * 2
    at_v = sums + (place * key_tiles + tl.program_id(0) % key_tiles) * (KEYS * D)
    at_k = at_v + key_tiles * (KEYS * D)
    if part == 0:
        at_k = dk + (first_key * dk_strides[0] + head_k * dk_strides[1])
        at_v = dv + (first_key * dv_strides[0] + head_k * dv_strides[1])
    return part, at_k, at_v, step_k, step_v


@triton.jit
def complete_keys(block_size, key_tiles, KEYS: tl.constexpr, EVEN: tl.constexpr):
    """Mark the keys of a program's tile that exist: past blocks are complete."""
    key = tl.arange(0, KEYS)
    if EVEN:
        return key >= 0
    else:
        return key < block_size - tl.program_id(0) % key_tiles * KEYS


@triton.jit
def load_pairs(
    pairs, first, count, dout, q, stats, dout_strides, q_strides, n_queries,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Gather q, dout, lse and delta of `count` pairs from place `first` on, then zeros.

    Returns the pairs, which of them are among `count`, and the four.
    """
    valid = tl.arange(0, ROWS) < count
    pair = tl.load(pairs + first + tl.arange(0, ROWS), mask=valid, other=0)
    query = (pair // SLOTS // HEADS).to(tl.int64)
    head = (pair // SLOTS % HEADS).to(tl.int64)
    mask, column = within(valid, D, WIDTH), tl.arange(0, WIDTH)
    at_q = q + (query * q_strides[0] + head * q_strides[1])[:, None]
    at_dout = dout + (query * dout_strides[0] + head * dout_strides[1])[:, None]
    queries = tl.load(at_q + column[None, :], mask=mask, other=0.0)
    douts = tl.load(at_dout + column[None, :], mask=mask, other=0.0)
    at_stats = stats + (head * n_queries + query) * 2
    lse = tl.load(at_stats, mask=valid, other=0.0)
    delta = tl.load(at_stats + 1, mask=valid, other=0.0)
    return pair, valid, queries, douts, lse, delta


@triton.jit(do_not_specialize=["n_queries", "n_blocks"])
def past_kernel(
    dout, q, k, v, stats, pairs, cu_pairs, tile_list, first_tile, start,
    dq, dk, dv, sums, dout_strides, q_strides, k_strides, v_strides,
    dk_strides, dv_strides, softmax_scale, n_queries, n_blocks, block_size, part_rows,
    key_tiles, HEADS: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, DQ: tl.constexpr,
):  # fmt: skip
    """Add one part of a list to the gradients of one tile of the list's keys.

    A list is cut into parts of part_rows pairs by `tile_map`, a block into key_tiles
    tiles, all of them full if EVEN. The first part of a list adds to dk and dv. Further
    ones write to `sums`, (pairs // part_rows, 2, key_tiles * KEYS, D) float32, values'
    gradients first, and `add_sums_kernel` adds them in order. Those of list i stand
    from cu_pairs[i] // part_rows on. No two lists overlap there: a list of m further
    parts has more than m * part_rows pairs, so the next list begins m places on.

    stats is (HEADS, n_queries, 2), see `stats_kernel`. dq takes the gradients of the
    queries: (pairs, D), a row per pair, if DQ is "partial"; (n_queries, HEADS, D)
    float32 to add to if it is "atomic"; nothing if it is "none".
    """
    this, head_k, first_key = locate_keys(tile_list, start, n_blocks, key_tiles, KEYS)
    if this < 0:
        return
    part, at_dk, at_dv, step_k, step_v = locate_sums(
        this, head_k, first_key, cu_pairs, first_tile, dk, dv, sums,
        dk_strides, dv_strides, part_rows, key_tiles, KEYS, D,
    )  # fmt: skip
    first = tl.load(cu_pairs + this) + part * part_rows
    rows = tl.minimum(part_rows, tl.load(cu_pairs + this + 1) - first)

    readable = complete_keys(block_size, key_tiles, KEYS, EVEN)
    mask = within(readable, D, WIDTH)
    at_k = k + (first_key * k_strides[0] + head_k * k_strides[1])
    at_v = v + (first_key * v_strides[0] + head_k * v_strides[1])
    keys = load_tile(at_k, k_strides[0], mask, KEYS, WIDTH)
    values = load_tile(at_v, v_strides[0], mask, KEYS, WIDTH)
    sum_k = tl.zeros((KEYS, WIDTH), tl.float32)
    sum_v = load_tile(at_dv, step_v, mask & (part == 0), KEYS, WIDTH)
    for i in tl.range(0, rows, ROWS, num_stages=STAGES):
        pair, valid, queries, douts, lse, delta = load_pairs(
            pairs, first + i, rows - i, dout, q, stats, dout_strides, q_strides,
            n_queries, HEADS, SLOTS, D, WIDTH, ROWS,
        )  # fmt: skip
        sum_k, sum_v, dscores = add_key_gradients(
            sum_k, sum_v, keys, values, queries, douts, lse, delta, readable[:, None],
            softmax_scale * LOG2E, not EVEN,
        )  # fmt: skip
        if DQ != "none":
            result = tl.dot(dscores.T, keys, input_precision="ieee") * softmax_scale
            mask_rows, column = within(valid, D, WIDTH), tl.arange(0, WIDTH)
            if DQ == "partial":
                at_dq = dq + pair.to(tl.int64)[:, None] * D + column[None, :]
                tl.store(at_dq, result.to(dq.dtype.element_ty), mask=mask_rows)
            else:
                at_dq = dq + (pair // SLOTS).to(tl.int64)[:, None] * D + column[None, :]
                tl.atomic_add(at_dq, result, mask=mask_rows, sem="relaxed")

    # Found again, not kept: what lives through the loop takes registers away from it.
    this, head_k, first_key = locate_keys(tile_list, start, n_blocks, key_tiles, KEYS)
    part, at_dk, at_dv, step_k, step_v = locate_sums(
        this, head_k, first_key, cu_pairs, first_tile, dk, dv, sums,
        dk_strides, dv_strides, part_rows, key_tiles, KEYS, D,
    )  # fmt: skip
    mask = within(complete_keys(block_size, key_tiles, KEYS, EVEN), D, WIDTH)
    store_tile(at_dv, step_v, sum_v, mask, KEYS, WIDTH)
    sum_k *= softmax_scale
    sum_k += load_tile(at_dk, step_k, mask & (part == 0), KEYS, WIDTH)
    store_tile(at_dk, step_k, sum_k, mask, KEYS, WIDTH)


@triton.jit(do_not_specialize=["n_blocks"])
def add_sums_kernel(
    sums, cu_pairs, start, end, dk, dv, dk_strides, dv_strides, n_blocks, part_rows,
    padded_keys, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add the sums of a list's second to last part to dk and dv, in this order.

    sums is (pairs // part_rows, 2, padded_keys, D) float32, see `past_kernel`; ROWS
    divides padded_keys.
    """
    chunks = padded_keys // ROWS
    this = tl.program_id(0) // chunks
    list_start = tl.load(cu_pairs + this)
    more = (tl.load(cu_pairs + this + 1) - list_start - 1) // part_rows
    if more <= 0:
        return
    head_k = (this // n_blocks).to(tl.int64)
    skipped = tl.program_id(0) % chunks * ROWS
    first_key = tl.load(start + this % n_blocks) + skipped
    n_keys = (tl.load(end + this % n_blocks) - first_key).to(tl.int32)
    mask = within(tl.arange(0, ROWS) < n_keys, D, WIDTH)
    at_dk = dk + head_k * dk_strides[1] + first_key * dk_strides[0]
    at_dv = dv + head_k * dv_strides[1] + first_key * dv_strides[0]
    sum_k = load_tile(at_dk, dk_strides[0], mask, ROWS, WIDTH)
    sum_v = load_tile(at_dv, dv_strides[0], mask, ROWS, WIDTH)
    at = sums + skipped * D
    for i in tl.range(0, more, num_stages=STAGES):
        place = (list_start // part_rows + i).to(tl.int64) * 2 * padded_keys
        sum_v += load_tile(at + place * D, D, mask, ROWS, WIDTH)
        sum_k += load_tile(at + (place + padded_keys) * D, D, mask, ROWS, WIDTH)
    store_tile(at_dk, dk_strides[0], sum_k, mask, ROWS, WIDTH)
    store_tile(at_dv, dv_strides[0], sum_v, mask, ROWS, WIDTH)


@triton.jit(do_not_specialize=["n_queries", "n_blocks"])
def past_queries_kernel(
    dout, q, k, v, stats, pairs, cu_pairs, tile_list, first_tile, start,
    dq, dout_strides, q_strides, k_strides, v_strides, softmax_scale, n_queries,
    n_blocks, block_size, HEADS: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the queries of ROWS pairs of one list, (pairs, D).

    For blocks of several tiles of keys, where `past_kernel` runs with DQ "none": one
    program sees all keys of the block, so that a pair's row is written once.
    """
    this, head_k, first_key = locate_keys(tile_list, start, n_blocks, 1, KEYS)
    if this < 0:
        return
    first = tl.load(cu_pairs + this)
    first += (tl.program_id(0) - tl.load(first_tile + this)) * ROWS
    pair, valid, queries, douts, lse, delta = load_pairs(
        pairs, first, tl.load(cu_pairs + this + 1) - first, dout, q, stats,
        dout_strides, q_strides, n_queries, HEADS, SLOTS, D, WIDTH, ROWS,
    )  # fmt: skip
    at_k = k + (first_key * k_strides[0] + head_k * k_strides[1])
    at_v = v + (first_key * v_strides[0] + head_k * v_strides[1])
    result = query_gradients(
        queries, douts, lse, delta, tl.where(valid, block_size, 0), at_k, at_v,
        k_strides[0], v_strides[0], block_size, softmax_scale * LOG2E,
        D, WIDTH, ROWS, KEYS, STAGES, not EVEN,
    ) * softmax_scale  # fmt: skip
    at_dq = dq + pair.to(tl.int64)[:, None] * D + tl.arange(0, WIDTH)[None, :]
    tl.store(at_dq, result.to(dq.dtype.element_ty), mask=within(valid, D, WIDTH))

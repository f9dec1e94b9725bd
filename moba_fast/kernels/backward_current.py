"""Differentiate the attention of queries to their own block, and finish dq."""

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


@triton.jit(do_not_specialize=["n_queries"])
def stats_kernel(
    dout, out, lse, stats, dout_strides, out_strides, lse_strides, n_queries,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write what is needed of every query beside q and dout: lse / log 2, dout . out.

    stats is (HEADS, n_queries, 2) float32. One head's lie together because the lists of
    one head run at the same time, and a query's because they are gathered.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    query, head = row // HEADS, row % HEADS
    valid, column = query < n_queries, tl.arange(0, WIDTH)
    mask = within(valid, D, WIDTH)
    at_dout = dout + (query * dout_strides[0] + head * dout_strides[1])[:, None]
    at_out = out + (query * out_strides[0] + head * out_strides[1])[:, None]
    douts = tl.load(at_dout + column[None, :], mask=mask, other=0.0).to(tl.float32)
    outs = tl.load(at_out + column[None, :], mask=mask, other=0.0).to(tl.float32)
    at_lse = lse + query * lse_strides[0] + head * lse_strides[1]
    at_stats = stats + (head * n_queries + query) * 2
    tl.store(at_stats, tl.load(at_lse, mask=valid, other=0.0) * LOG2E, mask=valid)
    tl.store(at_stats + 1, tl.sum(douts * outs, 1), mask=valid)


@triton.jit
def locate_current(start, end, n_blocks, key_tiles, KEYS: tl.constexpr):
    """Return block, key head, first key of a program and how many there are from it."""
    block = tl.program_id(0) // key_tiles % n_blocks
    head_k = (tl.program_id(0) // key_tiles // n_blocks).to(tl.int64)
    first_key = tl.load(start + block, volatile=True)
    first_key += tl.program_id(0) % key_tiles * KEYS
    n_keys = (tl.load(end + block) - first_key).to(tl.int32)
    return block, head_k, first_key, n_keys


@triton.jit(do_not_specialize=["n_queries", "n_blocks"])
def current_kernel(
    dout, q, k, v, stats, cu_queries, position, start, end, dk, dv,
    dout_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides,
    softmax_scale, n_queries, n_blocks, key_tiles,
    RATIO: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what the queries of a block give to the gradients of one tile of its keys.

    stats is (H, n_queries, 2), see `stats_kernel`; cu_queries (n_blocks + 1,) is the
    first query of every block, position (n_queries,) the token of every query, and
    key_tiles the tiles of the longest block.
    """
    block, head_k, first_key, n_keys = locate_current(
        start, end, n_blocks, key_tiles, KEYS
    )
    first_query = tl.load(cu_queries + block)
    last_query = tl.load(cu_queries + block + 1)
    if (n_keys <= 0) | (first_query >= last_query):
        return
    # Within a block positions go up by one, and no query in front of a key reads it.
    ahead = tl.load(position + first_query) - first_query
    first_query = tl.maximum(first_query, first_key - ahead)
    n_rows = (last_query - first_query).to(tl.int32)
    if n_rows <= 0:
        return

    mask = within(tl.arange(0, KEYS) < n_keys, D, WIDTH)
    at_k = k + (first_key * k_strides[0] + head_k * k_strides[1])
    at_v = v + (first_key * v_strides[0] + head_k * v_strides[1])
    at_dv = dv + (first_key * dv_strides[0] + head_k * dv_strides[1])
    keys = load_tile(at_k, k_strides[0], mask, KEYS, WIDTH)
    values = load_tile(at_v, v_strides[0], mask, KEYS, WIDTH)
    sum_k = tl.zeros((KEYS, WIDTH), tl.float32)
    sum_v = load_tile(at_dv, dv_strides[0], mask, KEYS, WIDTH)
    q += first_query * q_strides[0]
    dout += first_query * dout_strides[0]
    stats += first_query * 2
    # The key that row 0 reads last, counted like the keys.
    last_key = (first_query + ahead - first_key).to(tl.int32)
    tiles = tl.cdiv(n_rows, ROWS)
    for i in tl.range(0, RATIO * tiles, num_stages=STAGES):
        head = head_k * RATIO + i // tiles
        skipped = (i % tiles * ROWS).to(tl.int64)
        row = tl.arange(0, ROWS)
        valid = i % tiles * ROWS + row < n_rows
        mask_rows = within(valid, D, WIDTH)
        at_q = q + (skipped * q_strides[0] + head * q_strides[1])
        at_dout = dout + (skipped * dout_strides[0] + head * dout_strides[1])
        at_stats = stats + (head * n_queries + skipped) * 2
        queries = load_tile(at_q, q_strides[0], mask_rows, ROWS, WIDTH)
        douts = load_tile(at_dout, dout_strides[0], mask_rows, ROWS, WIDTH)
        lse = tl.load(at_stats + row * 2, mask=valid, other=0.0)
        delta = tl.load(at_stats + row * 2 + 1, mask=valid, other=0.0)
        key, last = tl.arange(0, KEYS), last_key + i % tiles * ROWS + row
        readable = (key[:, None] <= last[None, :]) & (key < n_keys)[:, None]
        sum_k, sum_v, _ = add_key_gradients(
            sum_k, sum_v, keys, values, queries, douts, lse, delta, readable,
            softmax_scale * LOG2E, True,
        )  # fmt: skip

    # Found again, not kept: what lives through the loop takes registers away from it.
    block, head_k, first_key, n_keys = locate_current(
        start, end, n_blocks, key_tiles, KEYS
    )
    at_dk = dk + (first_key * dk_strides[0] + head_k * dk_strides[1])
    at_dv = dv + (first_key * dv_strides[0] + head_k * dv_strides[1])
    mask = within(tl.arange(0, KEYS) < n_keys, D, WIDTH)
    store_tile(at_dv, dv_strides[0], sum_v, mask, KEYS, WIDTH)
    sum_k *= softmax_scale
    sum_k += load_tile(at_dk, dk_strides[0], mask, KEYS, WIDTH)
    store_tile(at_dk, dk_strides[0], sum_k, mask, KEYS, WIDTH)


@triton.jit
def sum_over_slots(
    past, chosen, place, valid, stride, SLOTS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum the rows that (query, head) pairs have in `past`, where they chose a block.

    past is (places, SLOTS, D); chosen points to the first slot of the tile's first row,
    and `stride` is from row to row.
    """
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for slot in tl.range(0, SLOTS, num_stages=STAGES):
        named = tl.load(
            chosen + tl.arange(0, ROWS) * stride + slot, mask=valid, other=-1
        )
        at = past + (place * SLOTS + slot)[:, None] * D + tl.arange(0, WIDTH)[None, :]
        mask = within(valid & (named >= 0), D, WIDTH)
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["n_queries"])
def queries_kernel(
    dout, q, k, v, stats, selected, past, cu_queries, position, start, dq,
    dout_strides, q_strides, k_strides, v_strides, selected_strides, dq_strides,
    softmax_scale, n_queries, query_tiles, HEADS: tl.constexpr, RATIO: tl.constexpr,
    SLOTS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, DQ: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile of queries of one block and one head.

    selected is (n_queries, HEADS, SLOTS + 1), past what `past_kernel` leaves in dq for
    this DQ, query_tiles the tiles of the longest block; for the others see
    `current_kernel`.
    """
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    block = tl.program_id(0) // HEADS // query_tiles
    skipped = tl.program_id(0) // HEADS % query_tiles * ROWS
    first_query = tl.load(cu_queries + block)
    n_rows = (tl.load(cu_queries + block + 1) - first_query).to(tl.int32) - skipped
    if n_rows <= 0:
        return
    first_key = tl.load(start + block)
    # Keys of the block that row 0 reads; every next row reads one more.
    fewest = (tl.load(position + first_query) - first_key).to(tl.int32) + skipped + 1
    first_query += skipped

    row = tl.arange(0, ROWS)
    valid = row < n_rows
    mask = within(valid, D, WIDTH)
    at_q = q + (first_query * q_strides[0] + head * q_strides[1])
    at_dout = dout + (first_query * dout_strides[0] + head * dout_strides[1])
    at_stats = stats + (head * n_queries + first_query) * 2
    at_k = k + (first_key * k_strides[0] + head // RATIO * k_strides[1])
    at_v = v + (first_key * v_strides[0] + head // RATIO * v_strides[1])
    result = query_gradients(
        load_tile(at_q, q_strides[0], mask, ROWS, WIDTH),
        load_tile(at_dout, dout_strides[0], mask, ROWS, WIDTH),
        tl.load(at_stats + row * 2, mask=valid, other=0.0),
        tl.load(at_stats + row * 2 + 1, mask=valid, other=0.0),
        tl.where(valid, fewest + row, 0), at_k, at_v, k_strides[0], v_strides[0],
        fewest + tl.minimum(n_rows, ROWS) - 1, softmax_scale * LOG2E,
        D, WIDTH, ROWS, KEYS, STAGES, True,
    ) * softmax_scale  # fmt: skip
    place = (first_query + row) * HEADS + head
    if DQ == "atomic":
        at = past + place[:, None] * D + tl.arange(0, WIDTH)[None, :]
        result += tl.load(at, mask=mask, other=0.0)
    if DQ == "partial":
        chosen = selected + first_query * selected_strides[0]
        chosen += head * selected_strides[1]
        result += sum_over_slots(
            past, chosen, place, valid, selected_strides[0],
            SLOTS, D, WIDTH, ROWS, STAGES,
        )  # fmt: skip
    at_dq = dq + (first_query * dq_strides[0] + head * dq_strides[1])
    store_tile(at_dq, dq_strides[0], result, mask, ROWS, WIDTH)

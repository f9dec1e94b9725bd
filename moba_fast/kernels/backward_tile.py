"""What the kernels of the backward pass do with one tile of queries and keys.

With the merged lse of the forward pass a weight is p = exp(score - lse) whichever block
the key stands in, and the gradient of a score is p * (dout . v - delta), where delta is
dout . out (FlashAttention-2, arXiv 2307.08691, Algorithm 2).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def within(rows, D: tl.constexpr, WIDTH: tl.constexpr):
    """Turn a mask of rows into one of their elements, without padded columns."""
    mask = rows[:, None]
    if D < WIDTH:
        mask = mask & (tl.arange(0, WIDTH) < D)[None, :]
    return mask


@triton.jit
def load_tile(x, stride, mask, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Load rows that lie `stride` elements apart, (ROWS, WIDTH), 0 where masked."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    return tl.load(x + (row[:, None] * stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(x, stride, tile, mask, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Store what `load_tile` loads, in the dtype of x."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = x + (row[:, None] * stride + column[None, :])
    tl.store(at, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def add_key_gradients(
    sum_k, sum_v, keys, values, queries, dout, lse, delta, readable, scale,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what a tile of queries gives to the gradients of a tile of keys.

    Tiles are (KEYS, WIDTH) and (ROWS, WIDTH); lse (ROWS,) is in units of log 2 and
    scale holds log2(e); `readable`, used if MASKED, is broadcast to (KEYS, ROWS). Rows
    of zeros give nothing. sum_k lacks the factor softmax_scale, and so do the gradients
    of the scores, (KEYS, ROWS), which are returned after the sums.

    Scores stand with keys as rows: weights then leave the first two products in the
    layout in which the next two take them, and need no trip through shared memory.
    """
    scores = tl.dot(keys, queries.T, input_precision="ieee")
    weights = tl.exp2(scores * scale - lse[None, :])
    if MASKED:
        weights = tl.where(readable, weights, 0.0)
    sum_v = tl.dot(weights.to(dout.dtype), dout, sum_v, input_precision="ieee")
    dweights = tl.dot(values, dout.T, input_precision="ieee")
    dscores = (weights * (dweights - delta[None, :])).to(queries.dtype)
    sum_k = tl.dot(dscores, queries, sum_k, input_precision="ieee")
    return sum_k, sum_v, dscores


@triton.jit
def query_gradients(
    queries, dout, lse, delta, reach, k, v, k_stride, v_stride, n_keys, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of a tile of queries over the first n_keys keys of a block.

    k and v point to the first of them. If MASKED, row i reads the first reach[i] of the
    keys; if not, every row reads all, and KEYS divides n_keys. The others are as in
    `add_key_gradients`. Returns (ROWS, WIDTH) float32, without the factor
    softmax_scale.
    """
    key = tl.arange(0, KEYS)
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in tl.range(0, n_keys, KEYS, num_stages=STAGES):
        mask = within(first + key < n_keys if MASKED else key >= 0, D, WIDTH)
        skipped = tl.cast(first, tl.int64)
        keys = load_tile(k + skipped * k_stride, k_stride, mask, KEYS, WIDTH)
        values = load_tile(v + skipped * v_stride, v_stride, mask, KEYS, WIDTH)
        scores = tl.dot(queries, keys.T, input_precision="ieee")
        weights = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            readable = (first + key)[None, :] < reach[:, None]
            weights = tl.where(readable, weights, 0.0)
        dweights = tl.dot(dout, values.T, input_precision="ieee")
        dscores = (weights * (dweights - delta[:, None])).to(queries.dtype)
        dq = tl.dot(dscores, keys, dq, input_precision="ieee")
    return dq

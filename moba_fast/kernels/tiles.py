"""What the kernels do with tiles: load keys, and add them to a running attention."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moba_fast.kernels.tilings import padded

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def precision(dtype):
    """Name how exact products are: float32 must not be rounded for tensor cores."""
    return "ieee" if dtype == torch.float32 else "tf32"


def describe(x, rows):
    """Describe x to the GPU's own copies of tiles, if they can take it.

    Args:
        x: (S, H, D).
        rows: tokens of a tile.

    Returns:
        TensorDescriptor, or None where elements are apart, rows do not begin at
        multiples of 16 bytes, or x is expanded or empty.

    Example:
        >>> describe(torch.zeros(5, 2, 64), rows=16).block_shape
        [16, 1, 64]
        >>> describe(torch.zeros(5, 2, 63), rows=16) is None
        True
    """
    strides, size = list(x.stride()), x.element_size()
    token, head, column = strides
    # Addresses that are multiples of 16 have no 1 in their last four bits.
    aligned = not (x.data_ptr() | token * size | head * size) & 15
    if not aligned or token <= 0 or head <= 0 or column != 1 or x.numel() == 0:
        return None
    return TensorDescriptor(x, list(x.shape), strides, [rows, 1, padded(x.shape[2])])


@triton.jit
def column_mask(mask, column, D: tl.constexpr, WIDTH: tl.constexpr):
    """Take from a mask of rows (ROWS, 1) the columns from D on, if there are any."""
    if WIDTH > D:
        mask = mask & (column < D)[None, :]
    return mask


@triton.jit
def load_keys(
    x, strides, head, first, count,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Load a tile of keys or values of one head, (KEYS, WIDTH), from token `first` on.

    x is a pointer to (SK, HK, D) with the strides of its first two axes, or a
    descriptor of it if DESCRIBED. If MASKED, only `count` tokens are loaded and the
    others are 0: what is not finite in them must not reach rows that do not read them.
    """
    row, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    if DESCRIBED:
        tile = x.load([first, head, 0]).reshape(KEYS, WIDTH)
        if MASKED:
            tile = tl.where((row < count)[:, None], tile, 0.0)
    else:
        offset = (first + row).to(tl.int64) * strides[0]
        at = x + head.to(tl.int64) * strides[1] + offset[:, None] + column[None, :]
        if MASKED:
            mask = column_mask((row < count)[:, None], column, D, WIDTH)
            tile = tl.load(at, mask, 0.0)
        elif WIDTH > D:
            tile = tl.load(at, (column < D)[None, :], 0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def add_keys(
    acc, largest, total, queries, keys, values, readable, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the running attention of a tile of queries.

    A running attention is `acc` (ROWS, WIDTH) float32, the sum of weight times value,
    `largest` (ROWS,), the largest score times log2(e), and `total` (ROWS,), the sum of
    the weights 2 ** (score * log2(e) - largest). scale is softmax_scale * log2(e);
    `readable`, used if MASKED, is broadcast to (ROWS, KEYS).
    """
    scores = tl.dot(queries, keys.T, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(readable, scores, float("-inf"))
    before, largest = largest, tl.maximum(largest, tl.max(scores, 1) * scale)
    # -inf - -inf is NaN, and all scores so far may be -inf.
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(scores * scale - origin[:, None])
    shrink = tl.exp2(before - origin)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, largest, total

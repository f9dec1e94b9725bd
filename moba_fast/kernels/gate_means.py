"""Bring means and scores into the form that the gate compares."""

import torch
import triton
import triton.language as tl

from moba_fast.kernels.tilings import cdiv

# Numbers of a tile of means, which a program holds in registers.
TILE_SIZE = 8192
LEVELS = tl.constexpr(2.0**22 - 4)
# Products may round to a little more than the bound on them.
SLACK = tl.constexpr(1 + 2.0**-10)
SMALLEST_STEP = tl.constexpr(2.0**-126)


def split_means(k_mean, dtype, tile):
    """Write the means as sums of numbers of a dtype, scaled per key head.

    The scale is a power of two, so that it changes no order of scores: it keeps the
    second number of float16 in its range, and squares from overflowing.

    Args:
        k_mean: (N, HK, D) float32.
        dtype: of the queries.
        tile: Config.

    Returns:
        means: (parts, HK, N', width) of dtype, N' being N padded to whole tiles.
        norms: (2, HK) int32, the bits of float32: the largest |k_mean|, undefined where
            one program sees all of a head, and the largest squared norm of a scaled
            mean. Numbers that are not finite do not count.
    """
    n_blocks, heads, D = k_mean.shape
    padded = cdiv(n_blocks, tile.columns) * tile.columns
    means = k_mean.new_empty(tile.parts, heads, padded, tile.width, dtype=dtype)
    norms = k_mean.new_empty((2, heads), dtype=torch.int32)
    k_mean = k_mean.contiguous()
    rows = min(64, TILE_SIZE // tile.width)
    sizes = (n_blocks, heads, padded, D, tile.width, rows)
    grid = (cdiv(padded, rows), heads)
    if grid[0] > 1:
        largest_mean[grid](k_mean, norms.zero_(), *sizes, num_warps=4)
    exponent = 14 if dtype == torch.float16 else 1
    scale_means[grid](k_mean, norms, means, *sizes, tile.parts, exponent, num_warps=4)
    return means, norms


@triton.jit
def load_means(
    k_mean, n_blocks, heads, D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """Load a tile of the means of a head, 0 beyond them."""
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, WIDTH)
    row = block.to(tl.int64) * heads + tl.program_id(1)
    readable = (block < n_blocks)[:, None] & (column < D)[None, :]
    address = k_mean + row[:, None] * D + column[None, :]
    return tl.load(address, mask=readable, other=0)


@triton.jit
def finite_or_zero(x):
    """Replace NaN and infinities by 0."""
    return tl.where(tl.abs(x) < float("inf"), x, 0)


@triton.jit
def largest_bits(x):
    """Return the bits of the largest of x (TILE,), none of them negative, as int32."""
    return tl.max(x, 0).to(tl.int32, bitcast=True)


@triton.jit
def largest_of_tile(mean):
    """Return the bits of the largest finite |mean| of a tile."""
    return largest_bits(tl.max(tl.abs(finite_or_zero(mean)), 1))


@triton.jit
def raise_to(address, bits):
    """Raise a float32 that is not negative, in memory as int32, to at least another."""
    # Such floats are ordered like their bits, and a maximum has no order.
    tl.atomic_max(address, bits, sem="relaxed")


@triton.jit
def largest_mean(
    k_mean,
    norms,
    n_blocks,
    heads,
    padded,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Find the largest |k_mean| of every head."""
    mean = load_means(k_mean, n_blocks, heads, D, WIDTH, TILE)
    raise_to(norms + tl.program_id(1), largest_of_tile(mean))


@triton.jit
def scale_means(
    k_mean,
    norms,
    means,
    n_blocks,
    heads,
    padded,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """Scale the means of a head to less than 2^(EXPONENT + 1), and split them."""
    head = tl.program_id(1)
    mean = load_means(k_mean, n_blocks, heads, D, WIDTH, TILE)
    alone = tl.num_programs(0) == 1
    largest = largest_of_tile(mean)
    if not alone:
        largest = tl.load(norms + head)
    # The exponent of a float32 is in its bits 23 to 30, 127 standing for 0.
    scale = tl.minimum(254 + EXPONENT - (largest >> 23), 254) << 23
    mean *= scale.to(tl.float32, bitcast=True)
    square = finite_or_zero(mean) * finite_or_zero(mean)
    largest_square = largest_bits(tl.sum(square, 1))
    if alone:
        tl.store(norms + heads + head, largest_square)
    else:
        raise_to(norms + heads + head, largest_square)
    block, column = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    for part in tl.static_range(PARTS):
        row = (part * heads + head).to(tl.int64) * padded + block
        rounded = mean.to(means.dtype.element_ty)
        address = means + row[:, None] * WIDTH + column[None, :]
        tl.store(address, rounded, mask=(block < padded)[:, None])
        # What is not finite has no rest.
        mean = finite_or_zero(mean - rounded.to(tl.float32))


@triton.jit
def levels_per_score(q, largest_square):
    """Return by what scores of a row are multiplied to be integers below LEVELS.

    It is 0 for rows whose scores are all 0, or that are not finite.

    Args:
        q: (ROWS, WIDTH) queries.
        largest_square: the largest squared norm of a mean.
    """
    q = tl.abs(q.to(tl.float32))
    largest = tl.max(q, 1)
    unit = tl.where(largest > 0, largest, 1)
    q /= unit[:, None]
    bound = unit * tl.sqrt(tl.sum(q * q, 1)) * tl.sqrt(largest_square) * SLACK
    step = bound / LEVELS
    usable = (step > SMALLEST_STEP) & (step < float("inf"))
    return tl.where(usable, 1 / tl.where(usable, step, 1), 0)

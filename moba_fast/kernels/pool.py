"""Average the keys of every block in one pass over them."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from moba_fast.kernels.tilings import cdiv, power_of_2

# Keys that one program adds up: long blocks are divided, so that few of them still
# keep a GPU busy.
PART = 2048


@dataclass(frozen=True)
class Config:
    """Hold the tile of pool_keys: keys at a time, the padded D, and the warps."""

    rows: int
    width: int
    num_warps: int


@lru_cache
def config(D):
    """Choose the tile for heads of D dimensions: 8192 elements, or 64 keys.

    Example:
        >>> config(80)
        Config(rows=64, width=128, num_warps=4)
    """
    width = power_of_2(D)
    return Config(rows=min(64, 8192 // width), width=width, num_warps=4)


def configurations():
    """List every configuration that `config` may return, by the D that is widest."""
    return {D: config(D) for D in (1, 2, 4, 8, 16, 32, 64, 128, 256)}


def pool_keys(k, blocks):
    """Average the keys of every block.

    Keys are added up in float32, in an order that depends on the block's length alone.
    A block longer than PART keys is divided among programs, whose sums another kernel
    adds up in their order. Nothing waits for the device.

    Args:
        k: (SK, HK, D) keys, D at most 256.
        blocks: moba_fast.Blocks.

    Returns:
        k_mean: (N, HK, D) float32.
    """
    n_blocks, (heads, D) = blocks.start.shape[0], k.shape[1:]
    if k.stride(2) != 1:
        k = k.contiguous()
    k_mean = k.new_empty((n_blocks, heads, D), dtype=torch.float32)
    if k_mean.numel() == 0:
        return k_mean
    tile = config(D)
    parts = cdiv(blocks.longest, PART)
    sums = k_mean if parts == 1 else k_mean.new_empty(n_blocks, parts, heads, D)
    add_up[(n_blocks * parts, heads)](
        *(k, blocks.start, blocks.end, sums, *k.stride()[:2], heads, parts),
        *(D, tile.width, tile.rows, PART),
        num_warps=tile.num_warps,
    )
    if parts > 1:
        average_parts[(n_blocks, heads)](
            *(sums, blocks.start, blocks.end, k_mean, heads, parts),
            *(D, tile.width, tile.rows, PART),
            num_warps=tile.num_warps,
        )
    return k_mean


@triton.jit
def add_up(
    k,
    block_start,
    block_end,
    sums,
    stride_token,
    stride_head,
    heads,
    parts,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
):
    """Add up a part of the keys of a block; average them where parts is 1."""
    program, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block, part = program // parts, program % parts
    start, end = tl.load(block_start + block), tl.load(block_end + block)
    first = start + part * PART
    last = tl.minimum(first + PART, end)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for row in range(first, last, ROWS):
        token = row + tl.arange(0, ROWS)
        address = k + token[:, None] * stride_token + head * stride_head
        readable = (token < last)[:, None] & (column < D)[None, :]
        keys = tl.load(address + column[None, :], mask=readable, other=0)
        total += keys.to(tl.float32)
    result = tl.sum(total, 0)
    if parts == 1:
        result = tl.div_rn(result, (end - start).to(tl.float32) + tl.zeros_like(result))
    address = sums + (program * heads + head) * D
    tl.store(address + column, result, mask=column < D)


@triton.jit
def average_parts(
    sums,
    block_start,
    block_end,
    k_mean,
    heads,
    parts,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
):
    """Add up the sums of a block's parts and divide by its length."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(block_end + block) - tl.load(block_start + block)
    filled = tl.cdiv(length, PART)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for row in range(0, filled, ROWS):
        part = row + tl.arange(0, ROWS)
        address = sums + ((block * parts + part) * heads + head)[:, None] * D
        readable = (part < filled)[:, None] & (column < D)[None, :]
        total += tl.load(address + column[None, :], mask=readable, other=0)
    result = tl.sum(total, 0)
    result = tl.div_rn(result, length.to(tl.float32) + tl.zeros_like(result))
    tl.store(k_mean + (block * heads + head) * D + column, result, mask=column < D)

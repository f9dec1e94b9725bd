"""Differentiate the attention over the chosen blocks: what is launched, in order."""

from dataclasses import dataclass
from functools import cached_property

import torch

from moba_fast.blocks import Blocks
from moba_fast.kernels.backward_current import (
    current_kernel,
    queries_kernel,
    stats_kernel,
)
from moba_fast.kernels.backward_past import (
    add_sums_kernel,
    past_kernel,
    past_queries_kernel,
)
from moba_fast.kernels.backward_tilings import backward_tiling
from moba_fast.kernels.route import tile_map
from moba_fast.kernels.tilings import cdiv, gpu_family, padded

# Pairs of a list that one program takes, at least. Each further part of a list costs
# the traffic of dk and dv in float32: next to nothing per pair at this length.
FEWEST_PART_ROWS = 2048
PART_ROWS_PER_KEY = 16
# No kernel has more keys or queries in a tile.
LARGEST_TILE = 128
# Keys that one program of `add_sums_kernel` takes; a power of two.
SUM_ROWS = 16
# Tiles of its sums under way at once, plus one.
SUM_STAGES = 4


def attention_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    selected,
    lists,
    blocks,
    softmax_scale,
    dq,
    dk,
    dv,
    deterministic,
    atomic=None,
):
    """Write the gradient of the queries, add to the gradients of keys and values.

    Nothing waits for the device. Every sum is taken in a fixed order unless `atomic`.

    Blocks of one tile of keys: one kernel computes all three gradients from the weights
    of a pair, 5 products, and leaves a row in q's dtype for every pair. Longer blocks
    would have to add such a row up over their tiles in memory, in float32; two kernels
    with 4 and 3 products cost less than that. With `atomic` a pair needs no row: dq is
    added up in one float32 row per query, in any order, with 5 products.

    Args:
        dout: (S, H, D) gradient of out.
        q: (S, H, D) queries of this share.
        k: (SK, HK, D) keys.
        v: (SK, HK, D) values.
        out: (S, H, D) merged output.
        lse: (S, H) float32 merged log-sum-exp.
        selected: (S, H, topk) int32 block ids.
        lists: Lists of `selected`.
        blocks: Blocks of these queries.
        softmax_scale: factor on the scores, positive.
        dq: (S, H, D) result, any dtype and strides; its last axis has stride 1.
        dk: (SK, HK, D) float32, added to; its last axis has stride 1.
        dv: (SK, HK, D) float32, added to; its last axis has stride 1.
        deterministic: whether every run must give the same bits.
        atomic: whether dq is added up by atomic operations, which takes the least
            memory. None: where it saves products, in blocks of more than one tile of
            keys, if deterministic is false.

    Raises:
        ValueError: if both deterministic and atomic are asked for.
    """
    if deterministic and atomic:
        raise ValueError(
            "atomic=True adds in any order: pass deterministic=False with it"
        )
    if q.numel() == 0:
        return
    dout, q, k, v, out = (with_adjacent_columns(x) for x in (dout, q, k, v, out))
    shape = q.dtype, q.shape[2], blocks.block_size, gpu_family()
    tiling = backward_tiling(*shape)
    if atomic is None:
        atomic = not deterministic and blocks.block_size > tiling.past.keys
    if atomic:
        tiling = backward_tiling(*shape, atomic=True)
    stats = query_stats(dout, out, lse)
    inputs = Inputs(dout, q, k, v, stats, blocks, softmax_scale)
    past, mode = None, "none"
    if lists.slots:
        mode = "atomic" if atomic else "partial"
        past = differentiate_past(inputs, lists, tiling, mode, dk, dv)
    differentiate_current(inputs, tiling.current, dk, dv)
    finish_queries(inputs, selected, past, mode, tiling.queries, dq)


@dataclass(frozen=True)
class Inputs:
    """Hold what most kernels read; stats is (H, S, 2), see `stats_kernel`."""

    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    stats: torch.Tensor
    blocks: Blocks
    softmax_scale: float

    @property
    def tensors(self):
        """The tensors, in the order of the kernels' arguments."""
        return self.dout, self.q, self.k, self.v, self.stats

    @cached_property
    def strides(self):
        """Strides of dout, q, k and v over tokens and heads."""
        return strides(self.dout, self.q, self.k, self.v)


def strides(*tensors):
    """List the strides of tensors (tokens, heads, ...) over tokens and heads."""
    return [x.stride()[:2] for x in tensors]


def with_adjacent_columns(x):
    """Copy x (tokens, heads, D) if kernels cannot read its rows where they are.

    Offsets within a tile are 32 bits wide.
    """
    fits = x.stride(2) == 1 and x.stride(0) * LARGEST_TILE < 2**31
    return x if fits else x.contiguous()


def query_stats(dout, out, lse):
    """Compute what the kernels need of every query beside q and dout, (H, S, 2)."""
    n_queries, heads, size = dout.shape
    stats = lse.new_empty((heads, n_queries, 2), dtype=torch.float32)
    width = padded(size)
    rows = 4096 // width
    stats_kernel[(cdiv(n_queries * heads, rows),)](
        *(dout, out, lse, stats, *strides(dout, out, lse), n_queries),
        *(heads, size, width, rows),
    )
    return stats


def differentiate_past(inputs, lists, tiling, mode, dk, dv):
    """Add the past blocks' part to dk and dv and return that of the queries.

    Returns:
        (S * H * slots, D) in q's dtype, rows without a pair undefined, for mode
        "partial"; (S, H, D) float32 for "atomic".
    """
    q, blocks = inputs.q, inputs.blocks
    if mode == "atomic":
        past = q.new_zeros(q.shape, dtype=torch.float32)
    else:
        past = q.new_empty((lists.pairs.shape[0], q.shape[2]))
    # Past blocks are complete, so that there is none if all are shorter.
    if blocks.longest < blocks.block_size:
        return past
    one_pass = mode == "atomic" or blocks.block_size <= tiling.past.keys
    owned = mode if one_pass else "none"
    add_lists(inputs, lists, tiling.past, owned, past, dk, dv)
    if not one_pass:
        differentiate_pairs(inputs, lists, tiling.queries, past)
    return past


def add_lists(inputs, lists, tiling, mode, past, dk, dv):
    """Launch `past_kernel`, and `add_sums_kernel` for lists of several parts."""
    q, blocks = inputs.q, inputs.blocks
    n_blocks, key_tiles = blocks.start.shape[0], cdiv(blocks.block_size, tiling.keys)
    padded_keys = key_tiles * tiling.keys
    part_rows = max(FEWEST_PART_ROWS, PART_ROWS_PER_KEY * padded_keys)
    # Every part of a list but the first follows part_rows pairs of its own.
    most_sums = lists.pairs.shape[0] // part_rows
    sums = dk.new_empty((most_sums, 2, padded_keys, q.shape[2]))
    list_of_tile, first_tile = tile_map(lists, part_rows)
    past_kernel[(list_of_tile.shape[0] * key_tiles,)](
        *(*inputs.tensors, lists.pairs, lists.cu_pairs, list_of_tile, first_tile),
        *(blocks.start, past, dk, dv, sums, *inputs.strides, *strides(dk, dv)),
        *(inputs.softmax_scale, q.shape[0], n_blocks, blocks.block_size, part_rows),
        *(key_tiles, q.shape[1], lists.slots, *tile_constants(q, tiling)),
        *(blocks.block_size % tiling.keys == 0, mode),
        **tiling.options,
    )
    if most_sums:
        rows = min(SUM_ROWS, padded_keys)
        grid = (inputs.k.shape[1] * n_blocks * (padded_keys // rows),)
        add_sums_kernel[grid](
            *(sums, lists.cu_pairs, blocks.start, blocks.end, dk, dv),
            *(*strides(dk, dv), n_blocks, part_rows, padded_keys),
            *(q.shape[2], padded(q.shape[2]), rows, SUM_STAGES),
        )


def differentiate_pairs(inputs, lists, tiling, past):
    """Write the gradients of the queries of every pair into `past`."""
    q, blocks = inputs.q, inputs.blocks
    list_of_tile, first_tile = tile_map(lists, tiling.rows)
    past_queries_kernel[(list_of_tile.shape[0],)](
        *(*inputs.tensors, lists.pairs, lists.cu_pairs, list_of_tile, first_tile),
        *(blocks.start, past, *inputs.strides, inputs.softmax_scale),
        *(q.shape[0], blocks.start.shape[0], blocks.block_size),
        *(q.shape[1], lists.slots, *tile_constants(q, tiling)),
        blocks.block_size % tiling.keys == 0,
        **tiling.options,
    )


def differentiate_current(inputs, tiling, dk, dv):
    """Add the own blocks' part to dk and dv."""
    q, k, blocks = inputs.q, inputs.k, inputs.blocks
    n_blocks, key_tiles = blocks.start.shape[0], cdiv(blocks.longest, tiling.keys)
    current_kernel[(k.shape[1] * n_blocks * key_tiles,)](
        *(*inputs.tensors, inputs.blocks.cu_queries, blocks.position),
        *(blocks.start, blocks.end, dk, dv, *inputs.strides, *strides(dk, dv)),
        *(inputs.softmax_scale, q.shape[0], n_blocks, key_tiles),
        *(q.shape[1] // k.shape[1], *tile_constants(q, tiling)),
        **tiling.options,
    )


def finish_queries(inputs, selected, past, mode, tiling, dq):
    """Write dq: the own blocks' part, and what the past blocks gave."""
    q, k, blocks = inputs.q, inputs.k, inputs.blocks
    query_tiles = cdiv(blocks.longest, tiling.rows)
    queries_kernel[(blocks.start.shape[0] * query_tiles * q.shape[1],)](
        *(*inputs.tensors, selected, dq if past is None else past),
        *(inputs.blocks.cu_queries, blocks.position, blocks.start, dq, *inputs.strides),
        *(*strides(selected, dq), inputs.softmax_scale, q.shape[0], query_tiles),
        *(q.shape[1], q.shape[1] // k.shape[1], selected.shape[2] - 1),
        *(*tile_constants(q, tiling), mode),
        **tiling.options,
    )


def tile_constants(q, tiling):
    """Return what kernels know of their tiles when compiled: D, WIDTH, ROWS, ..."""
    size = q.shape[2]
    return size, padded(size), tiling.rows, tiling.keys, tiling.stages

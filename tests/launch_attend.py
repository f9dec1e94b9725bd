"""Launches of the kernels that attend, to be compiled by `compiled`."""

import torch

from moba_fast.blocks import partition
from moba_fast.kernels import attend, combine
from moba_fast.route import Lists

HEADS, HEADS_K = 4, 2


def tensors(dtype, D, block_size):
    """Return q, k, v and blocks of two blocks."""
    n = 2 * block_size
    q = torch.zeros(n, HEADS, D, dtype=getattr(torch, dtype))
    k, v = (q.new_zeros(n, HEADS_K, D) for _ in "kv")
    return q, k, v, partition([0, n], block_size)


def attend_past(dtype, D, block_size, slots=7):
    q, k, v, blocks = tensors(dtype, D, block_size)
    pairs = torch.zeros(len(q) * HEADS * slots, dtype=torch.int32)
    cu_pairs = torch.zeros(HEADS_K * len(blocks.start) + 1, dtype=torch.int32)
    attend.attend_past(q, k, v, Lists(pairs, cu_pairs, slots), blocks, 0.1)


def attend_current(dtype, D, block_size, slots=7):
    q, k, v, blocks = tensors(dtype, D, block_size)
    out_past = q.new_zeros(len(q) * HEADS * slots, D)
    lse_past = torch.zeros(len(out_past))
    selected = torch.zeros(len(q), HEADS, slots + 1, dtype=torch.int32)
    results = torch.empty_like(q), torch.zeros(len(q), HEADS)
    combine.attend_current(q, k, v, out_past, lse_past, selected, blocks, 0.1, *results)

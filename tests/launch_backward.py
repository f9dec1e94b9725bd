"""Launches of the kernels of the backward pass, to be compiled by `compiled`."""

import torch

from moba_fast.blocks import partition
from moba_fast.kernels import backward
from moba_fast.route import Lists

HEADS, HEADS_K = 4, 2


def attention_backward(dtype, D, block_size, slots=7, deterministic=True):
    # Enough pairs for a list of several parts.
    n = max(2 * block_size, 1024)
    q = torch.zeros(n, HEADS, D, dtype=getattr(torch, dtype))
    k, v = (q.new_zeros(n, HEADS_K, D) for _ in "kv")
    blocks, lse = partition([0, n], block_size), torch.zeros(n, HEADS)
    pairs = torch.zeros(n * HEADS * slots, dtype=torch.int32)
    cu_pairs = torch.zeros(HEADS_K * len(blocks.start) + 1, dtype=torch.int32)
    selected = torch.zeros(n, HEADS, slots + 1, dtype=torch.int32)
    dk, dv = (torch.zeros(k.shape) for _ in "kv")
    backward.attention_backward(
        *(q, q, k, v, q, lse, selected, Lists(pairs, cu_pairs, slots), blocks, 0.1),
        *(torch.empty_like(q), dk, dv, deterministic),
        atomic=not deterministic,
    )

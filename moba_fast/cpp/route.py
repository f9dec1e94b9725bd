"""List, for every key/value head and block, the pairs that read it."""

import torch

from moba_fast.cpp.build import call, check
from moba_fast.route import Lists


def build_lists(selected, blocks, heads_k):
    """List, for every key/value head and block, the pairs that read it.

    Same contract as moba_fast.kernels.route.build_lists, on a CPU.
    """
    n_queries, heads, topk = selected.shape
    n_blocks, slots = len(blocks.start), topk - 1
    pairs = selected.new_empty(n_queries * heads * slots)
    cu_pairs = selected.new_empty(heads_k * n_blocks + 1)
    call(
        *("build_lists", check(selected, torch.int32).contiguous()),
        *(n_queries, heads, heads_k, n_blocks),
        *(slots, pairs, cu_pairs),
    )
    return Lists(pairs, cu_pairs, slots)

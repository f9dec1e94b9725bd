"""Choose the blocks of every query while their scores pass by."""

import torch

from moba_fast import gate
from moba_fast.cpp.attend import with_strides
from moba_fast.cpp.build import call, check

# As many as gate.cpp keeps, less the one that a choice is compared with.
MOST_SLOTS = 63


def select_blocks(q, k_mean, blocks, topk):
    """Choose the topk best blocks of every query, its current block among them.

    Same contract as moba_fast.select_blocks, for float32 on a CPU. Where the best
    blocks are tied with the next one, or a score is NaN or infinite, moba_fast's gate
    chooses.
    """
    if not 1 < topk <= MOST_SLOTS + 1 or k_mean.numel() == 0:
        return gate.select_blocks(q, k_mean, blocks, topk)
    (n_queries, heads, D), heads_k = q.shape, k_mean.shape[1]
    selected = blocks.of_query.new_empty(n_queries, heads, topk, dtype=torch.int32)
    unclear = torch.empty(n_queries, heads, dtype=torch.bool, device="cpu")
    rounding = gate.TIE_ROUNDINGS * torch.finfo(torch.float32).eps
    call(
        *("select_blocks", *with_strides(q), check(k_mean, torch.float32).contiguous()),
        *(k_mean.norm(dim=-1).T.contiguous(), blocks.first_of_query, blocks.of_query),
        *(n_queries, heads, heads_k, len(k_mean), D, topk - 1, rounding),
        *(selected, unclear),
    )
    queries = unclear.any(1).nonzero().ravel()
    if len(queries):
        these = blocks.of_some(queries)
        selected[queries] = gate.select_blocks(q[queries], k_mean, these, topk)
    return selected

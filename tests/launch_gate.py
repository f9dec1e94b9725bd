"""Calls of every stage's host function with little data, for `compiled.py`.

Nothing here looks at results: launches that only compile leave them undefined.
"""

import torch

import moba_fast
from moba_fast.kernels import gate, pool, route

TOKENS = 256


def inputs(dtype="bfloat16", D=128, block_size=128, ratio=1, topk=3, HK=1):
    """Return q, k, v, selected and blocks of one sequence, on the CPU."""
    dtype = getattr(torch, dtype)
    q = torch.zeros(TOKENS, HK * ratio, D, dtype=dtype)
    k, v = torch.zeros(2, TOKENS, HK, D, dtype=dtype)
    selected = torch.zeros(TOKENS, HK * ratio, topk, dtype=torch.int32)
    return q, k, v, selected, moba_fast.partition([0, TOKENS], block_size)


def build_lists(**case):
    _, k, _, selected, blocks = inputs(**case)
    lists = route.build_lists(selected, blocks, k.shape[1])
    route.tile_map(lists, rows=64)


def pool_keys(block_size=128, **case):
    _, k, _, _, blocks = inputs(block_size=block_size, **case)
    pool.pool_keys(k, blocks)


def select_blocks(topk=8, tokens=TOKENS, **case):
    q, k, _, _, blocks = inputs(topk=topk, **case)
    k_mean = torch.zeros(len(blocks.start), *k.shape[1:])
    blocks = blocks.of_queries(0, tokens)
    gate.select_blocks(q[:tokens], k_mean, blocks, topk)

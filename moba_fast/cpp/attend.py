"""Attend from the queries of every list to the keys of its block."""

import torch

from moba_fast.cpp.build import call, check
from moba_fast.cpp.memory import Scratch


def attend_past(q, k, v, lists, blocks, softmax_scale, scratch=None):
    """Attend from the queries of every list to all keys of the list's block.

    Same contract as moba_fast.kernels.attend.attend_past, for float32 on a CPU.
    Results are taken from `scratch`, if there is one.
    """
    n_pairs, D, block_size = len(lists.pairs), q.shape[2], blocks.block_size
    scratch = scratch or Scratch()
    out, lse = scratch.take("out", n_pairs, D), scratch.take("lse", n_pairs)
    # Past blocks are complete, so where no block is there are none.
    if n_pairs == 0 or blocks.longest < block_size:
        return out, lse
    vectors = with_strides(q, k, v)
    call(
        *("attend_past", *vectors, lists.pairs, lists.cu_pairs, blocks.start),
        *(k.shape[1], len(blocks.start), block_size, q.shape[1], lists.slots, D),
        *(float(softmax_scale), out, lse),
    )
    return out, lse


def with_strides(*tensors):
    """List tensors (S, H, D), each with the strides of S and H.

    Elements of a vector are made to be adjacent. Other dtypes than float32 and other
    devices than a CPU are a TypeError.
    """
    tensors = [check(x, torch.float32) for x in tensors]
    adjacent = [x if x.stride(2) == 1 else x.contiguous() for x in tensors]
    return [part for x in adjacent for part in (x, *x.stride()[:2])]

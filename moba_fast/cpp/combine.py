"""Attend to the own block and merge the results of the past blocks with it."""

import torch

from moba_fast.cpp.attend import with_strides
from moba_fast.cpp.build import call, check


def attend_current(
    q, k, v, out_past, lse_past, selected, blocks, softmax_scale, out, lse
):
    """Attend from every query to its own block and merge its past results with that.

    Same contract as moba_fast.kernels.combine.attend_current, for float32 on a CPU.
    """
    (n_queries, heads, D), slots = q.shape, selected.shape[2] - 1
    if out.stride(2) != 1:
        raise ValueError(
            f"expected out with adjacent elements, got strides {out.stride()}; "
            "make it by torch.empty"
        )
    call(
        *("attend_current", *with_strides(q, k, v)),
        check(selected, torch.int32).contiguous(),
        *(blocks.of_query, blocks.position, blocks.start),
        *(n_queries, heads, k.shape[1], slots, D, float(softmax_scale)),
        *(out_past, lse_past, out, *out.stride()[:2], lse, *lse.stride()),
    )

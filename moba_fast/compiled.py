"""Run the four steps by the C++ functions of `moba_fast.cpp`, on a CPU.

`op` imports this module where a call runs them. Gradients are those of PyTorch's flash
operator, from the results of these functions.
"""

from moba_fast.cpp.attend import attend_past
from moba_fast.cpp.combine import attend_current
from moba_fast.cpp.gate import select_blocks
from moba_fast.cpp.memory import Scratch, empty
from moba_fast.cpp.route import build_lists
from moba_fast.gate import pool_keys
from moba_fast.workspace import compiled_parts


def select(q, k, blocks, topk):
    """Step 1, assign: choose the blocks of every query, (S, H, topk) int32."""
    return select_blocks(q, pool_keys(k, blocks), blocks, topk)


def attend(q, k, v, selected, blocks, softmax_scale, limit):
    """Steps 2 to 4: arrange, attend and combine.

    Same contract as `moba_fast.fused.attend`, for float32 on a CPU; `selected` may have
    any integer dtype.
    """
    selected = selected.int()
    out, lse, scratch = empty(*q.shape), empty(*q.shape[:2]), Scratch()
    for part in compiled_parts(q, k, selected.shape[2], limit):
        keys, values = (
            heads_first(x[:, part.heads_k], scratch, name)
            for name, x in (("keys", k), ("values", v))
        )
        for a, b in part.queries:
            some_q = heads_first(q[a:b, part.heads], scratch, "queries")
            chosen, *results = (x[a:b, part.heads] for x in (selected, out, lse))
            these = blocks.of_queries(a, b)
            lists = build_lists(chosen, these, keys.shape[1])
            inputs = some_q, keys, values
            past = attend_past(*inputs, lists, these, softmax_scale, scratch)
            attend_current(*inputs, *past, chosen, these, softmax_scale, *results)
    return out, lse


def heads_first(x, scratch, name):
    """Copy x (S, H, D) so that the vectors of one head lie in a row; same shape."""
    n, heads, D = x.shape
    return scratch.take(name, heads, n, D).transpose(0, 1).copy_(x)

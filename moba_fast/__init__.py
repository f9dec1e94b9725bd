"""Mixture of Block Attention for PyTorch: the fast twin of `moba_ref`.

The files, functions, axes and results are those of `moba_ref`, whose docstring has
the legend. Tensors may be float64, float32, bfloat16 or float16, on a CPU or a GPU.
Scores, log-sum-exps and sums are float32, or float64 for float64 inputs.

Without a twin: `PagedKVCache`, which decodes and prefills in chunks, and `backends`.
"""

from moba_fast.attend import attend_current, attend_past
from moba_fast.backends import Backend, backends
from moba_fast.backward import moba_attention_backward
from moba_fast.blocks import Blocks, partition
from moba_fast.cache import PagedKVCache
from moba_fast.combine import combine, merge
from moba_fast.gate import gate_scores, pool_keys, select_blocks
from moba_fast.moba import moba_attention
from moba_fast.pages import OutOfPagesError
from moba_fast.route import Routing, route

__all__ = [
    "Backend",
    "Blocks",
    "OutOfPagesError",
    "PagedKVCache",
    "Routing",
    "attend_current",
    "attend_past",
    "backends",
    "combine",
    "gate_scores",
    "merge",
    "moba_attention",
    "moba_attention_backward",
    "partition",
    "pool_keys",
    "route",
    "select_blocks",
]

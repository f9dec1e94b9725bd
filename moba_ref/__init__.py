"""Mixture of Block Attention as a specification: NumPy, float64, loops that explain.

Read the files in the order of the data: ``blocks`` cuts the context, ``gate`` lets
every query choose, ``route`` turns the choice around, ``attend`` computes the parts,
``combine`` merges them, ``moba`` calls all of it, ``backward`` differentiates it.
``definition`` says the same from the paper's equations and shares no code with them.
`moba_fast` has the same files with the same functions.

Legend, for every docstring of the three packages:

====== =====================================================================
S      query tokens of all sequences, packed one after the other
SK     key tokens, equal to S unless ``cu_seqlens_k`` is given
H, HK  query heads, key/value heads; query head h reads head h // (H // HK)
D      head dimension
N      blocks of all sequences
K      topk, the blocks a query reads, its own included
P      routed (query, head, past block) pairs
B      sequences in the pack
====== =====================================================================

Arrays are tokens first: q is (S, H, D). A log-sum-exp (lse) is a natural logarithm.
"""

from moba_ref.attend import attend_current, attend_past
from moba_ref.backward import moba_attention_backward
from moba_ref.blocks import Blocks, partition
from moba_ref.combine import combine, merge
from moba_ref.definition import moba_attention_definition, token_mask
from moba_ref.gate import gate_scores, pool_keys, select_blocks
from moba_ref.moba import moba_attention
from moba_ref.route import Routing, route

__all__ = [
    "Blocks",
    "Routing",
    "attend_current",
    "attend_past",
    "combine",
    "gate_scores",
    "merge",
    "moba_attention",
    "moba_attention_backward",
    "moba_attention_definition",
    "partition",
    "pool_keys",
    "route",
    "select_blocks",
    "token_mask",
]

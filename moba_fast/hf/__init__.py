"""MoBA inside Hugging Face transformers.

Two lines switch a model:

    import moba_fast.hf
    moba_fast.hf.enable(model, block_size=512, topk=3)

or `from_pretrained(..., attn_implementation="moba")` after the import. Prefill, also in
chunks, is MoBA; generated tokens and the last layers attend in full, as in the paper.
"""

from moba_fast.hf.paged import MobaCache
from moba_fast.hf.switch import disable, enable, register

__all__ = ["MobaCache", "disable", "enable", "register"]

register()

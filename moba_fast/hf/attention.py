"""Attend for a layer of a transformers model: MoBA, or in full where that is asked."""

import torch
from torch.nn.functional import pad

from moba_fast.blocks import partition
from moba_fast.hf.library import attend_step, attend_window
from moba_fast.hf.masks import QUERY, REAL
from moba_fast.hf.packing import make_pack, sequence_of_tokens
from moba_fast.hf.paged import pages_of
from moba_fast.hf.settings import full_layers, settings_of
from moba_fast.hf.sinks import attend_with_sink, merge_sink
from moba_fast.moba import moba_attention, under_autocast

# Tokens of a sequence at most.
LONGEST = 2**30


def moba_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    position_ids=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    output_attentions=False,
    s_aux=None,
    moba_generated=0,
    **others,
):
    """Attend as a layer's settings say: the attention function "moba".

    Args:
        module: attention module, with `config` and `layer_idx`.
        query: (B, H, Sq, D) queries, the last tokens of their rows.
        key: (B, HK, S, D) keys, those in the cache included; HK divides H.
        value: (B, HK, S, DV) values.
        attention_mask: what `moba_mask` returned.
        dropout: must be 0.
        scaling: factor on the scores. None: D ** -0.5.
        sliding_window: tokens of the window of a layer that has one; such a layer runs
            the library's own attention.
        position_ids: (B, Sq) positions, which tell where packed sequences begin.
        cu_seq_lens_q: offsets of packed sequences, which tell it better.
        cu_seq_lens_k: offsets of their keys. None: the same.
        output_attentions: whether to return the selected blocks.
        s_aux: (H,) logits of attention sinks.
        moba_generated: how many of the last queries are generated tokens, which
            decode="full" lets attend in full. A single query with a cache is one.
        others: what else the library gives.

    Returns:
        out: (B, Sq, H, DV); zero for padding.
        selected: (B, H, Sq, topk) int32 block ids, counted from the first real token of
            each sequence, as in `moba_attention`; -1 for none and for padding. Without
            blocks, (B, H, Sq, 0), from layers that attend in full. None unless wanted.

    Raises:
        ValueError: if something is asked for that would be no MoBA.
    """
    check_call(module, 0 if sliding_window else dropout, attention_mask, others)
    if sliding_window is not None:
        packed = attention_mask, position_ids, cu_seq_lens_q
        sequence = sequence_of_tokens(query.shape[::2], key.shape[2], *packed)
        sequence = sequence if sequence is None else sequence.to(query.device)
        tensors = module, query, key, value, attention_mask, sequence
        out = attend_window(*tensors, dropout, scaling, sliding_window, s_aux)
        return out, no_blocks(query) if output_attentions else None
    settings, n_queries = settings_of(module.config), query.shape[2]
    full = n_queries if module.layer_idx in full_layers(module.config) else 0
    if settings["decode"] == "full":
        full = n_queries if n_queries == 1 else max(full, moba_generated)
    query, key, value = under_autocast(query, key, value)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    call = Call(
        module, key, value, attention_mask, scaling, s_aux, position_ids,
        cu_seq_lens_q, cu_seq_lens_k,
    )  # fmt: skip
    out, selected = None, no_blocks(query)
    if full < n_queries:
        sizes = settings["block_size"], settings["topk"]
        out, selected = call.attend(query, *sizes, output_attentions)
    if full:
        in_full = call.attend_in_full(query, full)
        out = in_full if out is None else torch.cat([out[:, :-full], in_full], dim=1)
    return out.contiguous(), selected if output_attentions else None


class Call:
    """Hold what the attention of one layer needs beside its queries."""

    def __init__(
        self, module, key, value, roles, scaling, s_aux, position_ids, *offsets
    ):
        self.module, self.key, self.value = module, key, value
        self.roles, self.scaling, self.s_aux = roles, scaling, s_aux
        self.position_ids, self.offsets = position_ids, offsets
        self.pages = pages_of(key)
        if self.pages is not None:
            self.pages.append(roles)

    def attend(self, query, block_size, topk, with_blocks):
        """Attend by MoBA from all queries; see `moba_attention_forward`."""
        if self.pages is not None:
            self.pages.check_block_size(block_size)
            out, lse, selected = self.pages.attend(
                query, topk, self.scaling, with_blocks
            )
            return merge_sink(out, lse, self.s_aux), selected
        batch, pack = self.pack(query)
        out, selected = self.run(query, pack, block_size, topk, with_blocks)
        if with_blocks:
            # Blocks are counted through the whole pack.
            first = first_blocks(pack, selected.device, block_size)
            selected = torch.where(selected < 0, -1, selected - first).int()
            selected = pack.unpack(selected, batch, -1).transpose(1, 2)
        return pack.unpack(out, batch), selected

    def attend_in_full(self, query, count):
        """Attend to everything before them from the last queries.

        Returns:
            out: (B, count, H, DV).
        """
        if self.pages is not None:
            out, lse, _ = self.pages.attend(query, None, self.scaling, False)
            return merge_sink(out, lse, self.s_aux)[:, -count:]
        if count < query.shape[2]:
            return self.last(query, count)
        if count == 1 and query.shape[2] == 1:
            return attend_step(
                self.module, query, self.key, self.value, self.roles, self.scaling,
                self.s_aux,
            )  # fmt: skip
        batch, pack = self.pack(query)
        # Where every sequence is one block, its current block is all of it.
        size = max(1, self.key.shape[2])
        if torch.compiler.is_compiling():
            # A length that becomes a block size would be compiled for itself.
            size = LONGEST
        out, _ = self.run(query, pack, size, 1, False)
        return pack.unpack(out, batch)

    def last(self, query, count):
        """Attend in full from some of the last queries, as a call of their own."""
        rest, roles = query.shape[2] - count, self.roles
        if roles is not None:
            # The earlier queries are keys only.
            is_query = (roles & QUERY).bool()
            earlier = is_query & (is_query.cumsum(-1) <= rest)
            roles = torch.where(earlier, roles & REAL, roles)
        positions = self.position_ids
        if positions is not None and positions.ndim == 2:
            positions = positions[:, -count:]
        call = Call(
            self.module, self.key, self.value, roles, self.scaling, self.s_aux,
            positions, *self.offsets,
        )  # fmt: skip
        return call.attend_in_full(query[:, :, -count:], count)

    def pack(self, query):
        """Return (B, Sq) and the Pack of some queries and all keys."""
        batch = (query.shape[0], query.shape[2])
        given = self.roles, self.position_ids, *self.offsets
        return batch, make_pack(batch, self.key.shape[2], *given)

    def run(self, query, pack, block_size, topk, with_blocks):
        """Attend within a pack: out (Q, H, DV), and selected where it is wanted."""
        size, wanted = query.shape[3], self.value.shape[3]
        q, k, v = pack.queries(query), pack.keys(self.key), pack.keys(self.value)
        if size != wanted:
            # Zeros add nothing to scores, and what they add to values is cut off.
            q, k, v = (pad(x, (0, max(size, wanted) - x.shape[2])) for x in (q, k, v))
        options = {
            "block_size": block_size,
            "topk": topk,
            "cu_seqlens": pack.cu_q,
            "cu_seqlens_k": pack.cu_k,
            "softmax_scale": self.scaling,
        }
        if self.s_aux is None and not with_blocks:
            return moba_attention(q, k, v, **options)[..., :wanted], None
        if self.s_aux is None:
            out, _, selected = moba_attention(q, k, v, **options, return_aux=True)
        else:
            out, selected = attend_with_sink(q, k, v, self.s_aux, **options)
        return out[..., :wanted], selected


def first_blocks(pack, device, block_size):
    """Return the first block of every query's sequence, (Q, 1, 1); 0 for one only."""
    if pack.cu_q is None:
        return 0
    cu_q = torch.as_tensor(pack.cu_q, device=device)
    cu_k = cu_q if pack.cu_k is None else torch.as_tensor(pack.cu_k, device=device)
    return partition(cu_k, block_size, cu_q).first_of_query[:, None, None]


def no_blocks(query):
    """Return the choice of a layer without one, (B, H, Sq, 0) int32."""
    return query.new_empty((*query.shape[:3], 0), dtype=torch.int32)


def check_call(module, dropout, attention_mask, others):
    """Raise ValueError where MoBA cannot give what a layer asks for."""
    asked = {
        "softcap": "its kernels have no soft cap on scores",
        "position_bias": "it has no bias on scores",
        "read_index": "continuous batching has a cache of its own; use generate",
        "write_index": "continuous batching has a cache of its own; use generate",
        "block_table": "continuous batching has a cache of its own; use generate",
    }
    for name, why in asked.items():
        if others.get(name) is not None:
            raise ValueError(f"MoBA cannot take {name}: {why}")
    causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError("MoBA is causal, and this layer attends in both directions")
    if dropout:
        raise ValueError(
            f"MoBA has no dropout inside attention, got {dropout}; set "
            f"config.attention_dropout to 0 before the model is made"
        )
    if attention_mask is not None:
        check_roles(attention_mask)


def check_roles(attention_mask):
    """Raise ValueError unless a mask comes from `moba_mask`."""
    shape, dtype = attention_mask.shape, attention_mask.dtype
    if len(shape) != 4 or shape[1:3] != (1, 1) or dtype != torch.int8:
        raise ValueError(
            f"MoBA takes attention masks of shape (batch, tokens), which say what is "
            f"padding; got one of shape {tuple(shape)} and {dtype}. Packed sequences "
            f"are told by position_ids or cu_seq_lens_q"
        )

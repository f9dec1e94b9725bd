"""Run the library's own attention for single queries and for sliding windows."""

import sys

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moba_fast.hf.masks import QUERY, REAL

# Queries taken at a time where the window is smaller.
FEWEST = 128


def attend_step(module, query, key, value, roles, scaling, s_aux):
    """Attend in full from one query per row, with a mask of one row.

    Args:
        module: attention module.
        query: (B, H, 1, D).
        key: (B, HK, S, D).
        value: (B, HK, S, DV).
        roles: what `moba_mask` returned.
        scaling: factor on the scores.
        s_aux: (H,) logits of attention sinks, or None.

    Returns:
        out: (B, 1, H, DV); zero for padding.
    """
    mask = None if roles is None else (roles & REAL).bool()
    out = attend(module, query, key, value, mask, 0.0, scaling, s_aux)
    if roles is None:
        return out
    padding = (roles == QUERY).any(-1)[..., None]
    return out.masked_fill(padding, 0)


def attend_window(
    module, query, key, value, roles, sequence, dropout, scaling, window, s_aux
):
    """Attend in a sliding window, some queries at a time.

    Args:
        module: attention module.
        query: (B, H, Sq, D).
        key: (B, HK, S, D).
        value: (B, HK, S, DV).
        roles: what `moba_mask` returned.
        sequence: (B, S) which packed sequence a token is of; None: one in every row.
        dropout: on the weights.
        scaling: factor on the scores.
        window: slots that a query reads, its own included.
        s_aux: (H,) logits of attention sinks, or None.

    Returns:
        out: (B, Sq, H, DV); zero for padding.
    """
    n, n_keys = query.shape[2], key.shape[2]
    first, step = n_keys - n, max(window, FEWEST)
    if roles is not None:
        first = (roles[0, 0, 0] & QUERY).argmax()
        if torch.compiler.is_compiling():
            step = n
        else:
            first = int(first)
    parts = []
    for a in range(0, n, step):
        b = min(n, a + step)
        low, high = 0, n_keys
        if isinstance(first, int):
            low, high = max(0, first + a - window + 1), first + b
        mask = window_mask(roles, sequence, first, (a, b), (low, high), window, key)
        keys, values = key[:, :, low:high], value[:, :, low:high]
        options = mask, dropout, scaling, s_aux
        parts.append(attend(module, query[:, :, a:b], keys, values, *options))
    out = torch.cat(parts, dim=1)
    if roles is None:
        return out
    at = first + torch.arange(n, device=roles.device)
    real = (roles[:, 0, 0] & REAL).bool().index_select(1, at)
    return out.masked_fill(~real[..., None, None], 0)


def window_mask(roles, sequence, first, queries, keys, window, like):
    """Mark which of some keys every one of some queries reads, (B, 1, m, n)."""
    slot_q = first + torch.arange(*queries, device=like.device)[:, None]
    slot_k = torch.arange(*keys, device=like.device)
    mask = ((slot_k <= slot_q) & (slot_k > slot_q - window))[None, None]
    if roles is not None:
        mask = mask & (roles[..., slice(*keys)] & REAL).bool()
    if sequence is not None:
        same = sequence[:, slot_q] == sequence[:, None, slice(*keys)]
        mask = mask & same[:, None]
    # A softmax over nothing would be NaN, so that padding reads itself.
    return mask | (slot_k == slot_q)


def attend(module, query, key, value, mask, dropout, scaling, s_aux):
    """Attend with `sdpa`, or with the model's eager function where it has sinks.

    Args:
        module: attention module.
        query: (B, H, Sq, D).
        key: (B, HK, S, D).
        value: (B, HK, S, DV).
        mask: bool, broadcasts to (B, H, Sq, S), True where a query reads; or None.
        dropout: on the weights.
        scaling: factor on the scores.
        s_aux: (H,) logits of attention sinks, or None.

    Returns:
        out: (B, Sq, H, DV).
    """
    options = {"dropout": dropout, "scaling": scaling}
    if s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, is_causal=False, **options
        )[0]
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if mask is not None:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    return eager(module, query, key, value, mask, s_aux=s_aux, **options)[0]

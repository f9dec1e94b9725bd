"""Say how much of a dense model's attention MoBA would keep, by layer and head."""

from unittest.mock import patch

import torch

import moba_fast.hf.attention as hf
from moba_fast import moba_attention
from moba_fast.blocks import partition
from moba_fast.gate import pool_keys, select_blocks
from moba_lab.convert.model import evaluating


def queries_and_keys(model, ids):
    """Return what every layer of a dense model compares.

    Args:
        model: causal language model of transformers, in full attention.
        ids: (S,) token ids.

    Returns:
        list of (q, k) of every layer, (S, H, D) and (S, HK, D), after rotary embedding.
    """
    found = []

    def spy(q, k, v, **options):
        found.append((q, k))
        return moba_attention(q, k, v, **options)

    # A block that holds everything is full attention, by the call that can be watched.
    whole = {"block_size": len(ids), "topk": 1, "full_layers": [], "decode": "full"}
    watched = patch.object(hf, "moba_attention", spy)
    with torch.no_grad(), watched, evaluating(model, whole, None):
        model(torch.as_tensor(ids)[None], use_cache=False)
    return found


def kept(q, k, block_size, topk, queries, best=False):
    """Return the share of full attention's weights that the chosen blocks hold.

    Args:
        q: (S, H, D), one sequence.
        k: (S, HK, D).
        block_size: tokens per block.
        topk: blocks per query, the current one included.
        queries: (Q,) which ones to ask.
        best: choose the past blocks that hold most, instead of asking the gate; no
            gate can keep more.

    Returns:
        (H, Q) shares, 0 to 1.

    >>> q = k = torch.eye(8)[:, None]
    >>> kept(q, k, block_size=8, topk=1, queries=torch.tensor([7])).item()
    1.0
    """
    blocks = partition([0, len(k)], block_size)
    weights = block_weights(q, k, blocks, queries)
    own = torch.as_tensor(blocks.of_token, device=q.device)[queries]
    if best:
        past = weights.scatter(2, own[None, :, None].expand(len(weights), -1, 1), -1.0)
        count = min(topk - 1, weights.shape[2])
        chosen = past.topk(count, dim=2).values.clamp(min=0).sum(2)
        current = weights.gather(2, own[None, :, None].expand(len(weights), -1, 1))
        return chosen + current[..., 0]
    selected = select_blocks(q, pool_keys(k, blocks), blocks, topk)[queries]
    selected = selected.transpose(0, 1).long()
    read = weights.gather(2, selected.clamp(min=0))
    return read.masked_fill(selected < 0, 0).sum(2)


def block_weights(q, k, blocks, queries):
    """Add up the weights of full attention over blocks, (H, Q, N)."""
    ratio = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(ratio, dim=1)
    scores = torch.einsum("qhd,shd->hqs", q[queries], keys) * q.shape[2] ** -0.5
    later = torch.arange(len(k), device=q.device) > queries[:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(2)
    of_token = torch.as_tensor(blocks.of_token, device=q.device).long()
    count = int(of_token[-1]) + 1
    summed = weights.new_zeros(*weights.shape[:2], count)
    return summed.index_add(2, of_token, weights)


def kept_by_layer(model, ids, block_size, topk, last=128):
    """Average `kept` over the last queries of a text, for the gate and at best.

    Args:
        model: causal language model of transformers, in full attention.
        ids: (S,) token ids.
        block_size: tokens per block.
        topk: blocks per query.
        last: queries at the end.

    Returns:
        (gate, best): each (layers, H).
    """
    queries = torch.arange(max(0, len(ids) - last), len(ids))
    found = queries_and_keys(model, ids)
    return tuple(
        torch.stack(
            [kept(q, k, block_size, topk, queries, best).mean(1) for q, k in found]
        )
        for best in (False, True)
    )

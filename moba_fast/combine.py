"""Merge partial attentions by their log-sum-exp."""

import torch
from torch.nn.functional import embedding_bag, pad


def merge(out_a, lse_a, out_b, lse_b):
    """Merge two attentions over disjoint sets of keys into the attention over both.

    Same contract as moba_ref.merge, with out in out_a's dtype.

    Example: sums of exponentials 1 and 3, so weights 1/4 and 3/4.
        >>> lse_a, lse_b = torch.tensor([1.0, 3.0]).log()
        >>> merge(torch.tensor([0.0]), lse_a, torch.tensor([8.0]), lse_b)
        (tensor([6.]), tensor(1.3863))
    """
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp(), (lse_b - lse).exp()
    out = weight_a[..., None] * out_a + weight_b[..., None] * out_b
    return out.to(out_a.dtype), lse


def combine(out_current, lse_current, out_past, lse_past, routing):
    """Merge every query's partial results into its attention over all its blocks.

    Same contract as moba_ref.combine. All parts of a query are merged at once, by the
    slots in which the query named them.

    Example: query 1 has one past part of equal weight, query 0 has none.
        >>> from moba_fast.route import Routing
        >>> pairs = [torch.tensor(x) for x in ([1], [0], [0, 1, 1])]
        >>> current = torch.tensor([[[2.0]], [[4.0]]]), torch.zeros(2, 1)
        >>> past = torch.tensor([[8.0]]), torch.zeros(1)
        >>> combine(*current, *past, Routing(*pairs))[0].ravel()
        tensor([2., 6.])
    """
    return combine_lists(out_current, lse_current, out_past, lse_past, routing, None)


def combine_lists(out_current, lse_current, out_past, lse_past, routing, places):
    """Merge as `combine` does, where past results stand in the order of the lists.

    Args:
        out_current: (S, H, D) from the current blocks.
        lse_current: (S, H).
        out_past: (T, D) from the past blocks.
        lse_past: (T,).
        routing: Routing.
        places: (P,) the row of every pair in the past results; None: the pair's number.
    """
    if len(routing.query) == 0:
        return out_current, lse_current
    shape = lse_current.shape
    if adds_in_one_pass(out_past, lse_past):
        pairs = pairs_of_rows(routing, shape, places)
        return merge_rows(out_current, lse_current, out_past, lse_past, pairs)
    pairs = pairs_by_slot(routing, shape, places)
    lse_parts = [pick(lse_past, pair, shape, -torch.inf) for pair in pairs]
    lse = torch.stack([lse_current, *lse_parts]).logsumexp(0)
    out = out_current * (lse_current - lse).exp()[..., None]
    for pair, lse_part in zip(pairs, lse_parts, strict=True):
        weight = (lse_part - lse).exp()[..., None]
        out.addcmul_(pick(out_past, pair, shape).to(out.dtype), weight)
    return out.to(out_current.dtype), lse


def merge_rows(out_current, lse_current, out_past, lse_past, pairs):
    """Merge as `combine_lists` does, with one pass over the past results.

    Args:
        out_current: (S, H, D).
        lse_current: (S, H).
        out_past: (T, D).
        lse_past: (T,).
        pairs: (S * H, slots) from `pairs_of_rows`.
    """
    named = pairs >= 0
    lse_parts = lse_past.new_full(pairs.shape, -torch.inf)
    lse_parts[named] = lse_past.index_select(0, pairs[named])
    lse_parts = torch.cat([lse_current.reshape(-1, 1), lse_parts], dim=1)
    lse = lse_parts.logsumexp(1, keepdim=True)
    weights = (lse_parts - lse).exp()
    out = add_rows(out_past, pairs, weights[:, 1:]).view(out_current.shape)
    weight = weights[:, 0].view(lse_current.shape)
    return out.addcmul_(out_current, weight[..., None]), lse.view(lse_current.shape)


def adds_in_one_pass(values, sums):
    """Say whether `add_rows` takes rows of values and keeps the precision of sums."""
    return values.device.type == "cpu" and values.dtype == sums.dtype


def add_rows(values, pairs, weights=None):
    """Add up the rows of values that every row of pairs names.

    Args:
        values: (T, D) on a CPU.
        pairs: (R, slots) rows of values, -1 for none.
        weights: (R, slots) factors; None: 1.

    Returns:
        sums: (R, D); zeros where a row names none.

    Example:
        >>> values = torch.tensor([[1.0], [10.0], [100.0]])
        >>> add_rows(values, torch.tensor([[2, 0], [1, -1], [-1, -1]])).ravel()
        tensor([101.,  10.,   0.])
    """
    named = pairs >= 0
    first = pad(named.sum(1).cumsum(0), (1, 0))
    weights = None if weights is None else weights[named]
    return embedding_bag(
        *(pairs[named], values, first),
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


def pairs_by_slot(routing, shape, places=None):
    """List, for every slot, the pair that each query and head named there.

    Returns:
        pairs: (slots, S * H) int64, otherwise as `pairs_of_rows`.
    """
    return pairs_of_rows(routing, shape, places).T.contiguous()


def pairs_of_rows(routing, shape, places=None):
    """List, for every query and head, the pair that they named in each slot.

    Args:
        routing: Routing.
        shape: (S, H).
        places: (P,) what to list instead of a pair's own number.

    Returns:
        pairs: (S * H, slots) int64, -1 where there is no pair; as many slots as are in
        use.
    """
    n_slots, place = routing.slots, routing.place
    if n_slots is None:
        n_slots = int(routing.slot.max()) + 1
    if place is None:
        place = routing.rows(shape[1]) * n_slots + routing.slot
    pair = torch.arange(len(place), device=place.device)
    padding = pair >= routing.cu_pairs[-1]
    pair = (pair if places is None else places).masked_fill(padding, -1)
    pairs = pair.new_full((shape[0] * shape[1] * n_slots,), -1)
    pairs[place] = pair
    return pairs.view(-1, n_slots)


def pick(values, pair, shape, empty=0.0):
    """Return the value of every pair, `empty` where the pair is -1.

    Args:
        values: (P, ...).
        pair: (S * H,) int64.
        shape: (S, H).
        empty: number.

    Returns:
        picked: (S, H, ...).
    """
    picked, missing = values.index_select(0, pair.clamp(min=0)), pair < 0
    if pair.device.type == "cpu":
        # Few are missing, and the host may ask which.
        picked[missing] = empty
    else:
        picked.masked_fill_(missing.view(-1, *[1] * (values.ndim - 1)), empty)
    return picked.view(*shape, *values.shape[1:])

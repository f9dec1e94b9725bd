"""Merge partial attentions by their log-sum-exp."""

import torch

from moba_fast.gate import gate_dtype


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
    if len(routing.query) == 0:
        return out_current, lse_current
    parts = by_slot(out_past, routing, lse_current.shape)
    lse_parts = by_slot(lse_past, routing, lse_current.shape, empty=-torch.inf)
    lse = torch.cat([lse_current[..., None], lse_parts], dim=-1).logsumexp(-1)
    weight = (lse_current - lse).exp()[..., None]
    out = weight * out_current
    for slot in range(parts.shape[2]):
        weight = (lse_parts[..., slot] - lse).exp()[..., None]
        out += weight * parts[:, :, slot]
    return out.to(out_current.dtype), lse


def by_slot(values, routing, shape, empty=0.0):
    """Put a value per pair where its query, head and slot are.

    Args:
        values: (P, ...) one row per pair.
        routing: Routing.
        shape: (S, H).
        empty: value of slots without a pair.

    Returns:
        slots: (S, H, slots, ...), at least float32; as many slots as are in use.
    """
    n_slots = int(routing.slot.max()) + 1
    n_blocks = (len(routing.cu_pairs) - 1) // shape[1]
    slots = values.new_full(
        (*shape, n_slots, *values.shape[1:]), empty, dtype=gate_dtype(values)
    )
    head = routing.entry // n_blocks
    slots[routing.query, head, routing.slot] = values.to(slots.dtype)
    return slots

"""Merge partial attentions by their log-sum-exp."""

import numpy as np


def merge(out_a, lse_a, out_b, lse_b):
    """Merge two attentions over disjoint sets of keys into the attention over both.

    Paper: Algorithm 1, lines 15-17 (online softmax). Each part weighs as much as its
    share of the total sum of exponentials; the larger lse is subtracted first, so
    that nothing overflows.

    Args:
        out_a: (..., D) output over the first set of keys.
        lse_a: (...) its log-sum-exp.
        out_b: (..., D) output over the second set.
        lse_b: (...) its log-sum-exp, -inf where the set is empty.

    Returns:
        out: (..., D).
        lse: (...).

    Example: sums of exponentials 1 and 3, so weights 1/4 and 3/4.
        >>> merge(np.array([0.0]), np.log(1.0), np.array([8.0]), np.log(3.0))
        (array([6.]), np.float64(1.3862943611198906))
    """
    largest = np.maximum(lse_a, lse_b)
    weight_a, weight_b = np.exp(lse_a - largest), np.exp(lse_b - largest)
    total = weight_a + weight_b
    out = (weight_a / total)[..., None] * out_a + (weight_b / total)[..., None] * out_b
    return out, largest + np.log(total)


def combine(out_current, lse_current, out_past, lse_past, routing):
    """Merge every query's partial results into its attention over all its blocks.

    Paper: Algorithm 1, lines 15-17.

    Args:
        out_current: (S, H, D) from `attend_current`.
        lse_current: (S, H).
        out_past: (P, D) from `attend_past`.
        lse_past: (P,).
        routing: Routing, whose pairs say which query and head a row belongs to.

    Returns:
        out: (S, H, D). A query without a past keeps its current result exactly.
        lse: (S, H).

    Example: query 1 has one past part of equal weight, query 0 has none.
        >>> from moba_ref.route import Routing
        >>> routing = Routing(np.array([1]), np.array([0]), np.array([0, 1, 1]))
        >>> current = np.array([[[2.0]], [[4.0]]]), np.zeros((2, 1))
        >>> combine(*current, np.array([[8.0]]), np.zeros(1), routing)[0].ravel()
        array([2., 6.])
    """
    out, lse = out_current.copy(), lse_current.copy()
    n_blocks = (len(routing.cu_pairs) - 1) // lse.shape[1]
    head = routing.entry // n_blocks
    for pair, (i, h) in enumerate(zip(routing.query, head, strict=True)):
        out[i, h], lse[i, h] = merge(
            out[i, h], lse[i, h], out_past[pair], lse_past[pair]
        )
    return out, lse

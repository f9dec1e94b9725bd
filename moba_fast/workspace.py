"""Divide a call into parts whose temporary tensors fit into a given memory."""

from dataclasses import dataclass
from itertools import pairwise

import torch

DEFAULT = 2 * 2**30
# On a CPU smaller parts are faster: their memory is used again instead of mapped anew.
BEST_ON_CPU, BEST_COMPILED = 2**27, 2**25
ENOUGH_QUERIES = 2**14
# Fewer queries at a time would spend their time on launching work.
FEWEST_QUERIES = 256
# Vectors of int64 over the pairs that are alive together: an order, its sort, places.
INDEX_BYTES = 16 * 8
# A count and a place, both int32.
COUNTER_BYTES = 8


@dataclass(frozen=True)
class Part:
    """Hold a share of a call: some heads, and their queries in shares, too.

    Attributes:
        heads: slice of the query heads.
        heads_k: slice of the key/value heads.
        queries: list of (first, one past the last), the shares of the queries.
    """

    heads: slice
    heads_k: slice
    queries: list


def parts(q, k, block_size, topk, limit, backward=False, deterministic=False):
    """Divide a call by key/value heads, and by queries where one head is too much.

    Args:
        q: (S, H, D).
        k: (SK, HK, D).
        block_size: tokens per block.
        topk: blocks per query.
        limit: bytes that temporary tensors may take.
        backward: whether the call is the backward pass.
        deterministic: whether its sums must have a fixed order.

    Returns:
        list of Part.

    Raises:
        ValueError: if one head of FEWEST_QUERIES queries needs more than the limit.

    Example:
        >>> import torch
        >>> q = k = torch.zeros(1000, 2, 64)
        >>> [p.queries for p in parts(q, k, 100, 3, limit=2**21)]
        [[(0, 495), (495, 990), (990, 1000)], [(0, 495), (495, 990), (990, 1000)]]
    """
    ratio = q.shape[1] // k.shape[1]
    per_query, per_key = bytes_per_row(q, ratio, topk, backward)
    if backward and q.device.type == "cuda":
        extra_query, extra_key = bytes_for_sums(q, k, block_size, topk, deterministic)
        per_query, per_key = per_query + ratio * extra_query, per_key + extra_key
    return divide(q, k, per_query, per_key, limit)


def fused_parts(q, k, block_size, topk, limit, backward=False):
    """Divide a call of the Triton kernels; arguments and result as in `parts`.

    Example: pairs leave a row each, and nothing else is copied.
        >>> import torch
        >>> q = k = torch.zeros(1000, 2, 64)
        >>> [p.queries for p in fused_parts(q, k, 100, 3, limit=2**20)]
        [[(0, 1000)], [(0, 1000)]]
    """
    ratio, slots, D = q.shape[1] // k.shape[1], topk - 1, q.shape[2]
    row = D * q.element_size()
    # An id and a log-sum-exp, or an id and the sums of a list's parts in float32, which
    # are at most one for 16 pairs a key.
    per_pair, per_query, per_key = row + 8, 0, 0
    if backward:
        per_pair = row + 4 + D // 2
        # Two numbers of a query, and its dout where that must be copied.
        per_query, per_key = 8 + row, 8 * D
    per_query += slots * per_pair
    # Counters, if there are no more than one for a list, and where lists and tiles are.
    per_key += -(-(COUNTER_BYTES * ratio + 32) // block_size)
    return divide(q, k, ratio * per_query, per_key, limit, eighths=7)


def compiled_parts(q, k, topk, limit):
    """Divide a forward call of the C++ kernels; arguments and result as in `parts`.

    Example: queries, keys and values are copied, and pairs leave a row each.
        >>> import torch
        >>> q = k = torch.zeros(1000, 2, 64)
        >>> [p.queries for p in compiled_parts(q, k, 3, limit=2**20)]
        [[(0, 664), (664, 1000)], [(0, 664), (664, 1000)]]
    """
    row = q.shape[2] * q.element_size()
    # A log-sum-exp, an id and a copied id; of queries the ids of their own blocks, too.
    per_query = q.shape[1] // k.shape[1] * (row + (topk - 1) * (row + 12) + 4)
    # Two copies, and where lists begin, at most two numbers a block.
    per_key = 2 * row + 8
    return divide(q, k, per_query, per_key, limit, best=BEST_COMPILED)


def most_counters(limit):
    """Return how many counters may fill the eighth that `fused_parts` leaves them."""
    return limit // 8 // COUNTER_BYTES


def divide(q, k, per_query, per_key, limit, eighths=8, best=None):
    """Divide a call whose temporary tensors grow with queries and keys; see `parts`.

    Args:
        q: (S, H, D).
        k: (SK, HK, D).
        per_query: bytes for every query of one key/value head.
        per_key: bytes for every key of one head.
        limit: bytes that there are.
        eighths: of the limit that these tensors may take.
        best: bytes that are best on a CPU; None: BEST_ON_CPU.
    """
    n_queries, n_keys, heads_k = q.shape[0], k.shape[0], k.shape[1]
    ratio, room = q.shape[1] // heads_k, limit * eighths // 8
    fixed = per_key * n_keys
    per_head = max(fixed + per_query * n_queries, 1)
    group, rows = min(heads_k, room // per_head), n_queries
    if q.device.type == "cpu":
        best = best or BEST_ON_CPU
        group = min(group, max(1, best // per_head))
        rows = max(best // max(per_query, 1), ENOUGH_QUERIES)
    if group == 0:
        group, rows = 1, min(rows, (room - fixed) // per_query)
        fewest = min(n_queries, FEWEST_QUERIES)
        if rows < fewest:
            needed = -(-(fixed + fewest * per_query) * 8 // eighths)
            raise ValueError(
                f"workspace_bytes={limit} is too small: one key/value head over "
                f"{n_keys} keys needs {needed} bytes for "
                f"{fewest} queries at a time; raise workspace_bytes to that or more"
            )
    cuts = list(pairwise([*range(0, n_queries, max(rows, 1)), n_queries]))
    return [
        Part(slice(a * ratio, b * ratio), slice(a, b), cuts)
        for a, b in pairwise([*range(0, heads_k, group), heads_k])
    ]


def bytes_for_sums(q, k, block_size, topk, deterministic):
    """Estimate what FlashAttention-2 adds to its float32 sums of dq.

    It pads every sequence by 128 rows. To be deterministic, it keeps as many copies as
    bring its grid of one program per sequence to all multiprocessors.

    Returns:
        per_query, per_key: bytes for one query head, and for one key/value head.
    """
    row, n_blocks = 4 * q.shape[2], -(-len(k) // block_size)
    copies = 1
    if deterministic:
        properties = torch.cuda.get_device_properties(q.device)
        copies = -(-properties.multi_processor_count // max(n_blocks, 1))
    per_query = (copies - 1) * (topk - 1) * row
    return per_query, copies * -(-128 * row // block_size)


def bytes_per_row(q, ratio, topk, backward):
    """Estimate what a query and a key of one key/value head take for a while.

    Returns:
        per_query, per_key: bytes.
    """
    narrow = q.shape[2] * q.element_size()
    wide = q.shape[2] * max(q.element_size(), 4)
    # Forward: gathered queries, results, these in order, and what is merged in float32.
    per_pair, per_query, per_key = 3 * narrow, 2 * narrow + 3 * wide, 2 * narrow
    if backward:
        # Gathered dout and out, too; the kernel's float32 sum of dq; what it writes for
        # dk and dv of every query head; and the sums of all parts in float32.
        per_pair += 2 * narrow + wide
        per_query, per_key = 6 * narrow + 2 * wide, 4 * narrow + 2 * wide
    per_query += (topk - 1) * (per_pair + INDEX_BYTES) + INDEX_BYTES
    return ratio * per_query, per_key

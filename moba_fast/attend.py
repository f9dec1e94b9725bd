"""Attend to one block at a time, many blocks per call, and keep the log-sum-exp."""

from dataclasses import dataclass

import torch

from moba_fast import _flash
from moba_fast.gate import gate_dtype

# Query rows of one call of attend_past, and how much padding a call may carry.
ROWS_PER_CALL = 2**15
PADDED_SHARE = 0.125


@dataclass(frozen=True)
class CurrentGroup:
    """Hold blocks of one shape: the same number of keys, the same queries in them.

    Attributes:
        queries: (blocks, M) queries that stand in each block.
        keys: (blocks, L) its keys; the queries are its last M tokens.
    """

    queries: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class PastGroup:
    """Hold lists of about the same length, padded to the longest one.

    Attributes:
        pairs: (lists, M) pair ids; padding repeats the list's last pair.
        valid: (lists, M) bool, False where a row is padding.
        head: (lists,) query head of each list.
        keys: (lists, block_size) the keys of each list's block.
    """

    pairs: torch.Tensor
    valid: torch.Tensor
    head: torch.Tensor
    keys: torch.Tensor


def attend_current(q, k, v, blocks, softmax_scale):
    """Attend from every query to the keys of its own block up to its own position.

    Same contract as moba_ref.attend_current, with out in q's dtype.

    Example: the first token of a block reads only itself.
        >>> from moba_fast.blocks import partition
        >>> v = torch.tensor([[[1.0]], [[3.0]], [[5.0]]])
        >>> q = k = torch.zeros(3, 1, 1)
        >>> attend_current(q, k, v, partition([0, 3], block_size=2), 1.0)[0].ravel()
        tensor([1., 2., 5.])
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=gate_dtype(q))
    for group in current_groups(blocks):
        for hk, heads in head_groups(q, k):
            part = _flash.attention(
                q[group.queries, heads].transpose(1, 2),
                share(k[group.keys, hk], heads),
                share(v[group.keys, hk], heads),
                True,
                softmax_scale,
            )
            out[group.queries, heads] = part[0].transpose(1, 2)
            lse[group.queries, heads] = part[1].transpose(1, 2)
    return out, lse


def attend_past(q, k, v, routing, blocks, softmax_scale):
    """Attend from the queries of every list to all keys of the list's block.

    Same contract as moba_ref.attend_past, with out in q's dtype.

    Example: query 2 chose block 0 and gets the mean of its values.
        >>> from moba_fast.blocks import partition
        >>> from moba_fast.route import route
        >>> blocks = partition([0, 3], block_size=2)
        >>> routing = route(torch.tensor([[[-1, 0]], [[-1, 0]], [[0, 1]]]), blocks)
        >>> q, v = torch.zeros(3, 1, 1), torch.tensor([[[1.0]], [[3.0]], [[5.0]]])
        >>> attend_past(q, q, v, routing, blocks, 1.0)
        (tensor([[2.]]), tensor([0.6931]))
    """
    n_pairs, ratio = len(routing.query), q.shape[1] // k.shape[1]
    out = q.new_empty(n_pairs, q.shape[2])
    lse = q.new_empty(n_pairs, dtype=gate_dtype(q))
    for group in past_groups(routing, blocks):
        head_k = group.head[:, None] // ratio
        part = _flash.attention(
            q[routing.query[group.pairs], group.head[:, None]][:, None],
            k[group.keys, head_k][:, None],
            v[group.keys, head_k][:, None],
            False,
            softmax_scale,
        )
        pairs = group.pairs[group.valid]
        out[pairs], lse[pairs] = part[0][:, 0][group.valid], part[1][:, 0][group.valid]
    return out, lse


def current_groups(blocks):
    """Yield the blocks that hold queries, those of one shape together."""
    device = blocks.start.device
    has_query, count = blocks.of_query.unique_consecutive(return_counts=True)
    first_query = count.cumsum(0) - count
    length = (blocks.end - blocks.start)[has_query]
    shapes, shape_of = torch.stack([count, length]).unique(dim=1, return_inverse=True)
    for shape, (m, n) in enumerate(shapes.T.tolist()):
        members = shape_of == shape
        row, key = torch.arange(m, device=device), torch.arange(n, device=device)
        yield CurrentGroup(
            queries=first_query[members][:, None] + row,
            keys=blocks.start[has_query[members]][:, None] + key,
        )


def past_groups(routing, blocks):
    """Yield the lists of a routing, those of similar length together.

    Past blocks are complete, so all lists read block_size keys.
    """
    device, n_blocks = blocks.start.device, len(blocks.start)
    by_length = routing.cu_pairs.diff().sort(descending=True, stable=True)
    for a, b in similar_runs(by_length.values.tolist()):
        entry, length = by_length.indices[a:b], by_length.values[a:b, None]
        row = torch.arange(int(length[0]), device=device)
        first = blocks.start[entry % n_blocks]
        yield PastGroup(
            pairs=routing.cu_pairs[entry][:, None] + row.clamp(max=length - 1),
            valid=row < length,
            head=entry // n_blocks,
            keys=first[:, None] + torch.arange(blocks.block_size, device=device),
        )


def similar_runs(lengths):
    """Cut descending lengths into runs that waste little when padded to the longest.

    Args:
        lengths: list of integers, descending; zeros at the end are left out.

    Returns:
        runs: list of (first, one past the last).

    Example:
        >>> similar_runs([100, 98, 95, 10, 10, 0])
        [(0, 3), (3, 5)]
    """
    runs, first, rows = [], 0, 0
    for i, length in enumerate(lengths):
        if length == 0:
            return [*runs, (first, i)] if i > first else runs
        padded = lengths[first] * (i - first + 1)
        full = padded > ROWS_PER_CALL
        if i > first and (full or padded - rows - length > PADDED_SHARE * padded):
            runs.append((first, i))
            first, rows = i, 0
        rows += length
    return [*runs, (first, len(lengths))] if lengths else runs


def head_groups(q, k):
    """List every key/value head with the slice of query heads that read it."""
    ratio = q.shape[1] // k.shape[1]
    return [(hk, slice(hk * ratio, (hk + 1) * ratio)) for hk in range(k.shape[1])]


def share(x, heads):
    """View (blocks, L, D) as (blocks, heads, L, D) without repeating anything."""
    return x[:, None].expand(-1, heads.stop - heads.start, -1, -1)

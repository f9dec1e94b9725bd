"""Describe packed sequences, and make those of about one length equal."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from moba_fast.device import expand_runs

# Query rows of one batch, whose results should stay in a cache until they are stored,
# and how much padding it may carry.
ROWS_PER_BATCH = 2**13
PADDED_SHARE = 0.125


@dataclass(frozen=True)
class Pack:
    """Hold where packed sequences begin, for queries and for keys.

    Attributes:
        cu_q: (L+1,) int32 offsets of the queries.
        cu_k: (L+1,) int32 offsets of the keys.
        max_q: queries of the longest sequence, or more.
        max_k: keys of the longest sequence, or more.
        even: whether sequences of about the same size were made equal.
        rows_q: (T,) the row of every query; None: the queries are in order.
        rows_k: (TK,) the row of every key; None: the keys are in order.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    even: bool = False
    rows_q: torch.Tensor | None = None
    rows_k: torch.Tensor | None = None


def even_batches(pack):
    """Order and pad a pack so that nothing is copied to make batches of it.

    Returns:
        queries: (T,) the query at every place; padding repeats a sequence's last one.
        valid: (T,) bool, False for padding.
        keys: (TK,) the key at every place.
        pack: Pack of these places; sequences without queries are left out.

    Example: sequences of 7, 0 and 8 queries become two of 8.
        >>> cu_q, cu_k = torch.tensor([0, 7, 7, 15]), torch.tensor([0, 2, 4, 6])
        >>> queries, valid, keys, pack = even_batches(Pack(cu_q, cu_k, 8, 2))
        >>> queries[8:], keys, pack.cu_q.tolist()
        (tensor([0, 1, 2, 3, 4, 5, 6, 6]), tensor([4, 5, 0, 1]), [0, 8, 16])
    """
    sizes, device = sizes_of(pack), pack.cu_q.device
    runs = similar_runs([s[:2] for s in sizes], exact=False)
    widths = [sizes[a][1] for a, b in runs for _ in range(a, b)]
    lengths, counts, members = (
        torch.tensor(x, dtype=torch.int64, device=device)
        for x in (zip(*sizes, strict=True) if sizes else [[]] * 3)
    )
    widths = torch.tensor(widths, dtype=torch.int64, device=device)
    queries, valid, cu_q = spread_rows(pack.cu_q[members], counts, widths)
    keys, _, cu_k = spread_rows(pack.cu_k[members], lengths, lengths)
    max_q = int(widths.max()) if len(widths) else 0
    return queries, valid, keys, Pack(cu_q, cu_k, max_q, pack.max_k, even=True)


def spread_rows(first, lengths, widths):
    """List the rows of sequences one after the other, each padded to its width.

    Returns:
        rows: (T,) int64; padding repeats a sequence's last row.
        valid: (T,) bool.
        offsets: (L+1,) int32.
    """
    offsets = pad(widths.cumsum(0), (1, 0))
    sequence = expand_runs(widths, int(offsets[-1]))
    row = torch.arange(len(sequence), device=first.device) - offsets[sequence]
    last = lengths[sequence] - 1
    return first[sequence] + row.minimum(last), row <= last, offsets.int()


def sizes_of(pack):
    """List (keys, queries, index) of the sequences that have queries, descending."""
    cu_q, cu_k = pack.cu_q.tolist(), pack.cu_k.tolist()
    sizes = [
        (cu_k[i + 1] - cu_k[i], cu_q[i + 1] - cu_q[i], i) for i in range(len(cu_q) - 1)
    ]
    return sorted((s for s in sizes if s[1]), key=lambda s: (-s[0], -s[1]))


def similar_runs(sizes, exact):
    """Cut descending sizes into runs that waste little when padded to the longest.

    Args:
        sizes: list of (keys, queries), descending.
        exact: whether queries must be equal, too.

    Returns:
        runs: list of (first, one past the last).

    Example:
        >>> similar_runs([(4, 100), (4, 98), (4, 95), (4, 10), (2, 10)], exact=False)
        [(0, 3), (3, 4), (4, 5)]
    """
    runs, first, rows = [], 0, 0
    for i, (n, m) in enumerate(sizes):
        padded = sizes[first][1] * (i - first + 1)
        differs = (n, m) != sizes[first] if exact else n != sizes[first][0]
        wasted = padded - rows - m > PADDED_SHARE * padded
        full = padded > ROWS_PER_BATCH
        if i > first and (differs or wasted or full):
            runs.append((first, i))
            first, rows = i, 0
        rows += m
    return [*runs, (first, len(sizes))] if sizes else runs

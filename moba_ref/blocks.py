"""Cut packed sequences into blocks."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Blocks:
    """Hold where every block begins and ends and where every query stands.

    A block never crosses a sequence, so the last block of a sequence may be short.

    Attributes:
        block_size: tokens in a full block.
        cu_seqlens: (B+1,) first key token of every sequence, then SK.
        cu_blocks: (B+1,) first block of every sequence, then N.
        start: (N,) first key token of every block.
        end: (N,) one past the last key token of every block.
        of_token: (SK,) block of every key token.
        position: (S,) key token at which every query stands, counted in the pack.
        of_query: (S,) block in which every query stands, its current block.
        first_of_query: (S,) first block of the query's sequence: the past blocks of
            query i are range(first_of_query[i], of_query[i]).
    """

    block_size: int
    cu_seqlens: np.ndarray
    cu_blocks: np.ndarray
    start: np.ndarray
    end: np.ndarray
    of_token: np.ndarray
    position: np.ndarray
    of_query: np.ndarray
    first_of_query: np.ndarray


def partition(cu_seqlens, block_size, cu_seqlens_q=None):
    """Cut every sequence of a pack into blocks of block_size tokens.

    Paper: Eq. 3, with a short last block where block_size does not divide a length.

    Args:
        cu_seqlens: (B+1,) integers, first key token of every sequence, then SK. These
            are offsets of the keys, `cu_seqlens_k` of `moba_attention`, where
            `cu_seqlens` are those of the queries.
        block_size: tokens per block, at least 1.
        cu_seqlens_q: (B+1,) integers, the same for the queries where there are fewer
            of them; the queries of a sequence are its last tokens. None: one query
            at every key token.

    Returns:
        Blocks.

    Raises:
        ValueError: if block_size < 1, if offsets do not start at 0 or decrease, or if
            a sequence has more queries than keys.

    Example: sequences of 9, 6 and 10 tokens.
        >>> blocks = partition([0, 9, 15, 25], block_size=4)
        >>> blocks.start
        array([ 0,  4,  8,  9, 13, 15, 19, 23])
        >>> blocks.end - blocks.start
        array([4, 4, 1, 4, 2, 4, 4, 2])
        >>> blocks.of_query[20], blocks.first_of_query[20]
        (np.int64(6), np.int64(5))
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    cu_k = check_offsets(cu_seqlens, "cu_seqlens")
    cu_q = cu_k if cu_seqlens_q is None else check_offsets(cu_seqlens_q, "cu_seqlens_q")
    check_queries_fit(cu_q, cu_k)
    cu_blocks, start, end = [0], [], []
    for first, last in pairwise(cu_k.tolist()):
        for token in range(first, last, block_size):
            start.append(token)
            end.append(min(token + block_size, last))
        cu_blocks.append(len(start))
    start, end = np.array(start, dtype=int), np.array(end, dtype=int)
    of_token = np.repeat(np.arange(len(start)), end - start)
    lengths_q = np.diff(cu_q)
    position = np.concatenate(
        [np.arange(last - n, last) for last, n in zip(cu_k[1:], lengths_q, strict=True)]
    )
    return Blocks(
        block_size=block_size,
        cu_seqlens=cu_k,
        cu_blocks=np.array(cu_blocks),
        start=start,
        end=end,
        of_token=of_token,
        position=position,
        of_query=of_token[position],
        first_of_query=np.repeat(cu_blocks[:-1], lengths_q),
    )


def check_offsets(cu_seqlens, name):
    """Return cu_seqlens as an integer array, or say what is wrong with it."""
    offsets = np.asarray(cu_seqlens)
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a list of at least two integers such as [0, 9, 15], "
            f"got shape {offsets.shape} of {offsets.dtype}"
        )
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"{name} must start at 0 and never decrease, got {offsets.tolist()}"
        )
    return offsets.astype(int)


def check_queries_fit(cu_q, cu_k):
    """Raise ValueError unless every sequence has at most as many queries as keys."""
    if len(cu_q) != len(cu_k):
        raise ValueError(
            f"queries and keys must have the same number of sequences, "
            f"got {len(cu_q) - 1} and {len(cu_k) - 1}"
        )
    longer = np.flatnonzero(np.diff(cu_q) > np.diff(cu_k))
    if len(longer):
        b = longer[0]
        raise ValueError(
            f"the queries of a sequence are its last tokens, so there cannot be more "
            f"queries than keys: sequence {b} has {np.diff(cu_q)[b]} queries and "
            f"{np.diff(cu_k)[b]} keys"
        )

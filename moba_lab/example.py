"""The running example of all notebooks: 32 tokens with a pattern for the gate."""

from dataclasses import dataclass

import numpy as np

from moba_ref import partition


@dataclass(frozen=True)
class Example:
    """Hold inputs small enough to look at.

    Attributes:
        q: (32, 2, 8) queries, float64.
        k: (32, 2, 8) keys.
        v: (32, 2, 8) values.
        cu_seqlens: [0, 32], or [0, 13, 16, 32] when packed.
        block_size: 4.
        topk: 3.
        planted: (32, 2) the past block that every query was made to look for, or -1.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    cu_seqlens: list
    block_size: int
    topk: int
    planted: np.ndarray


def running_example(packed=False, seed=0):
    """Make 32 tokens of noise with one pattern planted per head.

    In head 0 the second half of every sequence repeats the topics of the first half,
    and queries look for their topic: block 5 of 8 looks for block 1. In head 1 every
    block has a topic of its own and queries look for the block before theirs.

    Args:
        packed: True for three sequences of 13, 3 and 16 tokens instead of one of 32.
        seed: seed of the noise and the topics.

    Returns:
        Example.

    Example:
        >>> running_example().planted[[3, 22]]
        array([[-1, -1],
               [ 1,  4]])
    """
    rng = np.random.default_rng(seed)
    cu_seqlens = [0, 13, 16, 32] if packed else [0, 32]
    blocks = partition(cu_seqlens, block_size=4)
    q, k, v = rng.normal(size=(3, 32, 2, 8))
    topics = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    planted = np.full((32, 2), -1)
    n_of_sequence = np.diff(blocks.cu_blocks)
    n_blocks = np.repeat(n_of_sequence, np.diff(cu_seqlens))
    for i in range(32):
        first, current = blocks.first_of_query[i], blocks.of_query[i]
        local, half = current - first, max(1, n_blocks[i] // 2)
        k[i] = k[i] / 2 + 2 * topics[[local % half, local]]
        q[i] = q[i] / 2 + 2 * topics[[local % half, local - 1]]
        if local >= half:
            planted[i, 0] = current - half
        if local >= 1:
            planted[i, 1] = current - 1
    return Example(q, k, v, cu_seqlens, 4, 3, planted)

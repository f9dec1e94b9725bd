"""Predict from a signal-to-noise ratio how often the gate finds a block, and test it.

FlashMoBA (arXiv 2511.11571, section 3) asks when the mean of B keys still shows that
one of them fits the query. Let query and keys have length 1 in D dimensions, and let
all keys have random directions but those that the query looks for, m of them in one
block. `gap` is what those have more of: the sum over the m keys of the expected q·k,
less the same sum for random keys, which is 0. So gap is at most m.

The score of a block is the mean of its B products. For a random block it has mean 0
and variance 1 / (D B), because q·k has variance 1/D; for the wanted block mean gap / B
and, as long as m is far below B, the same variance. Their difference has mean gap / B
and variance 2 / (D B), hence

    SNR = (gap / B) / sqrt(2 / (D B)) = gap * sqrt(D / (2 B)).

The wanted block beats one other with probability Phi(SNR), the normal distribution's.
It is chosen if fewer than topk - 1 of the M other past blocks beat it. Those events
share its score: given that it lies z standard deviations from its mean, each other one
beats it with probability p(z) = Phi(-z - sqrt(2) SNR), independently, so

    recall = integral of phi(z) P[Binomial(M, p(z)) <= topk - 2] dz.
"""

import math

import numpy as np
import torch

from moba_fast.blocks import partition
from moba_fast.gate import pool_keys, select_blocks


def snr(gap, head_dim, block_size):
    """Return the signal-to-noise ratio of the mean-key gate.

    Paper: FlashMoBA (arXiv 2511.11571), section 3.

    Args:
        gap: sum over the wanted keys of a block of how much more q·k they have than
            random keys, query and keys of length 1.
        head_dim: D.
        block_size: B, in tokens.

    >>> snr(gap=1.0, head_dim=128, block_size=16)
    2.0
    """
    return gap * math.sqrt(head_dim / (2 * block_size))


def predicted_recall(ratio, others, picks):
    """Predict how often a block is chosen among others by the best mean key.

    Args:
        ratio: signal-to-noise ratio, see `snr`.
        others: M, how many other past blocks there are.
        picks: past blocks that are chosen, topk - 1.

    Returns:
        float, 0 to 1.

    >>> predicted_recall(0.0, others=9, picks=3)  # nothing is known: 3 of 10
    0.3
    >>> predicted_recall(0.5, others=1, picks=1)  # Phi(0.5)
    0.691462
    """
    z = np.linspace(-9, 9, 3601)
    density = np.exp(-(z**2) / 2)
    density /= density.sum()
    beaten = torch.special.ndtr(torch.from_numpy(-z - math.sqrt(2) * ratio)).numpy()
    return round(float(density @ _at_most(picks - 1, others, beaten)), 6)


def measured_snr(scores, wanted):
    """Measure the ratio from scores: mean over deviation of how much the wanted wins.

    Args:
        scores: (n, N) of past blocks, -inf where a block is none of them.
        wanted: (n,) column of the block that each row looks for.

    Returns:
        float; the quantity that `snr` predicts for keys of random directions.
    """
    scores = np.asarray(scores, dtype=np.float64)
    rows = np.arange(len(scores))
    lead = scores[rows, wanted][:, None] - scores
    other = np.isfinite(scores)
    other[rows, wanted] = False
    return float(lead[other].mean() / lead[other].std())


def simulate_recall(
    head_dim, block_size, blocks, topk, gap, related=1, trials=1000, seed=0
):
    """Count how often the real gate finds a planted block among random keys.

    Every query head of one token looks for its own block of the same keys: to the
    other heads the keys planted for it are random ones.

    Args:
        head_dim: D.
        block_size: B, in tokens.
        blocks: past blocks, one of them wanted.
        topk: blocks per query, the current one included.
        gap: as in `snr`; `related` keys share it equally.
        related: m, wanted keys of the block.
        trials: queries.
        seed: of the keys, the queries and the places.

    Returns:
        (trials,) bool, whether the block was chosen.

    Raises:
        ValueError: the gap needs products above 1, or the keys do not fit.
    """
    if not 0 <= gap <= related <= block_size:
        raise ValueError(
            f"expected 0 <= gap <= related <= block_size, got {gap}, {related} and "
            f"{block_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    # Keys planted together point the same way, which adds to the noise of other heads:
    # with these numbers 1/64 of the variance at most.
    per_pack = max(1, blocks * block_size // (64 * related**2))
    while trials:
        heads = min(trials, per_pack)
        found.append(
            _find(head_dim, block_size, blocks, topk, gap / related, related, heads,
                  generator)
        )  # fmt: skip
        trials -= heads
    return torch.cat(found).numpy()


def _find(head_dim, block_size, blocks, topk, product, related, heads, generator):
    q = _directions(heads, head_dim, generator)
    # The current block holds one more token, the one that asks.
    k = _directions(blocks * block_size + 1, head_dim, generator)
    places = torch.rand(blocks, block_size, generator=generator).argsort(dim=1)
    # Heads share out the blocks, and no two of them the same key.
    free = places[:, : block_size // related * related].unflatten(1, (-1, related))
    groups = torch.randperm(blocks * free.shape[1], generator=generator)[:heads]
    wanted = groups % blocks
    token = wanted[:, None] * block_size + free[wanted, groups // blocks]
    aside = _directions(heads * related, head_dim, generator).unflatten(0, (heads, -1))
    aside = aside - (aside * q[:, None]).sum(-1, keepdim=True) * q[:, None]
    aside = aside / aside.norm(dim=-1, keepdim=True)
    k[token] = product * q[:, None] + math.sqrt(1 - product**2) * aside
    laid = partition([0, len(k)], block_size, cu_seqlens_q=[0, 1])
    selected = select_blocks(q[None], pool_keys(k[:, None], laid), laid, topk)[0]
    return (selected == wanted[:, None]).any(-1)


def _directions(count, dim, generator):
    x = torch.randn(count, dim, generator=generator)
    return x / x.norm(dim=-1, keepdim=True)


def _at_most(most, n, p):
    """Return P[Binomial(n, p) <= most] for an array of p."""
    p = np.clip(p, 1e-300, 1 - 1e-16)
    total = np.zeros_like(p)
    for i in range(min(most, n) + 1):
        ways = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        total += np.exp(ways + i * np.log(p) + (n - i) * np.log1p(-p))
    return total

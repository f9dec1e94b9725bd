"""Choose the blocks that every query reads."""

import math

import torch
from torch.nn.functional import embedding_bag, pad

from moba_fast.device import capturing

# Scores held at once by select_blocks: 16 MiB of float32, on a CPU 4 MiB, so that they
# are still in a cache when the next operation reads them.
SCORES_PER_CHUNK, SCORES_PER_CHUNK_ON_CPU = 2**22, 2**20
# Scores closer than this many times eps |q| |k_mean| are tied. It is chosen, not a
# bound: two sums of the same D products, added in different orders, are at most D eps
# |q| |k_mean| apart (D eps / 2 each from the exact sum), but so wide a margin would tie
# scores that differ. Equal means were seen up to 2.9 apart in one float32 product on a
# CPU, for random vectors along one direction and D up to 256; about 8 only where all
# elements of q and of the means are equal. A tie that is missed is decided by rounding.
TIE_ROUNDINGS = 4


def pool_keys(k, blocks):
    """Average the keys of every block.

    Same contract as moba_ref.pool_keys, except that k_mean is at least float32.

    Example: blocks of 2 tokens over 3 tokens, the last block is short.
        >>> from moba_fast.blocks import partition
        >>> k = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[0.0, 5.0]]])
        >>> pool_keys(k, partition([0, 3], block_size=2))[:, 0]
        tensor([[2., 0.],
                [0., 5.]])
    """
    keys = k.to(gate_dtype(k))
    if len(blocks.start) == 0:
        return keys.new_zeros(0, *k.shape[1:])
    lengths = blocks.end - blocks.start
    if keys.dtype == torch.float32 and keys.device.type == "cpu":
        # Sums in the same order as below, but on all threads and by whole vectors.
        key = torch.arange(len(keys))
        sums = embedding_bag(key, keys.flatten(1), blocks.start, mode="sum")
        return (sums / lengths[:, None]).view(-1, *k.shape[1:])
    # `unsafe` skips a check of the lengths for which the host would wait.
    return torch.segment_reduce(keys, "mean", lengths=lengths, axis=0, unsafe=True)


def gate_scores(q, k_mean, blocks):
    """Score every block for every query, with the causal rules as infinities.

    Same contract as moba_ref.gate_scores. Only for looking: `select_blocks` never
    holds all scores at once.

    Example: the last of 6 tokens scores two past blocks.
        >>> from moba_fast.blocks import partition
        >>> k_mean = torch.tensor([[[1.0]], [[-1.0]], [[9.0]]])
        >>> gate_scores(torch.full((6, 1, 1), 2.0), k_mean, partition([0, 6], 2))[5, 0]
        tensor([ 2., -2., inf])
    """
    block = torch.arange(len(k_mean), device=q.device)
    scores = past_scores(q, k_mean, blocks.first_of_query, blocks.of_query, block)
    return scores.masked_fill(block == blocks.of_query[:, None, None], torch.inf)


def select_blocks(q, k_mean, blocks, topk):
    """Choose the topk best blocks of every query, its current block among them.

    Same contract as moba_ref.select_blocks. Queries are taken in chunks, so that the
    scores never exist all at once. Scores that differ by no more than the rounding of a
    matrix product count as tied.

    Example: topk=2 is the current block and the better one of the past blocks.
        >>> from moba_fast.blocks import partition
        >>> k_mean = torch.tensor([[[1.0]], [[-1.0]], [[9.0]]])
        >>> q, blocks = torch.full((6, 1, 1), 2.0), partition([0, 6], block_size=2)
        >>> select_blocks(q, k_mean, blocks, topk=2)[3:, 0]
        tensor([[0, 1],
                [0, 2],
                [0, 2]], dtype=torch.int32)
    """
    selected = blocks.of_query.new_full((*q.shape[:2], topk), -1, dtype=torch.int32)
    selected[..., -1] = blocks.of_query[:, None]
    norms = k_mean.norm(dim=-1).T.repeat_interleave(q.shape[1] // k_mean.shape[1], 0)
    for a, b, low, high in query_chunks(q, blocks, topk):
        first, current = blocks.first_of_query[a:b], blocks.of_query[a:b]
        block = torch.arange(low, high, device=q.device)
        scores = past_scores(q[a:b], k_mean, first, current, block)
        q_norm, k_norm = q[a:b].to(scores.dtype).norm(dim=-1), norms[:, low:high]
        past = top_blocks(scores, min(topk - 1, high - low), q_norm, k_norm) + low
        readable = (past >= first[:, None, None]) & (past < current[:, None, None])
        past = past.masked_fill(~readable, len(k_mean)).sort(dim=-1).values
        past = past.masked_fill(past == len(k_mean), -1)
        selected[a:b, :, : past.shape[-1]] = past
    return selected


def query_chunks(q, blocks, topk):
    """Cut the queries into chunks of at most SCORES_PER_CHUNK scores.

    Yields:
        a, b, low, high: queries a to b - 1 may read no past block but low to high - 1.
    """
    n_blocks = len(blocks.start)
    if topk == 1 or len(q) == 0:
        return
    on_cpu = q.device.type == "cpu"
    scores = SCORES_PER_CHUNK_ON_CPU if on_cpu else SCORES_PER_CHUNK
    rows = max(1, scores // max(1, q.shape[1] * n_blocks))
    cuts = [*range(0, len(q), rows), len(q)]
    bounds = [(0, n_blocks)] * (len(cuts) - 1)
    if not capturing(q):
        # Queries come in the order of their sequences, so the ends bound the chunk.
        ends = torch.tensor(cuts[1:], device=q.device) - 1
        low, high = blocks.first_of_query[cuts[:-1]], blocks.of_query[ends]
        bounds = torch.stack([low, high], dim=1).tolist()
    for a, b, (low, high) in zip(cuts, cuts[1:], bounds, strict=False):
        yield a, b, low, high


def past_scores(q, k_mean, first, current, block):
    """Score the given blocks, -inf where a block is not in a query's past.

    Args:
        q: (C, H, D) queries.
        k_mean: (N, HK, D) block means.
        first: (C,) first block of every query's sequence.
        current: (C,) block of every query.
        block: (n,) consecutive block ids.

    Returns:
        scores: (C, H, n) of k_mean's dtype.
    """
    if len(block) == 0:
        return k_mean.new_zeros(*q.shape[:2], 0)
    means = k_mean[block]
    grouped = q.to(k_mean.dtype).unflatten(1, (k_mean.shape[1], -1))
    scores = torch.einsum("chgd,nhd->chgn", grouped, means).flatten(1, 2)
    past = (block >= first[:, None]) & (block < current[:, None])
    return scores.masked_fill_(~past[:, None], -torch.inf)


def top_blocks(scores, count, q_norm, k_norm):
    """List the columns of the count largest scores; ties go to the lower column.

    A matrix product rounds equal columns differently, so scores that differ by no more
    than its rounding are tied. Only rows with a tie at the cut need more than a topk.

    Args:
        scores: (C, H, n), -inf where a block may not be read.
        count: columns to list, at most n.
        q_norm: (C, H) Euclidean norm of every query.
        k_norm: (H, n) Euclidean norm of the block means that every head reads.

    Returns:
        columns: (C, H, count), in no particular order.

    Example:
        >>> scores, one = torch.tensor([[[1.0, 3.0, 3.0, 3.0]]]), torch.ones(1, 1)
        >>> top_blocks(scores, 2, one, one.expand(1, 4)).sort().values
        tensor([[[1, 2]]])
    """
    if count == 0:
        return scores.new_zeros(*scores.shape[:-1], 0, dtype=torch.int64)
    values, indices = largest(scores, min(count + 1, scores.shape[-1]))
    columns = indices[..., :count]
    if values.shape[-1] > count:
        cut, next_best = values[..., count - 1], values[..., count]
        both = indices[..., count - 1 :].clamp(max=scores.shape[-1] - 1)
        norms = k_norm.expand_as(scores).gather(-1, both).amax(-1) * q_norm
        rounding = TIE_ROUNDINGS * torch.finfo(scores.dtype).eps * norms
        tied = (cut - next_best <= rounding) & (cut > -torch.inf)
        if capturing(tied):
            ranked = first_of_tied(scores, cut[..., None], rounding[..., None], count)
            columns = torch.where(tied[..., None], ranked, columns)
        elif tied.any():
            columns[tied] = first_of_tied(
                scores[tied], cut[tied, None], rounding[tied, None], count
            )
    return columns


def largest(scores, count):
    """Return what `scores.topk(count)` returns, on a CPU 1.4 to 2 times as fast.

    The largest of a row stand in the groups of columns with the largest maxima. Column
    j stands in group j % (n / width), so that a maximum is one over whole vectors.

    Args:
        scores: (C, H, n).
        count: at least 1, at most n.

    Returns:
        values: (C, H, count), descending.
        columns: (C, H, count); n or more for a value of -inf that is no score.

    Example:
        >>> largest(torch.tensor([[[5.0, 1.0, 7.0, 6.0, 0.0, 2.0, 4.0, 3.0]]]), 2)
        (tensor([[[7., 6.]]]), tensor([[[2, 3]]]))
    """
    width = 1 << max(0, round(math.log2(max(scores.shape[-1] / count, 1)) / 2))
    if width == 1 or scores.device.type != "cpu":
        return scores.topk(count, dim=-1)
    missing = -scores.shape[-1] % width
    padded = pad(scores, (0, missing), value=-torch.inf) if missing else scores
    members = padded.unflatten(-1, (width, -1))
    groups = members.amax(-2).topk(count, dim=-1).indices
    few = members.gather(-1, groups[..., None, :].expand(-1, -1, width, -1))
    values, place = few.flatten(-2).topk(count, dim=-1)
    group = groups.gather(-1, place % count)
    return values, place // count * members.shape[-1] + group


def first_of_tied(scores, cut, rounding, count):
    """List the columns above the cut, then the lowest ones of those tied with it.

    Args:
        scores: (R, n), or (C, H, n).
        cut: (R, 1) the count-th largest score of every row.
        rounding: (R, 1) how far from the cut a score is still tied.
        count: columns per row.
    """
    rank = (scores >= cut - rounding).int() + (scores > cut + rounding).int()
    return rank.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def gate_dtype(x):
    """Return the dtype of means and scores: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)

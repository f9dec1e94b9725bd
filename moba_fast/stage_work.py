"""Count what each stage must compute and move, from shapes and the choice of blocks.

A multiplication with an addition counts as two FLOPs. Bytes are those that a stage must
read and write if nothing stays in a cache between its reads: each input and each result
once, by the order that the kernels have, blocks of keys outside, their queries inside.
So K and V of a chosen block count once for all queries that chose it, and a row of a
query once for every block that it chose. A kernel that takes more does more than it
must.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

ROWS_PER_COUNT = 2**16
INDEX = 4
WIDE_INDEX = 8
FLOAT32 = 4


@dataclass(frozen=True)
class Counts:
    """Hold how much a choice of blocks leaves to do, over all query heads.

    Attributes:
        routed: (query, past block) pairs that were chosen.
        past_pairs: (query, key) pairs in chosen past blocks.
        own_pairs: (query, key) pairs in own blocks.
        scores: (query, past block) pairs that the gate compares.
        lists: (key/value head, block) pairs that at least one query chose.
        blocks: blocks of the pack.
    """

    routed: int
    past_pairs: int
    own_pairs: int
    scores: int
    lists: int
    blocks: int


def count(selected, blocks, heads_k):
    """Count what a choice of blocks leaves to do.

    Args:
        selected: (T, H, topk) block ids, -1 for none.
        blocks: Blocks of these tokens.
        heads_k: HK, divides H.

    Returns:
        Counts.

    Example: query 3 chose block 0 and reads its 2 keys, and 2 keys of its own block;
    queries 0 to 2 read 1, 2 and 1 keys of their own blocks only. Queries 2 and 3 each
    had one past block to score.
        >>> from moba_fast.blocks import partition
        >>> selected = torch.tensor([[-1, 0], [-1, 0], [-1, 1], [0, 1]])[:, None]
        >>> count(selected, partition([0, 4], block_size=2), heads_k=1)
        Counts(routed=1, past_pairs=2, own_pairs=6, scores=2, lists=1, blocks=2)
    """
    heads, n_blocks = selected.shape[1], len(blocks.start)
    own = int((blocks.position - blocks.start[blocks.of_query] + 1).sum())
    scores = int((blocks.of_query - blocks.first_of_query).sum())
    if selected.shape[2] == 1:
        scores = 0
    # A last entry is what the padding -1 takes.
    lengths = pad(blocks.end - blocks.start, (0, 1))
    chosen = lengths.new_zeros(heads_k, n_blocks + 1, dtype=torch.bool)
    routed = past_pairs = 0
    for past in selected[..., :-1].split(ROWS_PER_COUNT):
        routed += int((past >= 0).sum())
        past_pairs += int(lengths[past.long()].sum())
        groups = past.transpose(0, 1).reshape(heads_k, -1)
        for of_head, blocks_of_head in zip(chosen, groups, strict=True):
            of_head[blocks_of_head.long()] = True
    lists = int(chosen[:, :-1].sum())
    return Counts(routed, past_pairs, heads * own, heads * scores, lists, n_blocks)


def work(counts, point):
    """Compare the pairs of causal attention with those that a choice of blocks reads.

    Returns:
        dict of the columns pairs_full, pairs_moba and work_ratio.

    Example: full attention reads 1 + 2 + 3 + 4 keys.
        >>> from moba_fast.points import Point
        >>> work(Counts(1, 2, 6, 2, 1, 2), Point(4, 1, 1, 8, 2, 2, "float32"))
        {'pairs_full': 10, 'pairs_moba': 8, 'work_ratio': 1.25}
    """
    full = point.batch * point.H * point.S * (point.S + 1) // 2
    read = counts.past_pairs + counts.own_pairs
    return {"pairs_full": full, "pairs_moba": read, "work_ratio": full / read}


def stage_work(counts, point, kernel):
    """Say what every stage must compute and move.

    FLOPs, with D elements per head: 1 for every element of K that is averaged; 2 D for
    every score of the gate; 4 D for every (query, key) pair that is attended, half for
    the score and half for the value; 2 D for every partial result that is merged; in
    the backward pass 10 D for every pair, five products of D.

    Bytes, with rows of D elements in the dtype of the inputs:

    - partition writes four numbers for every token.
    - pool reads K, writes the means in float32.
    - gate reads Q and the means, writes the choice.
    - route reads the choice of past blocks, writes the id of every routed pair and
      where every list begins.
    - past reads the ids, a row of Q for each, K and V of the chosen blocks; writes a
      row and its lse for each.
    - arrange reads the ids and writes them in the order in which a kernel takes them.
    - current reads Q, K and V; writes output and lse.
    - combine reads what past and current wrote and the choice; writes output and lse.
    - backward reads Q, K, V, the output and its gradient, lse and the choice, and K and
      V of the chosen blocks; for every routed pair its id, a row of Q, one of the
      output's gradient and two float32 numbers; writes the gradients; for every routed
      pair it writes a row for the gradient of Q and reads it again.

    Kernel "triton" attends to the own block where it merges, so that its combine does
    current's work, too, without the traffic between them.

    Args:
        counts: Counts.
        point: Point.
        kernel: name of the kernel that does the work.

    Returns:
        dict of columns STAGE_flops and STAGE_bytes for `stages.stages_of(kernel)` and
        "backward".

    Example: 4 tokens of one head with 8 elements in float32; see `count`.
        >>> from moba_fast.points import Point
        >>> point = Point(4, 1, 1, 8, 2, 2, "float32", backward=True)
        >>> found = stage_work(Counts(1, 2, 6, 2, 1, 2), point, "aten")
        >>> found["pool_flops"], found["pool_bytes"]  # 4 keys in, 2 means out
        (32, 192)
        >>> found["past_flops"], found["past_bytes"]  # id; q, 2 k, 2 v; row and lse
        (64, 200)
        >>> found["backward_flops"]
        640
    """
    work = forward_work(counts, point, kernel)
    if point.backward:
        work["backward"] = backward_work(counts, point)
    return {
        f"{stage}_{unit}": amount
        for stage, amounts in work.items()
        for unit, amount in zip(("flops", "bytes"), amounts, strict=True)
    }


def forward_work(counts, point, kernel):
    """Return (FLOPs, bytes) of every stage of the forward pass; see `stage_work`."""
    D, tokens = point.D, point.batch * point.S
    row, queries, keys, choice = traffic(point)
    lse, ids = FLOAT32 * tokens * point.H, INDEX * counts.routed
    means = FLOAT32 * counts.blocks * point.HK * D
    scored = queries + means if counts.scores else 0
    past_choice = choice - INDEX * tokens * point.H
    lists = INDEX * (counts.blocks * point.HK + 1)
    parts = counts.routed * (row + FLOAT32)
    chosen = counts.lists * point.block_size * 2 * row
    attend = 4 * D * counts.own_pairs, queries + 2 * keys + queries + lse
    merge = 2 * D * counts.routed, parts + choice
    work = {
        "partition": (0, 4 * WIDE_INDEX * tokens),
        "pool": (tokens * point.HK * D, keys + means),
        "gate": (2 * D * counts.scores, scored + choice),
        "route": (0, past_choice + ids + lists),
        "past": (
            4 * D * counts.past_pairs,
            ids + counts.routed * row + chosen + parts,
        ),
    }
    if kernel == "triton":
        work["combine"] = tuple(map(sum, zip(attend, merge, strict=True)))
    else:
        work["arrange"] = 0, 2 * ids
        work["current"] = attend
        work["combine"] = merge[0], merge[1] + 2 * (queries + lse)
    return work


def backward_work(counts, point):
    """Return (FLOPs, bytes) of the backward pass; see `stage_work`."""
    row, queries, keys, choice = traffic(point)
    lse = FLOAT32 * point.batch * point.S * point.H
    per_pair = INDEX + 2 * row + 2 * FLOAT32 + 2 * row
    chosen = counts.lists * point.block_size * 2 * row
    whole = 3 * queries + 2 * keys + lse + choice + queries + 2 * keys
    flops = 10 * point.D * (counts.past_pairs + counts.own_pairs)
    return flops, whole + chosen + counts.routed * per_pair


def traffic(point):
    """Return the bytes of a row of D, of Q, of K and of the choice of blocks."""
    tokens = point.batch * point.S
    row = point.D * getattr(torch, point.dtype).itemsize
    choice = INDEX * tokens * point.H * point.topk
    return row, tokens * point.H * row, tokens * point.HK * row, choice

"""Measure one call of moba_attention, stage by stage, next to dense attention."""

import statistics
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from moba_fast.blocks import partition
from moba_fast.dense import dense_candidates, with_gradients
from moba_fast.memory import peak_in_child, peak_of
from moba_fast.moba import moba_attention
from moba_fast.timing import spread, stage_times, take_turns, timed
from moba_fast.workspace import DEFAULT

ROWS_PER_COUNT = 2**16


@dataclass(frozen=True)
class Point:
    """Describe one measurement; every query, key and value is drawn at random.

    Attributes:
        S: tokens of the one sequence.
        H: query heads.
        HK: key/value heads.
        D: head dimension.
        block_size: tokens per block.
        topk: blocks per query.
        dtype: name of a torch dtype.
        backward: whether the gradients are computed, too.
    """

    S: int
    H: int
    HK: int
    D: int
    block_size: int
    topk: int
    dtype: str
    backward: bool = False

    @property
    def direction(self):
        """What is measured, in words."""
        return "forward+backward" if self.backward else "forward"

    def __str__(self):
        heads = f"{self.H}" if self.H == self.HK else f"{self.H}/{self.HK}"
        return (
            f"{in_units(self.S)} H={heads} D={self.D} B={self.block_size} "
            f"k={self.topk} {self.dtype} {self.direction}"
        )


def in_units(count):
    """Write a number of tokens with K or M where it divides.

    Example:
        >>> in_units(32_768), in_units(2**20), in_units(1000)
        ('32K', '1M', '1000')
    """
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def inputs(point, device):
    """Draw q, k, v and the gradient of the output, with a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, point.dtype)
    heads = (point.H, point.HK, point.HK, point.H)
    drawn = [
        torch.randn(
            point.S, h, point.D, dtype=dtype, device=device, generator=generator
        )
        for h in heads
    ]
    return [x.requires_grad_(point.backward) for x in drawn[:3]], drawn[3]


def measure(point, device, backend="auto", repeats=5, workspace_bytes=DEFAULT):
    """Time a call, its stages and every dense kernel, taking turns.

    Args:
        point: Point.
        device: "cpu" or "cuda".
        backend: as in `moba_attention`.
        repeats: repetitions of each, fewer where one takes longer than PATIENCE.
        workspace_bytes: as in `moba_attention`.

    Returns:
        dict of columns; see `bench.COLUMNS`. Times are in seconds, memory in bytes.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: if memory runs out.
        ValueError: if the workspace is too small.
    """
    leaves, dout = inputs(point, device)
    attend = caller(point, leaves, backend, workspace_bytes)
    row = work(attend(return_aux=True)[2], point)
    dense, missing = dense_candidates(leaves, dout)
    ours = {"ours": lambda: with_gradients(attend(), leaves, dout)}
    times = take_turns({**ours, **dense}, repeats, device)
    row |= spread("total", times.pop("ours")) | stage_times(attend, device)
    if point.backward:
        out = attend()
        row["backward_s"] = timed(lambda: with_gradients(out, leaves, dout), device)
    row |= compare(times, missing, row)
    if device == "cuda":
        return row | peak_of(ours["ours"])
    arguments = point, backend, workspace_bytes, torch.get_num_threads()
    return row | peak_in_child(call_and_warm_up, *arguments)


def caller(point, leaves, backend, workspace_bytes):
    """Bind all that a point says to moba_attention."""

    def attend(**options):
        return moba_attention(
            *leaves,
            block_size=point.block_size,
            topk=point.topk,
            backend=backend,
            workspace_bytes=workspace_bytes,
            **options,
        )

    return attend


def call_and_warm_up(point, backend, workspace_bytes, threads):
    """Prepare a call on the CPU, and the same of two blocks to warm up."""
    torch.set_num_threads(threads)
    leaves, dout = inputs(point, "cpu")

    def later(tokens):
        some = [x.detach()[:tokens].requires_grad_(point.backward) for x in leaves]
        attend = caller(point, some, backend, workspace_bytes)
        return lambda: with_gradients(attend(), some, dout[:tokens])

    return later(2 * point.block_size), later(point.S)


def work(selected, point):
    """Count the pairs of causal attention and those that a choice of blocks reads."""
    offsets = torch.tensor([0, point.S], device=selected.device)
    full = point.H * point.S * (point.S + 1) // 2
    read = pairs_read(selected, partition(offsets, point.block_size))
    return {"pairs_full": full, "pairs_moba": read, "work_ratio": full / read}


def pairs_read(selected, blocks):
    """Count the (query, key) pairs that a choice of blocks reads.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.

    Example: queries 0 to 2 read 1, 2 and 1 keys of their own block, query 3 reads 4.
        >>> selected = torch.tensor([[-1, 0], [-1, 0], [-1, 1], [0, 1]])[:, None]
        >>> pairs_read(selected, partition([0, 4], block_size=2))
        8
    """
    own = blocks.position - blocks.start[blocks.of_query] + 1
    total = int(own.sum()) * selected.shape[1]
    # A last entry of 0 is what the padding -1 takes.
    lengths = pad(blocks.end - blocks.start, (0, 1))
    for past in selected[..., :-1].split(ROWS_PER_COUNT):
        total += int(lengths[past.long()].sum())
    return total


def compare(times, missing, row):
    """Name the fastest dense kernel and how much of the work ratio was achieved.

    Args:
        times: dict of dense candidates, as `take_turns` returns it.
        missing: dict from name to the reason why a dense kernel does not run.
        row: with total_median_s and work_ratio.
    """
    done = {n: t for n, t in times.items() if isinstance(t, list)}
    failed = {n: "out of memory" for n in times if n not in done} | missing
    notes = [f"{n}: {statistics.median(t):.6f} s" for n, t in done.items()]
    notes += [f"{n}: {reason}" for n, reason in failed.items()]
    found = {"dense_notes": "; ".join(notes)}
    if not done:
        return found
    best = min(done, key=lambda name: statistics.median(done[name]))
    found |= {"dense_kernel": best, **spread("dense", done[best])}
    found["speedup"] = found["dense_median_s"] / row["total_median_s"]
    found["share_of_work_ratio"] = found["speedup"] / row["work_ratio"]
    return found

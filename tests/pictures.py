"""Inputs that the tests of `moba_lab.viz` draw."""

from types import SimpleNamespace

import numpy as np

from moba_lab import programs
from moba_lab.example import running_example
from moba_ref import (
    attend_current,
    attend_past,
    gate_scores,
    partition,
    pool_keys,
    route,
    select_blocks,
)


def scene(q, k, v, cu_seqlens, block_size, topk):
    """Run the stages once and keep what figures are made from."""
    blocks = partition(cu_seqlens, block_size)
    k_mean = pool_keys(k, blocks)
    selected = select_blocks(q, k_mean, blocks, topk)
    routing = route(selected, blocks)
    scale = q.shape[-1] ** -0.5
    slots, n_blocks = topk - 1, len(blocks.start)
    row = routing.query * q.shape[1] + routing.entry // n_blocks
    return SimpleNamespace(
        lists=SimpleNamespace(
            pairs=row * slots + routing.slot, cu_pairs=routing.cu_pairs
        ),
        blocks=blocks,
        scores=gate_scores(q, k_mean, blocks),
        selected=selected,
        routing=routing,
        lse_current=attend_current(q, k, v, blocks, scale)[1],
        lse_past=attend_past(q, k, v, routing, blocks, scale)[1],
    )


def example(packed=False):
    e = running_example(packed=packed)
    return scene(e.q, e.k, e.v, e.cu_seqlens, e.block_size, e.topk)


def large():
    """Make 512 tokens in five sequences, one of them empty, and 8 heads."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 512, 8, 4))
    return scene(q, k, v, [0, 100, 101, 101, 300, 512], block_size=16, topk=4)


def programs_of(s):
    """Return the programs of three kernels, with the tiles of the running example."""
    lists, heads = s.lists, s.selected.shape[1]
    return {
        "choose_best": programs.gate_programs(s.blocks, heads, heads, rows=16),
        "attend_resident": programs.list_programs(
            lists.pairs, lists.cu_pairs, s.selected, s.blocks, rows=1024
        ),
        "combine_tile": programs.query_programs(s.selected, s.blocks, rows=16),
    }


# Eight scores in tiles of four, of which two are kept: the rounds by hand.
STREAM = (
    [0.5, 2.0, -1.0, 1.0, 0.0, 3.0, 0.7, 1.5],
    [(0, 1, -1), (0, 3, -1), (0, 0, None), (4, 5, 3), (4, 7, None)],
    4,
    2,
)


def stages_measured(block_size, past, backward=None):
    """Write a recorded measurement by hand, as text like a CSV file's.

    A copy reaches 2 TB/s and a product 400 TFLOP/s, so that the roof bends at 200 FLOP
    per byte.

    Args:
        block_size: of the shape.
        past: seconds of a stage that needs 1 ms for 2 GB, and less for 100 GFLOP.
        backward: seconds of one that needs 5 ms for 2 TFLOP; None: not measured.
    """
    row = {"S": 65536, "batch": 2, "H": 16, "topk": 8, "block_size": block_size}
    row |= {"copy_bytes_per_s": 2e12, "matmul_flops_per_s": 4e14, "status": "ok"}
    row |= {"device": "a GPU", "driver": "1.2", "torch": "2.11", "triton": "3.6"}
    row |= {"date": "2026-11-24T18:09:38Z", "workload": "D"}
    # The least times are 0.5 ms for both: one stage computes nothing.
    row |= {"route_s": 0.002, "route_flops": 0, "route_bytes": 1e9}
    row |= {"pool_s": 0.001, "pool_flops": 1e9, "pool_bytes": 1e9}
    row |= {"past_s": past, "past_flops": 1e11, "past_bytes": 2e9}
    row |= {"partition_s": 0.00001, "partition_flops": "", "partition_bytes": ""}
    row |= {"backward_s": "", "backward_flops": 2e12, "backward_bytes": 2e9}
    if backward:
        row["backward_s"] = backward
    return {name: str(value) for name, value in row.items()}


MEASURED = {
    "plain": [stages_measured(128, past=0.002)],
    "packed": [stages_measured(128, past=0.002, backward=0.02)],
    "large": [
        stages_measured(128, past=0.005),
        stages_measured(4096, past=0.002, backward=0.01),
    ],
}


def pack_by_hand():
    """Make 9 tokens in two sequences whose choices are written out below.

    Blocks of 2 tokens: 0 (0, 1), 1 (2, 3), 2 (4); then 3 (5, 6), 4 (7, 8).
    """
    rows = [[-1, 0], [-1, 0], [0, 1], [0, 1], [1, 2], [-1, 3], [-1, 3], [3, 4], [3, 4]]
    selected = np.array(rows, dtype=np.int32)[:, None]
    return partition([0, 5, 9], block_size=2), selected


def measured(which, scale=1.0):
    """Make panels of curves over few, many or one length, and what they come from.

    Args:
        which: "plain", "packed" or "large".
        scale: factor of all values.
    """
    last = {"plain": 14, "packed": 10, "large": 23}[which]
    tokens = tuple(2**n for n in range(10, last + 1))
    panels = {}
    for factor, title in ((1, "forward"), (3, "forward+backward")):
        dense = [factor * scale * (1e-6 + 1e-12 * n * n) for n in tokens]
        flash = [factor * scale * (1e-4 + 1e-8 * n) for n in tokens]
        ours = [factor * scale * (1e-5 + 1e-9 * n) for n in tokens]
        panels[title] = {
            name: (tokens, values, [0.9 * v for v in values], [1.2 * v for v in values])
            for name, values in (("dense", dense), ("flash", flash), ("triton", ours))
        }
    if which == "packed":
        panels["forward+backward"] = {}
    source = "NVIDIA H100 80GB HBM3, driver 580.159.04, PyTorch 2.11.0+cu130, "
    return panels, source + "Triton 3.6.0, 2026-11-24 to 2026-11-26"

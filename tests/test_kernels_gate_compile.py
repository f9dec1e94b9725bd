"""pool, gate and route compile for GPUs that are not here, as they should."""

from itertools import product

import pytest
import torch
from compiled import SHARED, Job, check_all

pytest.importorskip("triton", reason="triton is not here")

from moba_fast.kernels import gate, pool

# The compiler saves a few registers outside of loops, where nothing needs them.
FEW_BYTES = 16
# Products of float32 are unrolled: those of 256 elements did not fit with any tile.
WIDE_FLOAT32_BYTES = 128
# Blocks of one part and of several, prefill with one pass and with two, the second one
# with more blocks than a program scales, a decoding step, and lists.
COMMON = [
    ("pool_keys", {"dtype": "bfloat16", "D": 128, "block_size": 128}),
    ("pool_keys", {"dtype": "float32", "D": 80, "block_size": 5000}),
    ("select_blocks", {"dtype": "bfloat16", "D": 128, "topk": 12}),
    ("select_blocks", {"dtype": "float16", "D": 64, "topk": 40, "block_size": 2}),
    ("select_blocks", {"dtype": "bfloat16", "D": 128, "tokens": 1}),
    ("build_lists", {"ratio": 4, "topk": 8}),
]
DTYPES = ("bfloat16", "float16", "float32")
MANY_BLOCKS = {"block_size": 2, "topk": 33}
EVERY = [("pool_keys", {"D": D}) for D in pool.configurations()] + [
    ("select_blocks", {"dtype": dtype, "D": D, "tokens": rows, **MANY_BLOCKS})
    for dtype, D, rows in product(DTYPES, (16, 32, 64, 128, 256), (16, 64, 128))
]


def jobs_of(cases):
    return [
        Job(f"launch_gate:{stage}", target, arguments)
        for stage, arguments in cases
        for target in SHARED
    ]


def check(job, launches):
    """Check all launches of a job, the tensor cores in the one that scores."""
    assert launches
    wide = job.arguments.get("dtype") == "float32" and job.arguments["D"] > 128
    for kernel in launches:
        assert kernel.shared <= SHARED[job.target], kernel
        if job.target != "gfx942":
            unrolled = wide and kernel.name == "choose_best"
            assert kernel.spills <= (WIDE_FLOAT32_BYTES if unrolled else FEW_BYTES)
        if job.target == "sm_90" and kernel.name == "choose_best":
            dtype = getattr(torch, job.arguments["dtype"])
            rows = job.arguments.get("tokens", 256)
            tile = gate.config(dtype, job.arguments["D"], rows, "hopper")
            meant = dtype.itemsize == 2 and tile.rows >= 64
            assert (kernel.wgmma > 0) == meant, kernel


def test_common_kernels_compile():
    check_all(jobs_of(COMMON), check)


@pytest.mark.slow
def test_every_kernel_compiles():
    check_all(jobs_of(EVERY), check)

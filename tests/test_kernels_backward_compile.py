"""The kernels of the backward pass compile for GPUs that are not here, as they should.

Their loops hold 128 float32 sums per thread, so that few registers are left: these
tests say whether they suffice.
"""

import pytest
import torch
from compiled import SHARED, Job, check_all

tilings = pytest.importorskip("moba_fast.kernels.backward_tilings", reason="no triton")

# The compiler saves a few registers outside of loops, where nothing needs them.
FEW_BYTES = 16
# Addresses of the atomic additions, six registers, are saved within the loop, too: 10
# instructions of 1,000.
ATOMIC_BYTES = 32
# By whether sums are in a fixed order: blocks of one tile and of more, with an end
# within a tile, and a topk of 1.
COMMON = [
    (("bfloat16", 128, 128), 7, True),
    (("bfloat16", 128, 512), 2, True),
    (("bfloat16", 128, 4096), 11, False),
    (("float16", 80, 500), 2, True),
    (("float32", 64, 100), 3, True),
    (("bfloat16", 64, 64), 0, True),
]
EVERY = [
    ((str(dtype).split(".")[1], D, block_size), 7, deterministic)
    for dtype, D, block_size in tilings.configurations()
    for deterministic in (True, False)
]


def jobs_of(cases):
    names = "dtype", "D", "block_size", "slots", "deterministic"
    for shape, slots, deterministic in cases:
        arguments = dict(zip(names, (*shape, slots, deterministic), strict=True))
        for target in SHARED:
            yield Job("launch_backward:attention_backward", target, arguments)


def check(job, launches):
    assert launches[-1].name == "queries_kernel"
    dtype, D, block_size, _, deterministic = job.arguments.values()
    for kernel in launches:
        assert kernel.shared <= SHARED[job.target], kernel
        if job.target == "gfx942":
            continue
        atomic = kernel.name == "past_kernel" and not deterministic
        assert kernel.spills <= (ATOMIC_BYTES if atomic else FEW_BYTES), kernel
    if job.target != "sm_90":
        return
    tiling = tilings.backward_tiling(getattr(torch, dtype), D, block_size, "hopper")
    tiles = {"past": tiling.past, "current": tiling.current}
    tiles |= {"queries": tiling.queries, "past_queries": tiling.queries}
    for kernel in launches:
        used = tiles.get(kernel.name.removesuffix("_kernel"))
        if used is None:
            continue
        # Hopper's tensor cores take 64 rows of the left factor at a time.
        owned = used.rows if "queries" in kernel.name else used.keys
        meant = dtype != "float32" and owned >= 64
        assert (kernel.wgmma > 0) == meant, kernel


def test_common_kernels_compile():
    check_all(list(jobs_of(COMMON)), check)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_kernel_compiles(dtype):
    cases = [case for case in EVERY if case[0][0] == dtype]
    check_all(list(jobs_of(cases)), check)


def test_common_kernels_are_among_all_that_may_be_compiled():
    for (dtype, *shape), *_ in COMMON:
        for family in tilings.FAMILIES:
            every = [
                tilings.backward_tiling(getattr(torch, t), d, b, family)
                for (t, d, b), *_ in EVERY
            ]
            wanted = tilings.backward_tiling(getattr(torch, dtype), *shape, family)
            assert wanted in every

"""The kernels of the backward pass compile for GPUs that are not here, as they should.

Their loops hold 128 float32 sums per thread, so that few registers are left: these
tests say whether they suffice.
"""

import pytest
import torch
from compiled import SHARED, Job, check_all

tilings = pytest.importorskip("moba_fast.kernels.backward_tilings", reason="no triton")

# The compiler saves a few registers outside of loops, where nothing needs them, and
# hardly any within: two instructions of 700 there access them.
FEW_BYTES, FEW_RELOADS = 16, 2
# Atomic additions take their result from registers, so addresses in shared memory give
# way where heads end within a tile: a turn loads them, 5 instructions of 900.
ATOMIC_BYTES, ATOMIC_RELOADS = 32, 5
# By whether sums are in a fixed order: blocks of one tile and of more, with an end
# within a tile, a topk of 1, small blocks and wide heads.
COMMON = [
    (("bfloat16", 128, 128), 7, True),
    (("bfloat16", 128, 512), 2, True),
    (("bfloat16", 128, 4096), 11, False),
    (("float16", 80, 500), 2, True),
    (("float32", 64, 100), 3, True),
    (("bfloat16", 64, 64), 0, True),
    (("bfloat16", 64, 16), 7, True),
    (("bfloat16", 256, 100), 7, False),
    (("float32", 192, 32), 2, True),
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
    deterministic = job.arguments["deterministic"]
    for kernel in launches:
        assert kernel.shared <= SHARED[job.target], kernel
        if job.target == "gfx942":
            continue
        atomic = kernel.name == "past_kernel" and not deterministic
        assert kernel.spills <= (ATOMIC_BYTES if atomic else FEW_BYTES), kernel
        assert kernel.reloads <= (ATOMIC_RELOADS if atomic else FEW_RELOADS), kernel
        if job.target == "sm_90":
            # Hopper's tensor cores take 64 rows of the left factor at a time.
            meant = {shape for shape in products(job, kernel.name) if shape[0] >= 64}
            if job.arguments["dtype"] == "float32":
                meant = set()
            assert set(map(tuple, kernel.products)) == meant, kernel
            assert (kernel.wgmma > 0) == bool(meant), kernel


def products(job, kernel):
    """Return (rows, inner size, columns) of what a kernel multiplies on Hopper."""
    dtype, D, block_size, _, deterministic = job.arguments.values()
    shape = getattr(torch, dtype), D, block_size, "hopper"
    tiling = tilings.backward_tiling(*shape, atomic=not deterministic)
    used = {"past_kernel": tiling.past, "current_kernel": tiling.current}
    used |= dict.fromkeys(("queries_kernel", "past_queries_kernel"), tiling.queries)
    if kernel not in used:
        return set()
    rows, keys, width = used[kernel].rows, used[kernel].keys, tilings.padded(D)
    # The gradients of queries have queries as rows even where a program owns keys, so
    # that a block of few keys leaves this product, alone, with many rows.
    dq = rows, keys, width
    if "queries" in kernel:
        return {(rows, width, keys), dq}
    of_keys = {(keys, width, rows), (keys, rows, width)}
    one_pass = not deterministic or block_size <= keys
    return of_keys | {dq} if kernel == "past_kernel" and one_pass else of_keys


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

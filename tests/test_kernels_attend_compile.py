"""attend_past and attend_current compile for GPUs that are not here, as they should."""

import pytest
import torch
from compiled import SHARED, Job, check_all

tilings = pytest.importorskip("moba_fast.kernels.tilings", reason="triton is not here")

# The compiler saves up to four registers outside of loops, where nothing needs them,
# to reach a step of occupancy.
FEW_BYTES = 16
# Six where an own block is split in two loops; on an H100, tiles with which none is
# saved are slower by a fifth.
SPLIT_BYTES = 24
LARGE = tilings.LARGE
STAGES = {
    "attend_past": tilings.attend_tiling,
    "attend_current": tilings.combine_tiling,
}
# Workloads with blocks that stay, that stream, and that end within a tile.
COMMON = [
    ("attend_past", ("bfloat16", 128, 128), 7),
    ("attend_past", ("bfloat16", 128, 512), 2),
    ("attend_past", ("bfloat16", 128, 4096), 11),
    ("attend_past", ("float16", 80, 500), 2),
    ("attend_past", ("float32", 64, 16), 3),
    ("attend_current", ("bfloat16", 128, 128), 7),
    ("attend_current", ("bfloat16", 128, 4096), 11),
    ("attend_current", ("float32", 64, 100), 0),
]
EVERY = [
    (stage, (str(dtype).split(".")[1], D, block_size), slots)
    for stage, tiling in STAGES.items()
    for dtype, D, block_size in tilings.configurations(tiling)
    for slots in ((7,) if stage == "attend_past" else (0, 1, 7, 40))
]


def jobs_of(cases):
    for stage, (dtype, D, block_size), slots in cases:
        arguments = {"dtype": dtype, "D": D, "block_size": block_size, "slots": slots}
        for target in SHARED:
            yield Job(f"launch_attend:{stage}", target, arguments)


def check(job, launches):
    """Check the last launch of a job, the kernel that attends."""
    kernel, target = launches[-1], job.target
    assert kernel.shared <= SHARED[target]
    if target == "gfx942":
        return
    split = kernel.name == "combine_tile" and job.arguments["block_size"] >= LARGE
    assert kernel.spills <= (SPLIT_BYTES if split else FEW_BYTES)
    if target == "sm_90":
        dtype, D, block_size, _ = job.arguments.values()
        choose = STAGES[job.call.split(":")[1]]
        tiling = choose(getattr(torch, dtype), D, block_size, "hopper")
        meant = dtype != "float32" and tiling.rows >= 64
        assert (kernel.wgmma > 0) == meant
        if tiling.registers:
            assert kernel.registers <= tiling.registers
            # Two programs share a multiprocessor.
            assert 2 * (kernel.shared + 1024) <= 228 * 1024
            assert 2 * 32 * kernel.num_warps * kernel.registers <= 2**16


def test_common_kernels_compile():
    check_all(list(jobs_of(COMMON)), check)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_kernel_compiles(stage, dtype):
    cases = [case for case in EVERY if (case[0], case[1][0]) == (stage, dtype)]
    check_all(list(jobs_of(cases)), check)


def test_common_kernels_are_among_all_that_may_be_compiled():
    for stage, (dtype, D, block_size), _ in COMMON:
        choose = STAGES[stage]
        every = [c[1] for c in EVERY if c[0] == stage]
        for family in tilings.FAMILIES:
            wanted = choose(getattr(torch, dtype), D, block_size, family)
            assert wanted in [
                choose(getattr(torch, t), d, b, family) for t, d, b in every
            ]

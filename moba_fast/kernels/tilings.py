"""Choose the tiles of the kernels that attend.

The numbers are those with which no kernel spills registers and, on Hopper, two programs
share a multiprocessor where they fit, so that one computes while the other one waits.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
import triton

FAMILIES = ("hopper", "ampere", "amd")
# Triton, too, reads it when kernels are defined.
INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Tiling:
    """Say how a kernel divides its work.

    Attributes:
        rows: queries of a tile.
        keys: keys of a tile.
        warps: warps of a program.
        stages: tiles of keys under way at once, plus one.
        tiles: tiles of queries of a program. More than 1: the block fits into one tile
            of keys, which stays while the queries pass by.
        registers: limit per thread; None: the compiler's.
    """

    rows: int
    keys: int
    warps: int
    stages: int = 1
    tiles: int = 1
    registers: int | None = None

    @property
    def options(self):
        """Options of a launch, besides arguments."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit}


# By the width of a tile, up to which an entry is good.
STREAMED = {
    "hopper": {
        64: Tiling(128, 64, warps=8, stages=3, registers=128),
        128: Tiling(128, 64, warps=8, stages=2, registers=128),
        256: Tiling(64, 64, warps=8, stages=2),
    },
    "ampere": {
        128: Tiling(64, 64, warps=4, stages=2),
        256: Tiling(64, 32, warps=8, stages=2),
    },
    "amd": {
        128: Tiling(128, 32, warps=4, stages=2),
        256: Tiling(64, 32, warps=4),
    },
}
# For blocks of LONG keys and more: a program then loads enough of them to live alone on
# a multiprocessor.
STREAMED_LONG = {
    **STREAMED,
    "hopper": STREAMED["hopper"] | {128: Tiling(128, 128, warps=8, stages=3)},
}
LONG = 2048
RESIDENT = {
    "hopper": {128: Tiling(64, 128, warps=4), 256: Tiling(64, 128, warps=8)},
    "ampere": {128: Tiling(64, 128, warps=4), 256: Tiling(64, 64, warps=8)},
    "amd": {128: Tiling(64, 128, warps=4), 256: Tiling(64, 64, warps=4)},
}
CURRENT = {
    "hopper": {
        128: Tiling(64, 64, warps=4, stages=3),
        256: Tiling(64, 32, warps=8, stages=2),
    },
    "ampere": {
        64: Tiling(64, 64, warps=4, stages=2),
        128: Tiling(64, 32, warps=4, stages=2),
        256: Tiling(64, 32, warps=8, stages=2),
    },
    "amd": {128: Tiling(64, 32, warps=4), 256: Tiling(32, 32, warps=4)},
}
# float32 has no tensor cores that keep its precision, so tiles are small.
STREAMED_FLOAT32 = {64: Tiling(32, 16, warps=4), 256: Tiling(16, 32, warps=8)}
RESIDENT_FLOAT32 = {128: Tiling(32, 32, warps=4), 256: Tiling(16, 32, warps=4)}
CURRENT_FLOAT32 = {128: Tiling(32, 16, warps=4), 256: Tiling(16, 16, warps=4)}
# Blocks from here on are large: most tiles of an own block need no mask.
LARGE = 256
# Pairs that a program of a small block takes: it reads keys and values once for them,
# and the list of a block that everybody chooses still makes many programs.
PAIRS = 1024


def gpu_family():
    """Name the family of the current GPU; the interpreter takes the newest one."""
    if INTERPRETED:
        return "hopper"
    return family_of(triton.runtime.driver.active.get_current_device())


@cache
def family_of(device):
    """Name the family of the GPU that is current: Triton asks PyTorch each time."""
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return "amd"
    # The others have 99 KiB of shared memory, and A100 keeps two programs in its 163.
    return "hopper" if target.arch in (90, 100, 103) else "ampere"


def padded(n):
    """Return the smallest size of a tile that holds n.

    Example:
        >>> padded(3), padded(64), padded(80)
        (16, 64, 128)
    """
    return max(16, power_of_2(n))


def power_of_2(n):
    """Return the smallest power of two that is at least n, an integer from 1 on.

    Here and in `cdiv`: Triton's own take longer on the host than many a step of it.

    Example:
        >>> [power_of_2(n) for n in (1, 2, 3, 64, 65)]
        [1, 2, 4, 64, 128]
    """
    return 1 << (n - 1).bit_length()


def cdiv(a, b):
    """Divide and round up.

    Example:
        >>> cdiv(8, 4), cdiv(9, 4)
        (2, 3)
    """
    return -(-a // b)


def attend_tiling(dtype, D, block_size, family):
    """Choose the tiles of `attend_past`.

    Args:
        dtype: of q, k and v.
        D: head dimension.
        block_size: keys per block.
        family: one of FAMILIES.

    Returns:
        Tiling.

    Example:
        >>> attend_tiling(torch.float16, 128, 512, "ampere")
        Tiling(rows=64, keys=64, warps=4, stages=2, tiles=1, registers=None)
        >>> attend_tiling(torch.float16, 128, 100, "ampere").tiles
        16
    """
    wide = dtype.itemsize > 2
    resident = fit(RESIDENT_FLOAT32 if wide else RESIDENT[family], D)
    if block_size <= resident.keys:
        # Blocks of few keys have lists of few queries.
        rows = min(resident.rows, padded(block_size))
        keys = padded(block_size)
        return replace(resident, rows=rows, keys=keys, tiles=PAIRS // rows)
    streamed = (STREAMED_LONG if block_size >= LONG else STREAMED)[family]
    return fit(STREAMED_FLOAT32 if wide else streamed, D)


@lru_cache
def combine_tiling(dtype, D, block_size, family):
    """Choose the tiles of `attend_current`; see `attend_tiling`.

    block_size may be the length of the longest block.

    Example: a tile is not larger than a block.
        >>> combine_tiling(torch.float16, 128, 20, "ampere")
        Tiling(rows=32, keys=32, warps=4, stages=2, tiles=1, registers=None)
    """
    table = CURRENT_FLOAT32 if dtype.itemsize > 2 else CURRENT[family]
    tiling, most = fit(table, D), padded(block_size)
    return replace(tiling, rows=min(tiling.rows, most), keys=min(tiling.keys, most))


def fit(table, D):
    """Return the entry of a table of widths for heads of D elements."""
    return next(tiling for width, tiling in table.items() if width >= D)


def configurations(tiling):
    """List inputs with which `attend_tiling` or `combine_tiling` chooses all it can.

    Args:
        tiling: one of the two functions.

    Returns:
        List of (dtype, D, block_size), one for every kernel that may be compiled.

    Example:
        >>> (torch.float32, 256, 16) in configurations(combine_tiling)
        True
    """

    def kernel(dtype, D, block_size):
        chosen = [tiling(dtype, D, block_size, f) for f in FAMILIES]
        return *chosen, *(block_size % c.keys == 0 for c in chosen)

    return different(kernel)


def different(kernel):
    """List inputs, one for every kernel that they lead to.

    Args:
        kernel: function of dtype, D and block_size, that tells apart what these choose.

    Returns:
        List of (dtype, D, block_size).
    """
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in (256, 192, 128, 96, 64, 32, 16):
            for block_size in (16, 32, 64, 100, 128, 500, 512, 2048, 2100):
                inputs = dtype, D, block_size
                key = dtype, padded(D), padded(D) - D, kernel(*inputs)
                found.setdefault(key, inputs)
    return list(found.values())

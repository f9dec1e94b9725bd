"""Choose the tiles of the kernels of the backward pass.

The numbers are those with which, on NVIDIA's GPUs, a kernel keeps next to no registers
in memory inside its loop. A tile of keys has gradients of keys and values in registers,
twice 128 x 128 float32 for the largest, half of what a multiprocessor has.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from moba_fast.kernels.tilings import FAMILIES, Tiling, different, fit, padded


@dataclass(frozen=True)
class BackwardTiling:
    """Say how each kernel of the backward pass divides its work.

    Attributes:
        past: of `past_kernel`, that owns keys and walks a list of queries.
        current: of `current_kernel`, that owns keys and walks their block's queries.
        queries: of the kernels that own queries and walk the keys of a block.
    """

    past: Tiling
    current: Tiling
    queries: Tiling


# By the width of a tile, up to which an entry is good.
PAST = {
    "hopper": {
        128: Tiling(64, 128, warps=8, stages=3),
        256: Tiling(32, 64, warps=8, stages=2),
    },
    "ampere": {
        128: Tiling(64, 64, warps=8, stages=2),
        256: Tiling(32, 32, warps=8, stages=2),
    },
    "amd": {
        128: Tiling(32, 32, warps=4),
        256: Tiling(16, 16, warps=4),
    },
}
# Atomic additions take their result from registers, so less is under way beside it.
PAST_ATOMIC = PAST | {
    "hopper": {
        128: Tiling(64, 128, warps=8, stages=2),
        256: Tiling(16, 64, warps=8, stages=2),
    },
}
CURRENT = {
    "hopper": {
        128: Tiling(64, 128, warps=8, stages=2),
        256: Tiling(32, 64, warps=8, stages=2),
    },
    "ampere": PAST["ampere"],
    "amd": PAST["amd"],
}
QUERIES = {
    "hopper": {
        128: Tiling(64, 64, warps=4, stages=2),
        256: Tiling(64, 64, warps=8, stages=2),
    },
    "ampere": {
        128: Tiling(64, 32, warps=4, stages=2),
        256: Tiling(32, 32, warps=8, stages=2),
    },
    "amd": PAST["amd"],
}
# float32 has no tensor cores that keep its precision, so tiles are small. Wide products
# leave no registers for tiles under way: with 2 stages these are in shared memory. On
# AMD 4 warps instead of 8 have twice as many registers per thread.
NARROW_FLOAT32 = {64: Tiling(16, 32, warps=4), 128: Tiling(16, 16, warps=8)}
KEYS_FLOAT32 = {
    "hopper": NARROW_FLOAT32 | {256: Tiling(16, 16, warps=8, stages=2)},
    "ampere": NARROW_FLOAT32 | {256: Tiling(16, 16, warps=8, stages=2)},
    "amd": NARROW_FLOAT32 | {256: Tiling(16, 16, warps=4)},
}
QUERIES_FLOAT32 = {64: Tiling(32, 16, warps=4), 256: Tiling(16, 16, warps=8)}


@lru_cache
def backward_tiling(dtype, D, block_size, family, atomic=False):
    """Choose the tiles of the backward pass.

    Args:
        dtype: of q, k and v.
        D: head dimension.
        block_size: keys per block.
        family: one of FAMILIES.
        atomic: whether dq is added up by atomic operations.

    Returns:
        BackwardTiling.

    Example: a tile has no more keys than a block.
        >>> import torch
        >>> backward_tiling(torch.float16, 128, 128, "hopper").past.keys
        128
        >>> backward_tiling(torch.float16, 128, 20, "hopper").past.keys
        32
    """
    if dtype.itemsize > 2:
        tables = KEYS_FLOAT32[family], KEYS_FLOAT32[family], QUERIES_FLOAT32
    else:
        past = PAST_ATOMIC if atomic else PAST
        tables = past[family], CURRENT[family], QUERIES[family]
    past, current, queries = (fit(table, D) for table in tables)
    most = padded(block_size)
    return BackwardTiling(
        replace(past, keys=min(past.keys, most)),
        replace(current, keys=min(current.keys, most), rows=min(current.rows, most)),
        replace(queries, keys=min(queries.keys, most), rows=min(queries.rows, most)),
    )


def configurations():
    """List inputs with which `backward_tiling` chooses all it can.

    Returns:
        List of (dtype, D, block_size), one for every set of kernels.

    Example:
        >>> import torch
        >>> (torch.float32, 256, 16) in configurations()
        True
    """

    def kernels(dtype, D, block_size):
        chosen = [backward_tiling(dtype, D, block_size, f) for f in FAMILIES]
        ends = [(block_size % c.past.keys, block_size > c.past.keys) for c in chosen]
        return *chosen, *((end == 0, longer) for end, longer in ends)

    return different(kernels)

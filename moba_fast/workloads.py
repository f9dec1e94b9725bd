"""List the shapes that are measured, in suites."""

from dataclasses import replace

from moba_fast._flash import GPU_KERNELS
from moba_fast.points import Point

KIBI, MEBI = 2**10, 2**20
ON_CPU = {"H": 4, "HK": 4, "D": 64, "dtype": "float32"}
ON_GPU = {"D": 128, "dtype": "bfloat16"}
SMALL_BLOCKS = {"block_size": 128, "topk": 8}
LARGE_BLOCKS = {"block_size": 512, "topk": 3}


def both(*points):
    """List every point forward, then forward and backward."""
    return [replace(p, backward=b) for p in points for b in (False, True)]


def clusters(*points):
    """Choose blocks in clusters, with the kernels written for MoBA only."""
    return [replace(p, routing="clustered", backends=("triton",)) for p in points]


def h200():
    """List workloads A to F and a sweep over lengths, all in bfloat16, D=128.

    A: prefill at 1M tokens, the shape of the MoBA paper's Figure 2a; its peak memory
    is a result of its own. B: 10M tokens in 64 blocks, topk=3, its Figure 2b. C and D:
    small blocks, the shapes that FlashMoBA (arXiv 2511.11571) reports. E: training at
    32K tokens. F: where MoBA begins to be faster. lengths: 64 blocks, topk=3, as B.
    """
    [a] = group("A", Point(MEBI, 32, 8, block_size=4096, topk=12, **ON_GPU))
    b = Point(10 * MEBI, 1, 1, block_size=10 * MEBI // 64, topk=3, **ON_GPU)
    c, d = (
        replace(Point(S * KIBI, 16, 16, **SMALL_BLOCKS, **ON_GPU), batch=2)
        for S in (512, 64)
    )
    # Without a kernel for it, the gate over 8192 blocks takes most of a minute.
    c_backward = replace(c, backward=True, backends=("triton",))
    e = Point(32 * KIBI, 16, 16, **LARGE_BLOCKS, **ON_GPU)
    crossover = [
        Point(S * KIBI, 16, 16, **blocks, **ON_GPU)
        for blocks in (LARGE_BLOCKS, SMALL_BLOCKS)
        for S in (1, 2, 4, 8, 16, 32)
    ]
    lengths = [
        Point(S * KIBI, 8, 8, block_size=S * KIBI // 64, topk=3, **ON_GPU)
        for S in (2**i for i in range(11))
    ]
    return [
        *both(a),
        *clusters(*both(a)),
        *group("B", b),
        *group("C", c, c_backward, *clusters(*both(c))),
        *group("D", *both(d, replace(d, routing="clustered"))),
        *group("E", *both(e, replace(e, routing="clustered"))),
        *group("F", *both(*crossover)),
        *group("lengths", *both(*lengths)),
    ]


def group(workload, *points):
    """Name the workload of some points."""
    return [replace(p, workload=workload) for p in points]


def shorter(points, factor):
    """Divide the lengths of points, to see that everything runs, not to quote.

    A point keeps two blocks at least, so that a past one is read; those that become
    equal are listed once.

    Example:
        >>> points = [Point(S, 1, 1, 8, 64, 3, "float32") for S in (2048, 4096)]
        >>> [p] = shorter(points, factor=64)
        >>> p.S, p.block_size
        (128, 64)
    """
    short = (replace(p, S=max(p.S // factor, 2 * p.block_size)) for p in points)
    return list(dict.fromkeys(short))


SUITES = {
    "cpu": [
        Point(32 * KIBI, block_size=512, topk=3, **ON_CPU),
        Point(64 * KIBI, block_size=512, topk=3, **ON_CPU),
        Point(32 * KIBI, block_size=128, topk=8, **ON_CPU),
        Point(32 * KIBI, block_size=512, topk=3, **ON_CPU, backward=True),
    ],
    "flash": both(
        *(
            Point(n * KIBI, 16, 16, block_size=512, topk=3, **ON_GPU)
            for n in (8, 16, 32, 64, 128)
        ),
        Point(32 * KIBI, 32, 8, block_size=512, topk=3, **ON_GPU),
        Point(128 * KIBI, 32, 8, block_size=2048, topk=8, **ON_GPU),
        Point(512 * KIBI, 16, 16, block_size=4096, topk=8, **ON_GPU),
        Point(MEBI, 32, 8, block_size=4096, topk=12, **ON_GPU),
    ),
    "kernels": both(
        *(
            Point(n * KIBI, 16, 16, **blocks, **ON_GPU)
            for blocks in (LARGE_BLOCKS, SMALL_BLOCKS)
            for n in (8, 32, 64)
        )
    ),
    "h200": h200(),
}
QUICK = {
    name: shorter(points, 64 if name == "h200" else 8)
    for name, points in SUITES.items()
}
# Backends of a suite. Those that do not run are named in the table, not measured.
BACKENDS = {
    "cpu": ("auto",),
    "flash": ("flash",),
    "kernels": tuple(f"flash:{name}" for name in GPU_KERNELS),
    "h200": ("triton", "flash"),
}
DEVICES = {name: "cpu" if name == "cpu" else "cuda" for name in SUITES}

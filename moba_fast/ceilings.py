"""Measure what a device can do at best: copy memory, and multiply matrices."""

import statistics

import torch

from moba_fast.timing import clock_of, synchronize

# Large enough that no cache holds a copy and that starting the work takes no share.
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
MATRIX = {"cpu": (2048, torch.float32), "cuda": (8192, torch.bfloat16)}
CALLS = {"cpu": 3, "cuda": 30}


def ceilings(device):
    """Measure the two rates that no stage can pass for long.

    Args:
        device: "cpu" or "cuda".

    Returns:
        dict of columns: copy_bytes_per_s, each byte of a large copy counted when it is
        read and when it is written; matmul_flops_per_s of a large product of random
        matrices, bfloat16 on a GPU and float32 on a CPU. Medians of several calls.
    """
    return {
        "copy_bytes_per_s": copy_rate(device),
        "matmul_flops_per_s": matmul_rate(device),
    }


def copy_rate(device):
    """Return the bytes per second of a large copy, read and written ones."""
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device)
    return 2 * source.nbytes / seconds


def matmul_rate(device):
    """Return the FLOPs per second of a large product."""
    size, dtype = MATRIX[device]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(size, size, dtype=dtype, device=device, generator=generator)
        for _ in range(2)
    )
    product = torch.empty_like(a)
    seconds = median_seconds(lambda: torch.mm(a, b, out=product), device)
    return 2 * size**3 / seconds


def median_seconds(function, device):
    """Return the median time of calls that follow each other without a pause."""
    function()
    synchronize(device)
    clock = clock_of(device)
    marks = [clock.mark()]
    for _ in range(CALLS[device]):
        function()
        marks.append(clock.mark())
    synchronize(device)
    return statistics.median(map(clock.seconds, marks, marks[1:]))

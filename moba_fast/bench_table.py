"""Lay out the rows of a measurement for reading."""

from moba_fast.points import point_of
from moba_fast.stages import STAGES

MEBI = 2**20
TIMES = (*STAGES, "other", "backward", "backward_other", "host")


def report(row):
    """Lay out a row for reading: a line of results, then one with the stages.

    On a GPU every stage that computes or moves something has a line of its own.

    Example:
        >>> row = {"S": 8, "H": 1, "HK": 1, "D": 4, "block_size": 2, "topk": 1}
        >>> row |= {"dtype": "float32", "direction": "forward", "kernel": "cpu"}
        >>> row |= {"status": "out of memory", "message": "no room"}
        >>> print(report(row))
        8 H=1 D=4 B=2 k=1 float32 forward, cpu: out of memory: no room
    """
    start = f"{point_of(row)}, {row['kernel'] or row['backend']}: "
    if row["status"] != "ok":
        return f"{start}{row['status']}: {row['message']}"
    below = [stages_line(row), *(rates(row) if row["device"] != "CPU" else [])]
    return "\n  ".join([start + result_line(row), *below])


def result_line(row):
    """Say how fast a call was, and how fast the fastest dense kernel."""
    line = f"{in_words(row['total_median_s'])} ({row['total_repeats']} runs)"
    if "dense_kernel" in row:
        line += (
            f", {row['dense_kernel']} {in_words(row['dense_median_s'])}: "
            f"{row['speedup']:.2f}x of {row['work_ratio']:.2f}x, share "
            f"{row['share_of_work_ratio']:.0%}"
        )
    if "peak_bytes" in row:
        extra = max(0, row["peak_bytes"] - row["output_bytes"])
        line += (
            f", peak {row['peak_bytes'] / MEBI:,.0f} MiB, "
            f"{extra / MEBI:,.0f} MiB of it beyond the results"
        )
    return line


def stages_line(row):
    """List the stages that took time."""
    times = {name: row.get(f"{name}_s", 0.0) for name in TIMES}
    return ", ".join(
        f"{name.replace('_', ' ')} {in_words(t)}" for name, t in times.items() if t
    )


def rates(row):
    """Say what every stage achieved of the two ceilings, a line each.

    Example:
        >>> row = {"past_s": 0.5, "past_flops": 3e14, "past_bytes": 1e12}
        >>> rates(row | {"matmul_flops_per_s": 8e14, "copy_bytes_per_s": 4e12})
        ['past      500 ms: 600.0 TFLOP/s (75 %), 2000 GB/s (50 %)']
    """
    lines = []
    for name in (*STAGES, "backward"):
        seconds = row.get(f"{name}_s")
        if not seconds or f"{name}_flops" not in row:
            continue
        flops, moved = (row[f"{name}_{unit}"] / seconds for unit in ("flops", "bytes"))
        compute = flops / row["matmul_flops_per_s"]
        memory = moved / row["copy_bytes_per_s"]
        lines.append(
            f"{name:<10}{in_words(seconds)}: {flops / 1e12:.1f} TFLOP/s "
            f"({100 * compute:.0f} %), {moved / 1e9:.0f} GB/s ({100 * memory:.0f} %)"
        )
    return lines


def in_words(seconds):
    """Write a time with the unit that suits it.

    Example:
        >>> in_words(0.0123), in_words(1.5)
        ('12.3 ms', '1.50 s')
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"

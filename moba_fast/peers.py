"""Hold what was measured of dense attention, and compare a call with it."""

import statistics
from dataclasses import dataclass, field

from moba_fast.memory import out_of_memory
from moba_fast.timing import spread


@dataclass(frozen=True)
class Dense:
    """Hold what was measured of dense attention, by name of its kernel.

    Attributes:
        times: lists of seconds, or the error that came instead.
        missing: reasons why kernels do not take such inputs.
        peaks: bytes that a call took beyond its inputs; on a GPU only.
        graphs: seconds of a call that a CUDA graph replays, of short forward passes.
    """

    times: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)
    peaks: dict = field(default_factory=dict)
    graphs: dict = field(default_factory=dict)


def compare(dense, row):
    """Name the fastest dense kernel and how much of the work ratio was achieved.

    Args:
        dense: Dense.
        row: with total_median_s and work_ratio, where there is a result.
    """
    done = {n: t for n, t in dense.times.items() if isinstance(t, list)}
    failed = {n: reason(e) for n, e in dense.times.items() if n not in done}
    notes = [f"{n}: {in_note(t)}" for n, t in done.items()]
    notes += [f"{n}: {reason}" for n, reason in (failed | dense.missing).items()]
    found = {"dense_notes": "; ".join(notes)}
    if not done:
        return found
    best = min(done, key=lambda name: statistics.median(done[name]))
    found |= {"dense_kernel": best, **spread("dense", done[best])}
    for column, of in (
        ("dense_peak_bytes", dense.peaks),
        ("dense_graph_s", dense.graphs),
    ):
        found[column] = of.get(best, "")
    if "total_median_s" in row:
        found["speedup"] = found["dense_median_s"] / row["total_median_s"]
        found["share_of_work_ratio"] = found["speedup"] / row["work_ratio"]
    return found


def in_note(seconds):
    """Write the median of some times and, of more than one, their quartiles.

    Example:
        >>> in_note([0.5, 0.25, 0.75]), in_note([0.5])
        ('0.500000 s (0.375000 to 0.625000)', '0.500000 s')
    """
    low, middle, high = (
        spread("x", seconds)[f"x_{name}_s"]
        for name in ("quartile1", "median", "quartile3")
    )
    note = f"{middle:.6f} s"
    return f"{note} ({low:.6f} to {high:.6f})" if len(seconds) > 1 else note


def reason(error):
    """Say why a dense kernel has no time."""
    return "out of memory" if out_of_memory(error) else first_line(error)


def first_line(error):
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)

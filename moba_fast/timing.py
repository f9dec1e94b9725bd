"""Time functions in turn, and the stages of a call from within."""

import statistics
import time
from contextlib import contextmanager

import torch

from moba_fast import op
from moba_fast.memory import out_of_memory

# The function of `op` that does each stage's work.
STAGES = {
    "partition": "blocks_of",
    "pool": "pool_keys",
    "gate": "select_blocks",
    "route": "route",
    "current": "attend_current",
    "arrange": "past_lists",
    "past": "attend_lists",
    "combine": "combine_lists",
}
# Seconds after which a candidate is not repeated any more.
PATIENCE = 20.0


def take_turns(candidates, repeats, device):
    """Time functions in turn, so that a slow spell of the machine hits all of them.

    Args:
        candidates: dict from name to a function of no arguments; "ours" among them.
        repeats: calls of each after the one that warms up, which counts only where it
            took so long that there is no time for more.
        device: "cpu" or "cuda".

    Returns:
        dict from name to a list of seconds, or to the error of a dense candidate that
        ran out of memory.
    """
    times, left = {}, {}
    for name, function in candidates.items():
        try:
            first = timed(function, device)
        except Exception as error:
            if name == "ours" or not out_of_memory(error):
                raise
            times[name], left[name] = error, 0
        else:
            left[name] = min(repeats, int(PATIENCE / first))
            times[name] = [] if left[name] else [first]
    for turn in range(repeats):
        for name, function in candidates.items():
            if turn < left[name]:
                times[name].append(timed(function, device))
    return times


def spread(name, seconds):
    """Summarise repeated times; with fewer than two the quartiles are the median.

    Example:
        >>> spread("total", [3.0, 1.0, 2.0])["total_median_s"]
        2.0
    """
    low, middle, high = (
        statistics.quantiles(seconds, n=4, method="inclusive")
        if len(seconds) > 1
        else seconds * 3
    )
    return {
        f"{name}_median_s": middle,
        f"{name}_min_s": min(seconds),
        f"{name}_quartile1_s": low,
        f"{name}_quartile3_s": high,
        f"{name}_repeats": len(seconds),
    }


def timed(function, device):
    """Return the seconds that a call takes, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    """Wait until the device has done all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def stage_times(attend, device):
    """Time the stages within one more call."""
    seconds = dict.fromkeys(STAGES, 0.0)
    with torch.no_grad(), clocks_on_stages(seconds, device):
        whole = timed(attend, device)
    row = {f"{name}_s": value for name, value in seconds.items()}
    return {**row, "other_s": whole - sum(seconds.values())}


@contextmanager
def clocks_on_stages(seconds, device):
    """Let the functions of `op` add their time to a dict while this is entered."""

    def clocked(stage, function):
        def run(*arguments, **options):
            synchronize(device)
            start = time.perf_counter()
            result = function(*arguments, **options)
            synchronize(device)
            seconds[stage] += time.perf_counter() - start
            return result

        return run

    originals = {name: getattr(op, name) for name in STAGES.values()}
    for stage, name in STAGES.items():
        setattr(op, name, clocked(stage, originals[name]))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(op, name, function)

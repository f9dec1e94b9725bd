"""Time functions in turn, on the CPU or on a GPU."""

import statistics
import time
import traceback

import torch

from moba_fast.memory import out_of_memory

# Seconds after which a candidate is not repeated any more.
PATIENCE = 20.0


def take_turns(candidates, repeats, device, patience=None, compiling=()):
    """Time functions in turn, so that a slow spell of the machine hits all of them.

    Args:
        candidates: dict from name to a function of no arguments.
        repeats: calls of each after the one that warms up, which counts only where it
            took so long that there is no time for more.
        device: "cpu" or "cuda".
        patience: seconds after which a candidate is not repeated; None: PATIENCE.
        compiling: names of candidates whose first call may compile kernels, so that it
            never counts and another one follows.

    Returns:
        dict from name to a list of seconds, or to the error that a candidate raised.

    Example:
        >>> times = take_turns({"nothing": lambda: None, "wrong": lambda: 1 / 0}, 3,
        ...                    "cpu")
        >>> len(times["nothing"]), times["wrong"]
        (3, ZeroDivisionError('division by zero'))
    """
    patience = PATIENCE if patience is None else patience
    times, left = {}, {}
    for name, function in candidates.items():
        first = attempt(lambda function=function: timed(function, device))
        if isinstance(first, Exception):
            times[name], left[name] = first, 0
        else:
            least = 1 if name in compiling else 0
            left[name] = max(least, min(repeats, int(patience / first)))
            times[name] = [] if left[name] else [first]
    for turn in range(repeats):
        for name, function in candidates.items():
            if turn < left[name]:
                times[name].append(timed(function, device))
    return times


def attempt(function):
    """Return what a function returns, or the error that it raises.

    An error that is not for want of memory is printed as well, with where it came from.
    """
    try:
        return function()
    except Exception as error:
        if not out_of_memory(error):
            traceback.print_exc()
        # What the frames hold would stay in memory as long as the error.
        traceback.clear_frames(error.__traceback__)
        return error.with_traceback(None)


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


def clock_of(device):
    """Return the clock that times work on a device."""
    return DeviceClock if device == "cuda" else HostClock


class HostClock:
    """Read the time of the host."""

    mark = staticmethod(time.perf_counter)

    @staticmethod
    def seconds(begin, end):
        """Return the time between two marks."""
        return end - begin


class DeviceClock:
    """Read the time at which the GPU gets to a point in its queue."""

    @staticmethod
    def mark():
        """Put a mark into the queue, without waiting for it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(begin, end):
        """Return the time between two marks that the GPU has passed."""
        return begin.elapsed_time(end) / 1000

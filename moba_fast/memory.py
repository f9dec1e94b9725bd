"""Measure the memory that a call takes, and know when there was not enough."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def out_of_memory(error):
    """Say whether an error means that memory ran out.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(ValueError("topk"))
        (True, False)
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = "out of memory", "allocate memory", "not enough memory", "workspace_bytes="
    return isinstance(error, (RuntimeError, ValueError)) and any(
        word in str(error) for word in words
    )


def watched(function, peaks, name):
    """Return a function that also notes the GPU memory that its first call takes.

    Asking takes about a millisecond of the host, more than some calls take.

    Args:
        function: of no arguments.
        peaks: dict that gets the bytes beyond what was there before, under `name`.
        name: hashable.
    """

    def run():
        if name in peaks:
            return function()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        return result

    return run


def peak_in_child(prepare, *arguments):
    """Return the memory that a call takes on the CPU, measured in a process of its own.

    A process that has measured before has memory left over, which a call may take
    without growing.

    Args:
        prepare: function of a module that returns two functions of no arguments: one
            that loads libraries and starts threads, and the one to measure.
        arguments: of `prepare`; both must be picklable.
    """
    if not RESET.exists():
        return {"peak_how": f"not measured: needs Linux's {RESET}"}
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(growth, prepare, *arguments).result()
    except BrokenProcessPool:
        return {"peak_how": "not measured: the process that measures it was killed"}
    except Exception as error:
        if not out_of_memory(error):
            raise
        return {"peak_how": f"not measured: {error}"}


def growth(prepare, *arguments):
    """Run a call and return by how much the largest size of this process grew."""
    warm_up, call = prepare(*arguments)
    warm_up()
    try:
        RESET.write_text("5")
    except OSError as error:
        return {"peak_how": f"not measured: {RESET} cannot be written ({error})"}
    before = largest_size()
    call()
    how = "growth of a fresh process, outputs included"
    return {"peak_bytes": largest_size() - before, "peak_how": how}


def largest_size():
    """Read the largest size of this process since it was reset, in bytes."""
    [line] = [x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

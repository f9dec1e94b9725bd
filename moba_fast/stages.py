"""Time the stages of a call from within."""

import statistics
import time
from contextlib import contextmanager
from importlib import import_module

import torch

from moba_fast.dense import with_gradients
from moba_fast.timing import DeviceClock, clock_of, synchronize

# The function that does the work of each stage, in the module that calls it.
STAGES = {
    "partition": ("moba_fast.op", "blocks_of"),
    "pool": ("moba_fast.op", "pool_keys"),
    "gate": ("moba_fast.op", "select_blocks"),
    "route": ("moba_fast.op", "route"),
    "current": ("moba_fast.op", "attend_current"),
    "arrange": ("moba_fast.op", "past_lists"),
    "past": ("moba_fast.op", "attend_lists"),
    "combine": ("moba_fast.op", "combine_lists"),
}
BACKWARD = (("moba_fast.op", "add_current"), ("moba_fast.op", "add_past"))
# The kernels written for MoBA attend to the own block where they merge.
STAGES_OF_TRITON = {
    "partition": ("moba_fast.op", "blocks_of"),
    "pool": ("moba_fast.fused", "pool_keys"),
    "gate": ("moba_fast.fused", "select_blocks"),
    "route": ("moba_fast.fused", "build_lists"),
    "past": ("moba_fast.fused", "attend_past"),
    "combine": ("moba_fast.fused", "attend_current"),
}
BACKWARD_OF_TRITON = (("moba_fast.fused", "attention_backward"),)
# The C++ functions have the same stages.
STAGES_OF_CPP = {
    name: (module.replace("fused", "compiled"), function)
    for name, (module, function) in STAGES_OF_TRITON.items()
}
# Seconds for all calls of which the stages are timed, unless one takes longer.
BUDGET = 5.0
REPLAYS = 20
# What a GPU is kept busy with while the host prepares a call, per second of that. Its
# clock has at most 2 GHz; twice the time leaves a margin.
CYCLES_PER_SECOND = 4e9


def stages_of(kernel):
    """Return the stages of a kernel: dict of the forward ones, tuple of functions."""
    if kernel == "triton":
        return STAGES_OF_TRITON, BACKWARD_OF_TRITON
    if kernel == "compiled":
        return STAGES_OF_CPP, BACKWARD
    return STAGES, BACKWARD


def stage_times(attend, leaves, dout, device, kernel, repeats=5):
    """Time the stages within further calls; on a GPU the medians of several.

    On a GPU the first call of each pair says how long the host is busy with it. During
    the second one the GPU is kept busy for that long first, so that all of the call is
    in its queue before it begins and no stage waits for the host. A call that asks the
    GPU for sizes waits for it nevertheless.

    Args:
        attend: function of no arguments that returns the output.
        leaves: q, k and v; gradients are computed if they need one.
        dout: gradient of the output.
        device: "cpu" or "cuda".
        kernel: what the call runs.
        repeats: pairs of calls on a GPU, fewer where they take longer than BUDGET.

    Returns:
        dict of columns in seconds: STAGE_s; other_s, the rest of the forward pass; with
        gradients backward_s and backward_other_s, the rest of the backward pass; on a
        GPU host_s, after which a call returns while the GPU may still work.
    """

    def call(busy=0.0):
        return one_call(attend, leaves, dout, device, kernel, busy)

    start = time.perf_counter()
    first = call()
    if device == "cpu":
        del first["host_s"]
        return first
    pairs = min(repeats, int(BUDGET / 2 / (time.perf_counter() - start)))
    host = [call()["host_s"] for _ in range(pairs)] or [first["host_s"]]
    host = statistics.median(host)
    calls = [call(host) for _ in range(pairs)] or [first]
    found = {name: statistics.median(c[name] for c in calls) for name in first}
    return found | {"host_s": host}


def one_call(attend, leaves, dout, device, kernel, busy=0.0):
    """Time the stages within one call, before which a GPU is busy for some seconds.

    The other arguments are those of `stage_times`.
    """
    clock = clock_of(device)
    forward, backward = stages_of(kernel)
    marks = []
    synchronize(device)
    if busy:
        torch.cuda._sleep(int(busy * CYCLES_PER_SECOND))
    start = time.perf_counter()
    parts = {f"backward {name}": (module, name) for module, name in backward}
    with clocks_on(forward | parts, clock, marks):
        begin = clock.mark()
        out = attend()
        middle, n_forward = clock.mark(), len(marks)
        with_gradients(out, leaves, dout)
        end = clock.mark()
    host = time.perf_counter() - start
    synchronize(device)

    found = dict.fromkeys(forward, 0.0)
    for stage, a, b in marks[:n_forward]:
        found[stage] += clock.seconds(a, b)
    row = {f"{name}_s": value for name, value in found.items()}
    row["other_s"] = clock.seconds(begin, middle) - sum(found.values())
    if out.requires_grad:
        row["backward_s"] = sum(
            clock.seconds(a, b) for stage, a, b in marks[n_forward:] if stage in parts
        )
        row["backward_other_s"] = clock.seconds(middle, end) - row["backward_s"]
    return row | {"host_s": host}


def graph_seconds(attend):
    """Time replays of a call that a CUDA graph has captured, which need no host.

    Returns:
        seconds of one replay, the median.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        attend()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        attend()
    marks = []
    for _ in range(REPLAYS):
        begin = DeviceClock.mark()
        graph.replay()
        marks.append((begin, DeviceClock.mark()))
    torch.cuda.synchronize()
    return statistics.median(DeviceClock.seconds(*pair) for pair in marks)


@contextmanager
def clocks_on(functions, clock, marks):
    """Mark when functions of modules begin and end, while this is entered.

    Args:
        functions: dict from stage to (module, name) of a function that does its work.
        clock: one of `timing.clock_of`.
        marks: list to which (stage, begin, end) is added for every call.
    """

    def clocked(stage, function):
        def run(*arguments, **options):
            begin = clock.mark()
            result = function(*arguments, **options)
            marks.append((stage, begin, clock.mark()))
            return result

        return run

    places = {s: (import_module(m), name) for s, (m, name) in functions.items()}
    originals = {s: getattr(*place) for s, place in places.items()}
    try:
        for stage, place in places.items():
            setattr(*place, clocked(stage, originals[stage]))
        yield
    finally:
        for stage, place in places.items():
            setattr(*place, originals[stage])

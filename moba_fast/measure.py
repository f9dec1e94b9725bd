"""Measure calls of moba_attention, stage by stage, next to dense attention."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from moba_fast.backends import FUSED, kernel_of
from moba_fast.blocks import partition
from moba_fast.dense import PACKAGES, dense_candidates, with_gradients
from moba_fast.memory import out_of_memory, peak_in_child, watched
from moba_fast.moba import moba_attention
from moba_fast.peers import Dense, compare, first_line
from moba_fast.points import Point, inputs
from moba_fast.stage_work import count, stage_work, work
from moba_fast.stages import graph_seconds, stage_times
from moba_fast.timing import PATIENCE, attempt, spread, take_turns
from moba_fast.workspace import DEFAULT

WARM_UP_BLOCKS = 2
# Seconds of a call that waits for the host, if any does.
SHORT = 0.02
ON_GPU = "allocated on the GPU, outputs included"


@dataclass(frozen=True)
class Settings:
    """Say how points are measured.

    Attributes:
        repeats: repetitions of every call.
        patience: seconds after which a call is not repeated any more.
        workspace_bytes: as in `moba_attention`.
    """

    repeats: int = 5
    patience: float = PATIENCE
    workspace_bytes: int = DEFAULT


@dataclass(frozen=True)
class Case:
    """Hold a point, its inputs as `points.inputs` draws them, and the settings."""

    point: Point
    leaves: list
    dout: torch.Tensor
    settings: Settings

    def attend(self, backend, **options):
        """Call moba_attention with all that the point says."""
        return moba_attention(
            *self.leaves,
            block_size=self.point.block_size,
            topk=self.point.topk,
            cu_seqlens=self.point.cu_seqlens,
            backend=backend,
            workspace_bytes=self.settings.workspace_bytes,
            **options,
        )

    def run(self, backend):
        """Attend, and compute the gradients where the point asks for them."""
        return with_gradients(self.attend(backend), self.leaves, self.dout)

    def beginning(self, tokens):
        """Return the case of the first tokens of the first sequence."""
        tokens = min(tokens, self.point.S)
        some = [x.detach()[:tokens] for x in self.leaves]
        some = [x.requires_grad_(self.point.backward) for x in some]
        point = replace(self.point, S=tokens, batch=1)
        return Case(point, some, self.dout[:tokens], self.settings)

    def counts(self, backend):
        """Count what the backend's choice of blocks leaves to do."""
        with torch.no_grad():
            selected = self.attend(backend, return_aux=True)[2]
        offsets = torch.arange(self.point.batch + 1, device=selected.device)
        blocks = partition(offsets * self.point.S, self.point.block_size)
        return count(selected, blocks, self.point.HK)


def measure(point, device, backends=("auto",), settings=None, dense=None):
    """Time the calls of backends, their stages and every dense kernel, taking turns.

    Args:
        point: Point.
        device: "cpu" or "cuda".
        backends: names as in `moba_attention`.
        settings: Settings; None: the defaults.
        dense: Dense of a point that differs in its routing only, so that dense
            attention, which reads everything, is not measured again. None: not there.

    Returns:
        rows: list of dict, one per backend, of columns in `bench.COLUMNS`. Times are in
            seconds, memory in bytes. The column status says how it went: "ok", "does
            not run", "out of memory" or "failed", the last three with a message.
        dense: Dense as measured or given; None where no backend could be tried.
    """
    rows = [begin_row(point, device, backend) for backend in backends]
    running = [row for row in rows if row["status"] == "ok"]
    if not running:
        return rows, dense
    settings = settings or Settings()
    names = [row["backend"] for row in running]
    case = found = attempt(lambda: Case(point, *inputs(point, device), settings))
    if isinstance(case, Case):
        found = attempt(lambda: time_calls(case, names, dense))
    if isinstance(found, Exception):
        for row in running:
            row |= failure(found)
        return rows, dense
    times, peaks, dense = found
    good = [name for name, result in times.items() if isinstance(result, list)]
    counts = attempt(lambda: case.counts(good[0])) if good else None
    for row in running:
        name = row["backend"]
        errors = [x for x in (times[name], counts) if isinstance(x, Exception)]
        found = (
            errors[0]
            if errors
            else attempt(
                lambda row=row: outcome(case, row, times[row["backend"]], counts)
            )
        )
        row |= failure(found) if isinstance(found, Exception) else found
        row |= compare(dense, row)
        if name in peaks:
            row |= {"peak_bytes": peaks[name], "peak_how": ON_GPU}
    return rows, dense


def begin_row(point, device, backend):
    """Say what is measured, and whether that runs here."""
    row = point.columns | {"backend": backend, "status": "ok", "message": ""}
    try:
        return row | {"kernel": kernel_for(point, device, backend)}
    except ValueError as error:
        return row | {"kernel": "", "status": "does not run", "message": str(error)}


def kernel_for(point, device, backend):
    """Name the kernel that a point's call runs; a ValueError says that none does."""
    like = torch.empty(1, 1, point.D, dtype=getattr(torch, point.dtype), device=device)
    return kernel_of(backend, like.expand(point.batch * point.S, point.H, point.D))


def failure(error):
    """Say in columns which error came instead of a result.

    Example:
        >>> failure(MemoryError())
        {'status': 'out of memory', 'message': 'MemoryError'}
    """
    status = "out of memory" if out_of_memory(error) else "failed"
    return {"status": status, "message": first_line(error)}


def time_calls(case, backends, dense):
    """Time whole calls, taking turns; see `measure`.

    Returns:
        times: dict from backend to a list of seconds, or to an error.
        peaks: dict from backend to the bytes of GPU memory that a call took.
        dense: Dense.
    """
    times, peaks, calls = {}, {}, {}
    for name in backends:
        # The first call of its kind compiles kernels and loads libraries.
        short = case.beginning(WARM_UP_BLOCKS * case.point.block_size)
        error = attempt(lambda short=short, name=name: short.run(name))
        if isinstance(error, Exception):
            times[name] = error
        else:
            calls["ours", name] = lambda name=name: case.run(name)
    peers, missing = {}, {}
    if dense is None:
        peers, missing = dense_candidates(case.leaves, case.dout, case.point.batch)
    calls |= {("dense", name): function for name, function in peers.items()}
    device = case.dout.device.type
    if device == "cuda":
        calls = {name: watched(call, peaks, name) for name, call in calls.items()}
    settings = case.settings
    limits = settings.repeats, device, settings.patience
    found = take_turns(calls, *limits, may_compile(calls, device))
    times |= of_kind("ours", found)
    if dense is None:
        of_dense = of_kind("dense", found)
        graphs = {
            name: replay_seconds(case, of_dense[name], call)
            for name, call in peers.items()
        }
        dense = Dense(of_dense, missing, of_kind("dense", peaks), graphs)
    return times, of_kind("ours", peaks), dense


def may_compile(names, device):
    """Return the calls that may compile kernels when first made: pairs (kind, name).

    Example:
        >>> may_compile([("ours", "flash"), ("dense", "flash")], "cuda")
        [('ours', 'flash')]
    """
    if device != "cuda":
        return []
    return [x for x in names if x[0] == "ours" or x[1] in PACKAGES]


def replay_seconds(case, seconds, call):
    """Time a call replayed from a CUDA graph, if it is a short forward pass.

    Args:
        case: Case.
        seconds: list of what the call took before, or its error.
        call: function of no arguments.

    Returns:
        seconds, the median; "" where that makes no sense or does not work.
    """
    wanted = case.dout.device.type == "cuda" and not case.point.backward
    if not wanted or isinstance(seconds, Exception) or min(seconds) >= SHORT:
        return ""
    found = attempt(lambda: graph_seconds(call))
    return "" if isinstance(found, Exception) else found


def of_kind(kind, found):
    """Return the entries whose names have a kind, without it.

    Example:
        >>> of_kind("dense", {("ours", "flash"): 1, ("dense", "flash"): 2})
        {'flash': 2}
    """
    return {name: value for (k, name), value in found.items() if k == kind}


def outcome(case, row, seconds, counts):
    """Return what was measured of a backend, and what it had to do, as columns."""
    point, device, backend = case.point, case.dout.device.type, row["backend"]
    found = spread("total", seconds) | work(counts, point)
    found |= stage_times(
        lambda: case.attend(backend),
        *(case.leaves, case.dout, device, row["kernel"], case.settings.repeats),
    )
    found |= stage_work(counts, point, row["kernel"])
    if row["kernel"] == FUSED:
        found["graph_s"] = replay_seconds(case, seconds, partial(case.attend, backend))
    results = [case.dout, *(case.leaves if point.backward else ())]
    found["output_bytes"] = sum(x.nbytes for x in results)
    if device == "cpu":
        arguments = point, backend, case.settings, torch.get_num_threads()
        found |= peak_in_child(call_and_warm_up, *arguments)
    return found


def call_and_warm_up(point, backend, settings, threads):
    """Prepare a call on the CPU, and the same of two blocks to warm up."""
    torch.set_num_threads(threads)
    case = Case(point, *inputs(point, "cpu"), settings)
    short = case.beginning(WARM_UP_BLOCKS * point.block_size)
    return lambda: short.run(backend), lambda: case.run(backend)

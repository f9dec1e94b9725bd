"""What the bench measures and counts is what it says."""

from dataclasses import replace
from importlib import import_module
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from impls import FAST, cases

import moba_fast
from moba_fast import (
    _flash,
    ceilings,
    dense,
    measure,
    memory,
    op,
    stages,
    timing,
)
from moba_fast.backends import kernel_of
from moba_fast.measure import Case, Settings
from moba_fast.points import Point, inputs, point_of
from moba_fast.stage_work import count, stage_work, work
from moba_lab.agree import selected_tokens

TINY = Point(300, 4, 2, 8, block_size=32, topk=3, dtype="float32", backward=True)
# Triton's interpreter runs where Triton does.
ON_CPU = ["torch", *(["triton"] if moba_fast.backends()["triton"].available else [])]
CLUSTERED = replace(TINY, S=1024, D=16, topk=4, batch=2, routing="clustered")


def choice(point):
    """Return the gate's choice for a point, and its blocks."""
    case = Case(point, *inputs(point, "cpu"), Settings())
    selected = case.attend("torch", return_aux=True)[2]
    offsets = torch.arange(point.batch + 1) * point.S
    return selected, moba_fast.partition(offsets, point.block_size)


@given(cases())
def test_pairs_equal_a_count_of_the_mask(case):
    _, _, selected = case.run(FAST)
    blocks = case.partition(FAST)
    found = count(torch.tensor(selected), blocks, case.k.shape[1])
    read = int(selected_tokens(selected, blocks).sum())
    assert found.past_pairs + found.own_pairs == read
    assert found.routed == (selected[..., :-1] >= 0).sum()


def test_pairs_are_counted_over_chunks_of_rows(monkeypatch):
    selected, blocks = choice(TINY)
    whole = count(selected, blocks, 2)
    monkeypatch.setattr("moba_fast.stage_work.ROWS_PER_COUNT", 7)
    assert count(selected, blocks, 2) == whole
    found = work(whole, TINY)
    assert found["pairs_full"] == 4 * sum(range(301))
    assert found["work_ratio"] == found["pairs_full"] / found["pairs_moba"] > 1


def test_all_blocks_are_the_work_of_full_attention():
    point = replace(TINY, topk=10, batch=2)
    assert work(count(*choice(point), 2), point)["work_ratio"] == 1


def by_hand(point, selected, blocks):
    """Count FLOPs and elements moved with loops over all that a stage takes."""
    selected, D, group = selected.numpy(), point.D, point.H // point.HK
    found = {name: np.zeros(2, dtype=int) for name in (*stages.STAGES, "backward")}
    lists = set()
    for t, h in product(range(len(selected)), range(point.H)):
        own = int(blocks.of_query[t])
        seen = int(blocks.position[t] - blocks.start[own]) + 1
        past = [int(b) for b in selected[t, h, :-1] if b >= 0]
        keys = sum(int(blocks.end[b] - blocks.start[b]) for b in past)
        lists |= {(h // group, b) for b in past}
        choosable = own - int(blocks.first_of_query[t])
        # Query, output and log-sum-exp once, key and value of the own token by group.
        qkv, result, chosen = D + 2 * D / group, D + 1, point.topk
        parts = len(past)
        found["gate"] += 2 * D * choosable, D + chosen
        found["route"] += 0, chosen - 1 + parts
        found["arrange"] += 0, 2 * parts
        found["past"] += 4 * D * keys, parts * (1 + D + D + 1)
        found["current"] += 4 * D * seen, int(qkv) + result
        found["combine"] += 2 * D * parts, chosen + parts * (D + 1) + 2 * result
        # q, k, v, out, dout, lse; dq, dk, dv.
        whole = qkv + D + D + 1 + chosen + qkv
        pair = 1 + 2 * D + 2 + 2 * D
        found["backward"] += 10 * D * (keys + seen), int(whole) + parts * pair
    means = len(blocks.start) * point.HK * D
    keys = len(selected) * point.HK * D
    found["partition"] += 0, 4 * 2 * len(selected)
    found["pool"] += keys, keys + means
    found["gate"] += 0, means
    found["route"] += 0, len(blocks.start) * point.HK + 1
    for name in ("past", "backward"):
        found[name] += 0, len(lists) * point.block_size * 2 * D
    return found


@pytest.mark.parametrize("batch", [1, 2])
def test_work_of_stages_equals_a_count_by_hand(batch):
    point = replace(TINY, S=70, batch=batch, block_size=16)
    selected, blocks = choice(point)
    counts = count(selected, blocks, point.HK)
    expected = by_hand(point, selected, blocks)
    found = stage_work(counts, point, "cpu")
    for stage, (flops, elements) in expected.items():
        assert found[f"{stage}_flops"] == flops, stage
        assert found[f"{stage}_bytes"] == 4 * elements, stage
    assert len(found) == 2 * len(expected)

    fused = stage_work(counts, point, "triton")
    both = [expected["current"][0] + expected["combine"][0]]
    # Nothing passes from one to the other through memory.
    result = len(selected) * point.H * (point.D + 1)
    both.append(expected["current"][1] + expected["combine"][1] - 2 * result)
    assert [fused["combine_flops"], fused["combine_bytes"] / 4] == both
    own = {f"{x}_{unit}" for x in ("arrange", "current") for unit in ("flops", "bytes")}
    assert found.keys() - fused.keys() == own
    assert fused["past_bytes"] == found["past_bytes"]


def test_narrow_numbers_move_half_of_the_rows():
    counts = count(*choice(TINY), TINY.HK)
    wide, narrow = (
        stage_work(counts, replace(TINY, dtype=dtype), "triton")
        for dtype in ("float32", "bfloat16")
    )
    rows = 300 * TINY.HK * TINY.D
    assert wide["pool_bytes"] - narrow["pool_bytes"] == 2 * rows
    assert wide["past_flops"] == narrow["past_flops"]


def test_without_past_blocks_nothing_is_routed():
    point = replace(TINY, topk=1)
    counts = count(*choice(point), point.HK)
    assert (counts.routed, counts.scores, counts.lists) == (0, 0, 0)
    found = stage_work(counts, point, "cpu")
    assert found["past_flops"] == found["past_bytes"] == found["gate_flops"] == 0
    assert found["gate_bytes"] == 4 * 300 * point.H


def overlap(a, b):
    """Return the share of past blocks that two sets of queries have in common."""
    same = (a[..., :, None] == b[..., None, :]) & (a[..., :, None] >= 0)
    return float(same.any(-1).float().mean())


@pytest.mark.parametrize("routing", ["random", "clustered"])
def test_queries_of_a_cluster_choose_alike(routing):
    selected, _ = choice(replace(CLUSTERED, routing=routing))
    past = selected.view(2, 1024, 4, 4)[:, 512:, :, :-1]
    sinks = torch.tensor([0, 32]).view(2, 1, 1, 1)
    sink_chosen = (past == sinks).any(-1).float().mean()
    others = past.masked_fill(past == sinks, -1).unflatten(1, (-1, 8))
    within = overlap(others[:, :, 1:], others[:, :, :-1])
    between = overlap(others[:, 1:, 0], others[:, :-1, 0])
    if routing == "clustered":
        assert sink_chosen == 1
        # Two of three blocks are not the sink.
        assert within > 0.85 * 2 / 3
    else:
        assert sink_chosen < 0.2
        assert within < 0.2
    assert between < 0.2


def test_the_gate_chooses_the_sink_from_the_second_block_on():
    selected, blocks = choice(CLUSTERED)
    later = blocks.of_query > blocks.first_of_query
    first = blocks.first_of_query[later, None]
    assert (selected[later, :, 0] <= first).all()
    assert (selected[later][..., :-1] == first[..., None]).any(-1).all()


def test_inputs_repeat_and_their_routing_is_known():
    for point in (TINY, CLUSTERED):
        a, b = (inputs(point, "cpu") for _ in range(2))
        for x, y in zip((*a[0], a[1]), (*b[0], b[1]), strict=True):
            assert torch.equal(x, y)
        assert [x.requires_grad for x in a[0]] == [True] * 3
    with pytest.raises(ValueError, match="'random' or 'clustered', got 'sorted'"):
        inputs(replace(TINY, routing="sorted"), "cpu")


def test_a_point_is_named_by_all_that_is_not_usual():
    point = replace(CLUSTERED, S=2048, workload="C")
    name = "C 2x2K H=4/2 D=16 B=32 k=4 float32 forward+backward clustered"
    assert str(point) == name
    assert point_of(point.columns | {"kernel": "cpu"}) == point


def test_a_batch_is_a_pack_for_us_and_a_batch_for_the_dense_peer():
    point = replace(TINY, S=50, batch=3, block_size=50, topk=1)
    case = Case(point, *inputs(point, "cpu"), Settings())
    candidates, missing = dense.dense_candidates(case.leaves, case.dout, batch=3)
    assert (list(candidates), missing) == (["flash"], {})
    expected = case.attend("torch")
    torch.testing.assert_close(candidates["flash"]().flatten(0, 1), expected)
    short = case.beginning(70)
    assert short.point == replace(point, batch=1)
    torch.testing.assert_close(short.run("torch"), expected[:50])


def test_a_dense_peer_without_memory_does_not_stop_the_measurement(capsys):
    def refuse():
        raise MemoryError

    calls = {"ours": lambda: None, "flash": refuse, "cudnn": lambda: 1 / 0}
    times = timing.take_turns(calls, 3, "cpu")
    assert len(times["ours"]) == 3
    assert isinstance(times["flash"], MemoryError)
    assert isinstance(times["cudnn"], ZeroDivisionError)
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error
    assert "MemoryError" not in error


@pytest.mark.parametrize("options", [{}, {"patience": 0.0}])
def test_what_takes_too_long_is_not_repeated(monkeypatch, options):
    calls = []
    monkeypatch.setattr(timing, "PATIENCE", 1e9 if options else 0.0)
    times = timing.take_turns({"ours": lambda: calls.append(1)}, 3, "cpu", **options)
    assert len(times["ours"]) == len(calls) == 1


def test_candidates_take_turns():
    calls = []
    names = {name: lambda name=name: calls.append(name) for name in ("ours", "flash")}
    timing.take_turns(names, 2, "cpu")
    assert calls == ["ours", "flash"] * 3


def stage_places():
    """Return what every function that a clock is put on is now."""
    return {name: getattr(op, name) for _, name in stages.STAGES.values()}


def test_clocks_leave_the_operators_as_they_were():
    before, marks = stage_places(), []
    x = torch.zeros(40, 1, 4)
    with stages.clocks_on(stages.STAGES, timing.HostClock, marks):
        moba_fast.moba_attention(x, x, x, block_size=4, topk=2)
    assert stage_places() == before
    with (
        pytest.raises(ValueError, match="topk"),
        stages.clocks_on(stages.STAGES, timing.HostClock, marks),
    ):
        moba_fast.moba_attention(x, x, x, block_size=4, topk=0)
    assert stage_places() == before
    assert {stage for stage, _, _ in marks} == set(stages.STAGES)
    assert all(begin <= end for _, begin, end in marks)


def times_of(point, device="cpu", repeats=2):
    case = Case(point, *inputs(point, "cpu"), Settings())
    tensors = case.leaves, case.dout
    return stages.stage_times(
        lambda: case.attend("torch"), *tensors, device, "cpu", repeats
    )


def test_stages_are_timed_apart_from_the_same_functions_in_the_backward_pass(
    monkeypatch,
):
    """Every function takes a second by this clock, and routing goes backward, too."""
    now = iter(range(10**6))
    monkeypatch.setattr(timing.HostClock, "mark", lambda: next(now))
    found = times_of(TINY)
    forward = {f"{name}_s" for name in stages.STAGES}
    backward = {"backward_s", "backward_other_s"}
    assert found.keys() == forward | {"other_s"} | backward
    # The blocks are found by the gate and by the attention.
    assert found["partition_s"] == 2
    assert all(found[name] == 1 for name in forward - {"partition_s"})
    assert found["backward_s"] == 2
    # Functions that are not timed in the backward pass: blocks_of and route.
    assert found["backward_other_s"] == 7
    assert times_of(replace(TINY, backward=False)).keys() == forward | {"other_s"}


@pytest.mark.parametrize("backend", ON_CPU)
def test_every_stage_of_a_backend_is_timed(backend):
    point = replace(TINY, S=70, H=2, HK=1, block_size=16)
    leaves, dout = inputs(point, "cpu")
    case = Case(point, leaves, dout, Settings())
    kernel = kernel_of(backend, dout)
    forward, backward = stages.stages_of(kernel)
    before = [getattr(import_module(m), n) for m, n in (*forward.values(), *backward)]
    found = stages.stage_times(
        lambda: case.attend(backend), leaves, dout, "cpu", kernel
    )
    assert all(seconds > 0 for seconds in found.values())
    assert found.keys() >= {f"{name}_s" for name in (*forward, "backward", "other")}
    after = [getattr(import_module(m), n) for m, n in (*forward.values(), *backward)]
    assert after == before
    # The work is counted for the stages that are timed.
    counted = stage_work(case.counts(backend), point, kernel)
    assert {f"{name}_flops" for name in (*forward, "backward")} <= counted.keys()


class Queue:
    """Stand in for a GPU's queue: it has the time of the host, and marks as events."""

    def __init__(self):
        self.time, self.slept, self.waited = 0, [], 0

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)

    def wait(self):
        self.waited += 1


class Event:
    def __init__(self, queue):
        self.queue, self.time = queue, None

    def record(self):
        self.queue.time += 1
        self.time = self.queue.time

    def elapsed_time(self, other):
        return 1000 * (other.time - self.time)


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "synchronize", queue.wait)
    monkeypatch.setattr(torch.cuda, "_sleep", queue.slept.append)
    return queue


def test_stages_on_a_gpu_are_timed_in_its_queue_while_it_is_kept_busy(queue):
    found = times_of(TINY, device="cuda", repeats=3)
    assert found["partition_s"] == 2
    assert found["gate_s"] == found["past_s"] == 1
    assert found["backward_s"] == 2
    assert found["host_s"] > 0
    # One call more than the pairs, three of them behind other work.
    assert len(queue.slept) == 3
    assert queue.waited == 2 * 7
    cycles = int(found["host_s"] * stages.CYCLES_PER_SECOND)
    assert queue.slept == [cycles] * 3


def test_long_calls_on_a_gpu_are_timed_once(queue, monkeypatch):
    monkeypatch.setattr(stages, "BUDGET", 0.0)
    found = times_of(TINY, device="cuda")
    assert found["partition_s"] == 2
    assert found["host_s"] > 0
    assert queue.slept == []
    assert queue.waited == 2


def test_memory_is_that_of_the_first_call(monkeypatch):
    allocated, calls = iter([100]), []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset")
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 700)
    peaks = {}
    call = memory.watched(lambda: calls.append("call") or 5, peaks, "ours")
    assert call() == 5
    assert (peaks, calls) == ({"ours": 600}, ["reset", "call"])
    call()
    assert (peaks, calls) == ({"ours": 600}, ["reset", "call", "call"])


def test_ceilings_count_what_is_read_and_written(monkeypatch):
    """By this clock every call takes two seconds but the slow second one."""
    times = [0, 2, 100, 102, 104, 106] * 2
    marks = iter(times)
    monkeypatch.setattr(timing.HostClock, "mark", lambda: next(marks))
    monkeypatch.setitem(ceilings.CALLS, "cpu", 5)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1000)
    monkeypatch.setitem(ceilings.MATRIX, "cpu", (10, torch.float32))
    found = ceilings.ceilings("cpu")
    assert found == {"copy_bytes_per_s": 1000, "matmul_flops_per_s": 1000}
    assert sorted(b - a for a, b in pairwise(times[:6])) == [2, 2, 2, 2, 98]


@pytest.mark.parametrize("heads_k", [1, 2, 4])
def test_the_dense_peer_is_causal_attention(heads_k):
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(50, 4, 8, generator=g) for _ in range(2))
    k, v = (torch.randn(50, heads_k, 8, generator=g) for _ in range(2))
    candidates, missing = dense.dense_candidates([q, k, v], dout)
    assert (list(candidates), missing) == (["flash"], {})
    expected = moba_fast.moba_attention(q, k, v, block_size=50, topk=1)
    torch.testing.assert_close(candidates["flash"]()[0], expected)
    repeated = dense.one_head_each([q, k, v])
    assert [x.shape[1] for x in repeated] == [4, 4, 4]
    found = dense.attend(repeated, dout, dense.KERNELS["flash"])
    torch.testing.assert_close(found[0], expected)


class Package:
    """Stands for a package of flash attention, and keeps its gradients."""

    forward = staticmethod(_flash.KERNELS["cpu"].forward)

    head_multiple = 8

    def backward(self, *arguments):
        self.found = _flash.KERNELS["cpu"].backward(*arguments)
        return self.found


@pytest.mark.parametrize("batch", [1, 2])
def test_an_installed_package_is_a_dense_peer(monkeypatch, batch):
    monkeypatch.setattr(dense, "installed", lambda _: ["flash-attn"])
    monkeypatch.setitem(_flash.KERNELS, "flash-attn", package := Package())
    point = replace(TINY, S=100, batch=batch, backward=True)
    leaves, dout = inputs(point, "cpu")
    candidates, missing = dense.dense_candidates(leaves, dout, batch)
    assert (list(candidates), missing) == (["flash", "flash-attn"], {})
    expected = candidates["flash"]()
    torch.testing.assert_close(candidates["flash-attn"](), expected)
    out = dense.scaled_dot_product_attention(
        *(x.unflatten(0, (batch, -1)).transpose(1, 2) for x in leaves),
        is_causal=True,
        enable_gqa=True,
    )
    grads = torch.autograd.grad(out.transpose(1, 2).flatten(0, 1), leaves, dout)
    torch.testing.assert_close(package.found, grads)


def test_a_package_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(dense, "installed", lambda _: ["flash-attn"])
    monkeypatch.setitem(_flash.KERNELS, "flash-attn", None)
    x = torch.zeros(9, 2, 8)
    candidates, missing = dense.dense_candidates([x] * 3, x)
    assert list(candidates) == ["flash"]
    assert "NoneType" in missing["flash-attn"]


def test_no_package_attends_on_a_cpu(monkeypatch):
    monkeypatch.setattr(_flash, "why_not", lambda _: "")
    assert dense.installed(torch.zeros(1)) == []


def test_first_calls_that_may_compile_do_not_count():
    names = [("ours", "triton"), ("dense", "cudnn"), ("dense", "flash-attn-4")]
    assert measure.may_compile(names, "cuda") == [names[0], names[2]]
    assert measure.may_compile(names, "cpu") == []


def test_a_kernel_that_does_not_take_the_inputs_says_why():
    x = torch.zeros(9, 2, 8)
    candidates, missing = dense.try_out({"cudnn": dense.KERNELS["cudnn"]}, [x] * 3, x)
    assert candidates == {}
    assert "kernel" in missing["cudnn"]


def test_a_first_call_that_may_compile_never_counts(monkeypatch):
    seconds = {"kernel": iter([9.0, 1.0]), "dense": iter([9.0])}
    monkeypatch.setattr(timing, "timed", lambda function, _: next(function()))
    calls = {name: lambda name=name: seconds[name] for name in seconds}
    found = timing.take_turns(calls, 5, "cpu", patience=5, compiling=["kernel"])
    assert found == {"kernel": [1.0], "dense": [9.0]}


def test_short_forward_passes_are_replayed_and_nothing_else(monkeypatch):
    replayed = []
    monkeypatch.setattr(measure, "graph_seconds", lambda call: replayed.append(call()))

    def seconds_of(seconds, device="cuda", backward=False):
        dout = SimpleNamespace(device=torch.device(device))
        case = SimpleNamespace(dout=dout, point=replace(TINY, backward=backward))
        return measure.replay_seconds(case, seconds, lambda: "called")

    for arguments in (
        ([2 * measure.SHORT], "cuda"),
        (MemoryError(), "cuda"),
        ([0.001], "cpu"),
        ([0.001], "cuda", True),
    ):
        assert seconds_of(*arguments) == ""
    assert replayed == []
    assert seconds_of([1.0, 0.001]) is None
    assert replayed == ["called"]

"""The bench writes what it says and goes on where a call or memory fails."""

import csv
import re
from dataclasses import replace

import pytest
import torch

from moba_fast import bench, ceilings, measure, stages, workloads
from moba_fast.bench_table import report
from moba_fast.memory import out_of_memory
from moba_fast.points import Point

TINY = Point(300, 4, 2, 8, block_size=32, topk=3, dtype="float32")
# More than any machine can map: the allocator itself refuses.
HUGE = replace(TINY, S=2**43)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MAY_BE_EMPTY = {
    *("workload", "message", "driver", "triton", "flash-attn", "flash-attn-4"),
    # Measured on a GPU only.
    *("host_s", "graph_s", "dense_peak_bytes", "dense_graph_s"),
}
OF_BACKWARD = {
    *("backward_s", "backward_other_s", "backward_flops", "backward_bytes"),
}


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def bench_tiny(monkeypatch, tmp_path):
    """Return a function that runs the command on tiny suites: (status, rows)."""
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.MATRIX, "cpu", (64, torch.float32))

    def run(points, *arguments):
        for suites in (bench.SUITES, bench.QUICK):
            for name in suites:
                monkeypatch.setitem(suites, name, points)
        path = tmp_path / "new folder" / "bench.csv"
        status = bench.main(["--csv", str(path), "--repeats", "2", *arguments])
        return status, rows_of(path)

    return run


@pytest.fixture
def no_child(monkeypatch):
    """Leave out the memory of the CPU, whose measurement takes seconds."""
    monkeypatch.setattr(measure, "peak_in_child", lambda *_: {"peak_how": "left out"})


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_writes_every_column_of_every_point(bench_tiny, capsys, device):
    points = [TINY, replace(TINY, backward=True)]
    suite = {"cpu": "cpu", "cuda": "flash"}[device]
    status, rows = bench_tiny(points, "--suite", suite, "--backend", "torch")
    assert status == 0
    assert len(rows) == 2
    for row, point in zip(rows, points, strict=True):
        assert tuple(row) == bench.COLUMNS
        empty = {name for name, value in row.items() if not value}
        assert empty <= MAY_BE_EMPTY | (set() if point.backward else OF_BACKWARD)
        assert (row["status"], row["direction"]) == ("ok", point.direction)
        assert (int(row["S"]), int(row["batch"]), row["routing"]) == (300, 1, "random")
        assert int(row["peak_bytes"]) >= 0
        results = 300 * 8 * (4 + (4 + 2 + 2) * point.backward)
        assert int(row["output_bytes"]) == 4 * results
        assert row["torch"] == torch.__version__
        assert float(row["total_min_s"]) <= float(row["total_median_s"])
        assert all(float(row[f"{name}_s"]) > 0 for name in stages.STAGES)
        achieved = float(row["dense_median_s"]) / float(row["total_median_s"])
        assert float(row["speedup"]) == pytest.approx(achieved)
        share = achieved / float(row["work_ratio"])
        assert float(row["share_of_work_ratio"]) == pytest.approx(share)
    printed = capsys.readouterr().out
    assert printed.count("300 H=4/2 D=8 B=32 k=3 float32") == 2
    assert printed.count("measured in ") == 2
    assert re.search(r"partition [\d.]+ m?s, pool", printed)


def small(point):
    """Shrink a point of a suite so that a CPU measures it in a moment."""
    sizes = {"S": 100, "H": min(point.H, 4), "HK": min(point.HK, 2), "D": 16}
    return replace(point, **sizes, block_size=16, topk=3, dtype="float32")


def test_every_kind_of_point_of_the_large_suite_runs(bench_tiny, no_child):
    kinds = {replace(small(p), workload=""): small(p) for p in workloads.h200()}
    points = list(kinds.values())
    assert {p.routing for p in points} == {"random", "clustered"}
    assert {p.batch for p in points} == {1, 2}
    arguments = "--suite", "h200", "--device", "cpu", "--backend", "torch"
    status, rows = bench_tiny(points, *arguments)
    assert status == 0
    assert [row["status"] for row in rows] == ["ok"] * len(points)
    for row, point in zip(rows, points, strict=True):
        expected = {name: str(value) for name, value in point.columns.items()}
        assert {name: row[name] for name in expected} == expected
        assert row["dense_kernel"] == "flash"
        assert float(row["copy_bytes_per_s"]) > 0
        assert float(row["matmul_flops_per_s"]) > 0


def test_asked_backends_are_measured_side_by_side(bench_tiny, no_child):
    points = [replace(TINY, backends=("flash",))]
    status, rows = bench_tiny(points, "--suite", "cpu", "--backend", "torch,auto")
    assert status == 0
    found = [(row["backend"], row["kernel"], row["status"]) for row in rows]
    assert found == [("torch", "cpu", "ok"), ("auto", "cpu", "ok")]


def test_backends_that_do_not_run_are_named(bench_tiny, no_child, monkeypatch, capsys):
    monkeypatch.setitem(bench.BACKENDS, "cpu", ("flash", "torch"))
    status, rows = bench_tiny([TINY, replace(TINY, backends=("flash",))])
    assert status == 0
    found = [(row["backend"], row["kernel"], row["status"]) for row in rows]
    flash = ("flash", "", "does not run")
    assert found == [flash, ("torch", "cpu", "ok"), flash]
    assert "needs tensors on a CUDA device" in rows[0]["message"] or (
        "does not run here" in rows[0]["message"]
    )
    assert f"flash: does not run: {rows[0]['message']}" in capsys.readouterr().out


def test_backends_of_a_point_share_what_was_measured_of_dense_attention(
    bench_tiny, no_child, monkeypatch
):
    monkeypatch.setitem(bench.BACKENDS, "cpu", ("auto", "torch"))
    _, rows = bench_tiny([TINY, replace(TINY, topk=2)])
    assert [row["backend"] for row in rows] == ["auto", "torch"] * 2
    dense = [row["dense_median_s"] for row in rows]
    assert dense[0] == dense[1] != dense[2] == dense[3]


def test_dense_attention_is_not_measured_again_for_another_routing(
    bench_tiny, no_child
):
    points = [TINY, replace(TINY, routing="clustered"), replace(TINY, S=290)]
    _, rows = bench_tiny(points, "--suite", "cpu")
    dense = [row["dense_notes"] for row in rows]
    assert dense[0] == dense[1] != dense[2]


def test_dense_attention_that_was_measured_is_not_called(monkeypatch, no_child):
    _, known = measure.measure(TINY, "cpu")
    calls = []
    monkeypatch.setattr(measure, "dense_candidates", lambda *_: calls.append(1))
    [row], dense = measure.measure(TINY, "cpu", dense=known)
    assert (row["status"], calls) == ("ok", [])
    assert dense is known
    assert row["dense_kernel"] == "flash"


def test_rates_of_a_gpu_are_reported_stage_by_stage(no_child):
    [row], _ = measure.measure(replace(TINY, backward=True), "cpu")
    row |= {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e9, "device": "CPU"}
    assert len(report(row).splitlines()) == 2
    row |= {"device": "a GPU", "past_s": 2.0, "past_bytes": 2e9}
    lines = report(row).splitlines()
    # All stages and the backward pass.
    assert len(lines) == 2 + len(stages.STAGES) + 1
    [past] = [line for line in lines if line.startswith("  past")]
    assert past.endswith("1 GB/s (100 %)")


def test_workloads_are_chosen_by_name(bench_tiny, no_child):
    points = [replace(TINY, workload=name) for name in ("A", "B", "A", "lengths")]
    arguments = "--suite", "cpu", "--workload", "lengths,A"
    _, rows = bench_tiny(points, *arguments)
    assert [row["workload"] for row in rows] == ["A", "A", "lengths"]


def test_rows_are_added_to_those_that_are_there(bench_tiny, no_child, tmp_path, capsys):
    _, [first] = bench_tiny([TINY], "--suite", "cpu", "--append")
    _, rows = bench_tiny([replace(TINY, S=200)], "--suite", "cpu", "--append")
    assert rows[0] == first
    assert [row["S"] for row in rows] == ["300", "200"]
    _, rows = bench_tiny([TINY], "--suite", "cpu")
    assert len(rows) == 1

    other = tmp_path / "other.csv"
    other.write_text("S,H\n1,2\n")
    with pytest.raises(SystemExit) as error:
        bench.main(["--suite", "cpu", "--append", "--csv", str(other)])
    assert error.value.code == 2
    assert "expected the columns of this version" in capsys.readouterr().err
    assert other.read_text() == "S,H\n1,2\n"


def test_a_point_that_runs_out_of_memory_is_recorded_and_the_next_one_runs(
    bench_tiny, capsys
):
    status, rows = bench_tiny([HUGE, TINY], "--suite", "cpu")
    assert status == 0
    assert [row["status"] for row in rows] == ["out of memory", "ok"]
    assert "memory" in rows[0]["message"]
    assert rows[0]["total_median_s"] == ""
    assert f"out of memory: {rows[0]['message']}" in capsys.readouterr().out


def test_a_workspace_that_is_too_small_is_recorded(bench_tiny):
    longer = replace(TINY, S=4000)
    arguments = "--suite", "cpu", "--workspace-bytes", "400000"
    _, rows = bench_tiny([longer, replace(TINY, S=30)], *arguments)
    assert [row["status"] for row in rows] == ["out of memory", "ok"]
    assert "workspace_bytes=400000 is too small" in rows[0]["message"]
    # Dense attention needs no workspace.
    assert rows[0]["dense_kernel"] == "flash"


def test_other_errors_are_not_hidden(bench_tiny, no_child, capsys):
    status, rows = bench_tiny([replace(TINY, topk=0), TINY], "--suite", "cpu")
    assert status == 1
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert rows[0]["message"].startswith("topk must be at least 1, got 0")
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "topk must be at least 1" in error


def test_errors_that_mean_too_little_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**45)
    assert out_of_memory(error.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert not out_of_memory(KeyError("out of memory"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "expected an integer above 0, got '0'"),
        (["--threads", "two"], "expected an integer above 0, got 'two'"),
        (["--suite", "gpu"], "invalid choice: 'gpu'"),
        (["--suite", "cpu", "--backend", "warp"], "unknown backend 'warp': choose"),
        (["--suite", "cpu", "--backend", "torch,flash"], "'flash' "),
        (
            ["--suite", "cpu", "--workload", "A"],
            "no workload 'A': expected some of none",
        ),
        (
            ["--suite", "h200", "--device", "cpu", "--workload", "A,Z"],
            "no workload 'Z': expected some of A,B,C,D,E,F,lengths, got 'A,Z'",
        ),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        bench.main(arguments)
    assert error.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_suites_have_the_points_that_are_promised():
    shapes = {(p.S, p.block_size, p.topk, p.backward) for p in bench.SUITES["cpu"]}
    assert (2**15, 512, 3, False) in shapes
    assert (2**16, 512, 3, False) in shapes
    assert (2**15, 128, 8, False) in shapes
    assert (2**15, 512, 3, True) in shapes
    gpu = bench.SUITES["flash"]
    assert min(p.S for p in gpu) == 2**13
    for backward in (False, True):
        training = Point(2**15, 16, 16, 128, 512, 3, "bfloat16", backward)
        longest = Point(2**20, 32, 8, 128, 4096, 12, "bfloat16", backward)
        assert training in gpu
        assert longest in gpu
        lengths = [
            p.S // 1024 for p in bench.SUITES["kernels"] if p.backward is backward
        ]
        assert lengths == [8, 32, 64] * 2


@pytest.mark.parametrize(
    ("workload", "shape", "directions"),
    [
        ("A", (1, 2**20, 32, 8, 4096, 12), {False, True}),
        ("B", (1, 10 * 2**20, 1, 1, 163_840, 3), {False}),
        ("C", (2, 2**19, 16, 16, 128, 8), {False, True}),
        ("D", (2, 2**16, 16, 16, 128, 8), {False, True}),
        ("E", (1, 2**15, 16, 16, 512, 3), {False, True}),
    ],
)
def test_workloads_have_the_shapes_that_are_published(workload, shape, directions):
    points = [p for p in bench.SUITES["h200"] if p.workload == workload]
    found = {(p.batch, p.S, p.H, p.HK, p.block_size, p.topk) for p in points}
    assert found == {shape}
    assert {p.backward for p in points} == directions
    assert all((p.D, p.dtype) == (128, "bfloat16") for p in points)
    # The first one measures dense attention for the other ones.
    assert points[0].routing == "random"


@pytest.mark.parametrize("backward", [False, True])
def test_sweeps_over_lengths(backward):
    def lengths(workload, **options):
        return [
            p.S // 1024
            for p in bench.SUITES["h200"]
            if (p.workload, p.backward) == (workload, backward)
            and all(getattr(p, name) == value for name, value in options.items())
        ]

    assert lengths("F", block_size=512, topk=3) == [1, 2, 4, 8, 16, 32]
    assert lengths("F", block_size=128, topk=8) == [1, 2, 4, 8, 16, 32]
    assert lengths("lengths") == [2**i for i in range(11)]
    for p in bench.SUITES["h200"]:
        assert p.workload != "lengths" or 64 * p.block_size == p.S

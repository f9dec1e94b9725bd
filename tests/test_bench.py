"""The bench counts right, writes what it says and goes on where memory runs out."""

import csv
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from impls import FAST, cases

import moba_fast
from moba_fast import bench, dense, op, timing
from moba_fast.measure import Point, pairs_read, work
from moba_fast.memory import out_of_memory
from moba_lab.agree import selected_tokens

TINY = Point(300, 4, 2, 8, block_size=32, topk=3, dtype="float32")
# More than any machine can map: the allocator itself refuses.
HUGE = replace(TINY, S=2**43)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@given(cases())
def test_pairs_read_equals_a_count_of_the_mask(case):
    _, _, selected = case.run(FAST)
    blocks = case.partition(FAST)
    found = pairs_read(torch.tensor(selected), blocks)
    assert found == int(selected_tokens(selected, blocks).sum())


def test_pairs_are_counted_over_chunks_of_rows(monkeypatch):
    x = torch.randn(300, 4, 8, generator=torch.Generator().manual_seed(0))
    options = {"block_size": 32, "topk": 3, "return_aux": True}
    selected = moba_fast.moba_attention(x, x, x, **options)[2]
    whole = work(selected, replace(TINY, HK=4))
    monkeypatch.setattr("moba_fast.measure.ROWS_PER_COUNT", 7)
    assert work(selected, replace(TINY, HK=4)) == whole
    assert whole["pairs_full"] == 4 * sum(range(301))
    assert whole["work_ratio"] == whole["pairs_full"] / whole["pairs_moba"] > 1


def test_all_blocks_are_the_work_of_full_attention():
    x = torch.zeros(300, 4, 8)
    options = {"block_size": 32, "topk": 10, "return_aux": True}
    selected = moba_fast.moba_attention(x, x, x, **options)[2]
    assert work(selected, TINY)["work_ratio"] == 1


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def bench_tiny(monkeypatch, tmp_path):
    """Return a function that runs the command on tiny suites: (status, rows)."""

    def run(points, *arguments):
        for suites in (bench.SUITES, bench.QUICK):
            for name in suites:
                monkeypatch.setitem(suites, name, points)
        path = tmp_path / "new folder" / "bench.csv"
        status = bench.main(["--csv", str(path), "--repeats", "2", *arguments])
        return status, rows_of(path)

    return run


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_writes_every_column_of_every_point(bench_tiny, capsys, device):
    points = [TINY, replace(TINY, backward=True)]
    suite = {"cpu": "cpu", "cuda": "flash"}[device]
    status, rows = bench_tiny(points, "--suite", suite, "--backend", "torch")
    assert status == 0
    assert len(rows) == 2
    empty_may_be = {"message", "driver", "triton", "flash-attn", "flash-attn-4"}
    for row, point in zip(rows, points, strict=True):
        assert tuple(row) == bench.COLUMNS
        empty = {name for name, value in row.items() if not value}
        assert empty <= empty_may_be | (set() if point.backward else {"backward_s"})
        assert (row["status"], row["direction"]) == ("ok", point.direction)
        assert int(row["S"]) == 300
        assert int(row["peak_bytes"]) >= 0
        assert row["torch"] == torch.__version__
        assert float(row["total_min_s"]) <= float(row["total_median_s"])
        stages = [float(row[f"{name}_s"]) for name in timing.STAGES]
        assert all(seconds > 0 for seconds in stages)
        achieved = float(row["dense_median_s"]) / float(row["total_median_s"])
        assert float(row["speedup"]) == pytest.approx(achieved)
        share = achieved / float(row["work_ratio"])
        assert float(row["share_of_work_ratio"]) == pytest.approx(share)
    printed = capsys.readouterr().out
    assert printed.count("300 H=4/2 D=8 B=32 k=3 float32") == 2
    assert re.search(r"partition [\d.]+ m?s, pool", printed)


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


def test_other_errors_are_not_hidden(bench_tiny):
    with pytest.raises(ValueError, match="topk must be at least 1"):
        bench_tiny([replace(TINY, topk=0)], "--suite", "cpu")


def test_errors_that_mean_too_little_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**45)
    assert out_of_memory(error.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert not out_of_memory(KeyError("out of memory"))


def test_a_dense_peer_without_memory_does_not_stop_the_measurement():
    def refuse():
        raise MemoryError

    times = timing.take_turns({"ours": lambda: None, "flash": refuse}, 3, "cpu")
    assert len(times["ours"]) == 3
    assert isinstance(times["flash"], MemoryError)
    with pytest.raises(MemoryError):
        timing.take_turns({"ours": refuse}, 3, "cpu")


def test_what_takes_too_long_is_not_repeated(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "PATIENCE", 0.0)
    times = timing.take_turns({"ours": lambda: calls.append(1)}, 3, "cpu")
    assert len(times["ours"]) == len(calls) == 1


def test_candidates_take_turns():
    calls = []
    names = {name: lambda name=name: calls.append(name) for name in ("ours", "flash")}
    timing.take_turns(names, 2, "cpu")
    assert calls == ["ours", "flash"] * 3


def test_clocks_leave_the_operators_as_they_were():
    before = {name: getattr(op, name) for name in timing.STAGES.values()}
    seconds = dict.fromkeys(timing.STAGES, 0.0)
    x = torch.zeros(40, 1, 4)
    with timing.clocks_on_stages(seconds, "cpu"):
        moba_fast.moba_attention(x, x, x, block_size=4, topk=2)
    assert {name: getattr(op, name) for name in before} == before
    with (
        pytest.raises(ValueError, match="topk"),
        timing.clocks_on_stages(seconds, "cpu"),
    ):
        moba_fast.moba_attention(x, x, x, block_size=4, topk=0)
    assert all(seconds.values())
    assert {name: getattr(op, name) for name in before} == before


@pytest.mark.parametrize("heads_k", [1, 2, 4])
def test_the_dense_peer_is_causal_attention(heads_k):
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(50, 4, 8, generator=g) for _ in range(2))
    k, v = (torch.randn(50, heads_k, 8, generator=g) for _ in range(2))
    candidates, missing = dense.dense_candidates([q, k, v], dout)
    assert (list(candidates), missing) == (["flash"], {})
    expected = moba_fast.moba_attention(q, k, v, block_size=50, topk=1)
    torch.testing.assert_close(candidates["flash"](), expected)
    repeated = dense.one_head_each([q, k, v])
    assert [x.shape[1] for x in repeated] == [4, 4, 4]
    found = dense.attend(repeated, dout, dense.KERNELS["flash"])
    torch.testing.assert_close(found, expected)


def test_a_kernel_that_does_not_take_the_inputs_says_why():
    x = torch.zeros(9, 2, 8)
    candidates, missing = dense.try_out({"cudnn": dense.KERNELS["cudnn"]}, [x] * 3, x)
    assert candidates == {}
    assert "kernel" in missing["cudnn"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "expected an integer above 0, got '0'"),
        (["--threads", "two"], "expected an integer above 0, got 'two'"),
        (["--suite", "gpu"], "invalid choice: 'gpu'"),
        (["--suite", "cpu", "--backend", "warp"], "unknown backend 'warp': choose"),
        (["--suite", "cpu", "--backend", "flash"], "'flash' "),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        bench.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


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

"""The self-check passes sound kernels, reports broken ones and records what it saw."""

import csv
import importlib
from dataclasses import replace

import pytest
import torch

import moba_fast.selfcheck
from moba_fast import _flash
from moba_lab import check_special, selfcheck
from moba_lab.check_cases import CASES, Case, check_case, targets

SMALL = Case("small", (40, 0, 9), 8, 3, H=2, HK=1, D=8)
PLAIN = next(t for t in targets() if str(t) == "plain on cpu")
SPECIAL = [
    check_special.check_repeated_runs,
    check_special.check_small_workspace,
    check_special.check_compile,
]


class Broken:
    """A kernel whose results are changed by a function of one of them."""

    def __init__(self, **changes):
        self.sound, self.changes = _flash.KERNELS["plain"], changes

    def changed(self, names, results):
        pairs = zip(names, results, strict=True)
        return tuple(self.changes.get(name, lambda x: x)(x) for name, x in pairs)

    def forward(self, *arguments):
        return self.changed(("out", "lse"), self.sound.forward(*arguments))

    def backward(self, *arguments):
        return self.changed(("dq", "dk", "dv"), self.sound.backward(*arguments))


def small_checks(dtype="float32"):
    return selfcheck.guarded(check_case, PLAIN, SMALL, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_sound_kernel_passes(dtype):
    checks = small_checks(dtype)
    names = ["small: choice, rows", "small: forward", "small: backward"]
    assert [check.what for check in checks] == names
    assert all(check.ok for check in checks)
    most = min(0.5, 1000 * torch.finfo(getattr(torch, dtype)).eps)
    for check in checks[1:]:
        assert 0 < check.error <= check.allowed < most
        assert (check.kernel, check.dtype) == ("plain on cpu", dtype)


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"out": lambda x: 1.001 * x}, {"forward", "backward"}),
        ({"lse": lambda x: x + 0.01}, {"forward", "backward"}),
        ({"dk": lambda x: 1.001 * x}, {"backward"}),
        ({"dv": lambda x: x.flip(0)}, {"backward"}),
        ({"dq": lambda x: x * torch.nan}, {"backward"}),
    ],
    ids=["out", "lse", "dk", "dv", "NaN"],
)
def test_a_broken_kernel_is_reported(monkeypatch, changes, failed):
    monkeypatch.setitem(_flash.KERNELS, "plain", Broken(**changes))
    checks = small_checks()
    wrong = {check.what.removeprefix("small: ") for check in checks if not check.ok}
    assert wrong == failed
    for check in checks:
        assert check.ok or "worst at token" in check.message or "NaN" in check.message


def test_a_kernel_that_raises_is_reported(monkeypatch):
    def fail(x):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setitem(_flash.KERNELS, "plain", Broken(out=fail))
    [check] = small_checks()
    assert not check.ok
    assert check.message == "RuntimeError: no such kernel"
    assert "FAILED  RuntimeError: no such kernel" in selfcheck.line(check)


def test_a_wrong_choice_is_reported(monkeypatch):
    monkeypatch.setattr("moba_fast.gate.TIE_ROUNDINGS", 2**22)
    choice, *_ = small_checks()
    assert not choice.ok
    assert choice.error > 0
    assert "no near ties" in choice.message


@pytest.mark.parametrize("function", SPECIAL)
def test_promises_around_a_call_are_checked(monkeypatch, function):
    assert all(c.ok for c in selfcheck.guarded(function, PLAIN, "float32"))
    noise = torch.Generator().manual_seed(0)

    def disturb(x):
        return x + 0.01 * torch.randn(x.shape, generator=noise)

    monkeypatch.setitem(_flash.KERNELS, "plain", Broken(out=disturb))
    assert not all(c.ok for c in selfcheck.guarded(function, PLAIN, "float32"))


def test_a_workspace_that_divides_nothing_is_no_check(monkeypatch):
    monkeypatch.setattr(check_special, "smallest_workspace", lambda *_: 2**31)
    [check] = check_special.check_small_workspace(PLAIN, "float32")
    assert (check.ok, check.message) == (False, "the call was not divided")


def test_two_keys_are_a_softmax():
    q, k, v = torch.randn(3, 20, 1, 8, generator=torch.Generator().manual_seed(0))
    case = moba_fast.moba_attention(q, k, v, block_size=1, topk=1)
    torch.testing.assert_close(case, v)
    current = torch.arange(20, dtype=torch.int32)
    selected = torch.stack([current - 1, current], dim=1)[:, None]
    found = moba_fast.moba_attention(q, k, v, block_size=1, topk=2, selected=selected)
    torch.testing.assert_close(check_special.two_keys(q, k, v), found)


@pytest.fixture
def few(monkeypatch):
    """Let the command run few checks of one kernel."""
    planned = [(check_case, (PLAIN, SMALL, t)) for t in ("float32", "bfloat16")]
    monkeypatch.setattr(selfcheck, "all_checks", lambda: planned)


def test_the_command_prints_and_records_every_check(few, tmp_path, capsys):
    path = tmp_path / "new folder" / "selfcheck.csv"
    assert moba_fast.selfcheck.main(["--csv", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 checks passed" in printed
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        assert (row["ok"], row["torch"]) == ("True", torch.__version__)
        assert row["cpu"]
        assert row["what"] in printed


def test_the_command_checks_the_kernels_that_were_asked_for(few, monkeypatch, capsys):
    other = replace(PLAIN, kernel="cpu")
    planned = [*selfcheck.all_checks(), (check_case, (other, SMALL, "float32"))]
    monkeypatch.setattr(selfcheck, "all_checks", lambda: planned)
    for kernels, count in (("cpu", 3), ("plain", 6), ("cpu,plain", 9)):
        assert moba_fast.selfcheck.main(["--kernel", kernels]) == 0
        assert f"{count} of {count} checks passed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        moba_fast.selfcheck.main(["--kernel", "cpu,warp"])
    message = " ".join(capsys.readouterr().err.split())
    assert "kernels that run here, plain,cpu, got warp" in message


def test_the_command_fails_where_a_check_fails(few, monkeypatch, capsys):
    monkeypatch.setitem(_flash.KERNELS, "plain", Broken(out=lambda x: -x))
    assert moba_fast.selfcheck.main([]) == 1
    assert "2 of 6 checks passed" in capsys.readouterr().out


def test_the_command_says_which_package_is_missing(monkeypatch, capsys):
    def refuse(name):
        raise ModuleNotFoundError(name=name.split(".")[0])

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert moba_fast.selfcheck.main([]) == 2
    assert "moba_lab is not installed; install the whole" in capsys.readouterr().err


def test_what_is_checked():
    planned = selfcheck.all_checks()
    seen = {(str(t), rest[-1]) for _, (t, *rest) in planned}
    for kernel in ("cpu on cpu", "plain on cpu"):
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            assert (kernel, dtype) in seen
    assert {t.kernel for t in targets()} >= {
        name for name in _flash.GPU_KERNELS if not _flash.why_not(name)
    }
    assert {1, 16, 100, 512} <= {case.block_size for case in CASES}
    assert {20, 40, 96} <= {case.D for case in CASES}
    assert any(case.HK < case.H for case in CASES)
    assert any(0 in case.lengths for case in CASES)
    assert any(case.queries for case in CASES)
    assert any(case.topk == 1 for case in CASES)
    assert any(case.topk * case.block_size > max(case.lengths) for case in CASES)


def test_other_processes_find_what_this_one_finds():
    checks = [2, 0, 1]
    alone = list(selfcheck.run_checks(checks, jobs=1))
    assert list(selfcheck.run_checks(checks, jobs=2)) == alone
    assert alone == [selfcheck.run_check(index) for index in checks]

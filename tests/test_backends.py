"""backends() tells the truth about this machine."""

import sys
from types import SimpleNamespace

import pytest
import torch

import moba_fast
from moba_fast import _flash
from moba_fast.backends import FASTEST, fastest_kernel, interpreting, why_not
from moba_lab import recorded


def test_every_backend_is_reported_with_a_reason():
    found = moba_fast.backends()
    assert list(found) == ["triton", "flash", "torch"]
    for name, backend in found.items():
        assert backend.name == name
        assert len(backend.reason) > 10


def test_what_is_available_runs_and_what_is_not_says_why():
    x = torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(0))
    for backend in moba_fast.backends().values():
        arguments = {"block_size": 4, "topk": 2, "backend": backend.name}
        if backend.available:
            assert moba_fast.moba_attention(x, x, x, **arguments).isfinite().all()
        else:
            with pytest.raises(ValueError, match="does not run here") as error:
                moba_fast.moba_attention(x, x, x, **arguments)
            assert backend.reason in str(error.value)


def test_auto_takes_an_available_backend():
    x = torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(0))
    auto = moba_fast.moba_attention(x, x, x, block_size=4, topk=2)
    torch_backend = moba_fast.moba_attention(
        x, x, x, block_size=4, topk=2, backend="torch"
    )
    assert torch.equal(auto, torch_backend)


def test_only_a_backend_that_takes_something_can_run():
    for backend in moba_fast.backends().values():
        devices = [support.device for support in backend.support]
        assert len(set(devices)) == len(devices)
        assert backend.support or not backend.available


@pytest.mark.parametrize("dtype", moba_fast.backends()["torch"].support[0].dtypes)
def test_the_cpu_takes_what_its_support_says(dtype):
    [support] = [s for s in moba_fast.backends()["torch"].support if s.device == "cpu"]
    assert support.backward
    assert support.largest_head is None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 300, generator=generator).to(dtype).requires_grad_()
    arguments = {"block_size": 2, "topk": 2, "backend": "torch"}
    moba_fast.moba_attention(x, x, x, **arguments).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


@pytest.mark.parametrize(
    ("device", "dtype", "D", "expected"),
    [
        ("cuda:1", torch.bfloat16, 256, ""),
        ("cuda:0", torch.float16, 1, ""),
        ("cpu", torch.bfloat16, 64, "needs tensors on a CUDA device, got cpu"),
        ("cuda", torch.float32, 64, "needs bfloat16 or float16, got torch.float32"),
        ("cuda", torch.float16, 257, "needs D of at most 256, got 257"),
    ],
)
def test_flash_says_what_it_does_not_take(device, dtype, D, expected):
    # Stands for a tensor on a device that this machine need not have.
    q = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(5, 1, D))
    assert why_not("flash", q) == expected


@pytest.fixture
def gpu_with_everything(monkeypatch):
    """Let all backends be there, whatever this machine has."""
    found = {
        name: moba_fast.Backend(name, True, "", backend.support)
        for name, backend in moba_fast.backends().items()
    }
    module = sys.modules["moba_fast.backends"]
    monkeypatch.setattr(module, "backends", lambda: found)
    monkeypatch.setattr(_flash, "choose", lambda name=None: ("aten", ""))
    monkeypatch.delenv(_flash.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return found


def on_gpu(S=9, dtype=torch.bfloat16, D=64):
    """Stand for a tensor on a GPU that this machine need not have."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(S, 1, D))


def test_auto_takes_the_fastest_one_that_was_measured(gpu_with_everything):
    times = {}
    for row in recorded.pick(recorded.read("bench_h100.csv"), status="ok"):
        shape = ("S", "batch", "H", "block_size", "topk", "direction", "routing")
        key = row["dtype"], *(row[x] for x in shape)
        times.setdefault(key, {})[row["kernel"]] = row["total_median_s"]
    compared = {key: of for key, of in times.items() if len(of) > 1}
    assert len(compared) > 30
    for (dtype, S, *_), of in compared.items():
        taken = fastest_kernel(on_gpu(S, getattr(torch, dtype)))
        assert of[taken] == min(of.values()), (dtype, S, of)


def test_auto_on_a_gpu_takes_what_fits(gpu_with_everything, monkeypatch):
    assert fastest_kernel(on_gpu(dtype=torch.float16)) == "triton"
    # Nothing was measured in float32, and flash does not take it.
    assert fastest_kernel(on_gpu(dtype=torch.float32)) == "plain"
    assert fastest_kernel(on_gpu(D=300)) == "plain"
    assert set(FASTEST) <= {torch.bfloat16, torch.float16}
    gpu_with_everything["triton"] = moba_fast.Backend("triton", False, "", ())
    assert fastest_kernel(on_gpu()) == "aten"
    assert fastest_kernel(torch.zeros(1, 1, 8)) == "cpu"


def test_auto_obeys_the_variable_that_names_a_kernel(gpu_with_everything, monkeypatch):
    monkeypatch.setenv(_flash.VARIABLE, "aten")
    assert fastest_kernel(on_gpu()) == "aten"


def test_triton_runs_on_a_cpu_in_its_interpreter_only(monkeypatch):
    x = torch.zeros(1, 1, 8)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert interpreting()
    assert why_not("triton", x) == ""
    assert why_not("triton", on_gpu()) == "needs tensors on a CPU device, got cuda"
    wrong = x.bfloat16()
    assert why_not("triton", wrong) == "needs float32 or float16, got torch.bfloat16"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert why_not("triton", x) == "needs tensors on a CUDA device, got cpu"
    assert why_not("triton", on_gpu()) == ""

"""backends() tells the truth about this machine."""

from types import SimpleNamespace

import pytest
import torch

import moba_fast
from moba_fast.backends import why_not


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

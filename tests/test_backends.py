"""backends() tells the truth about this machine."""

import pytest
import torch

import moba_fast


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

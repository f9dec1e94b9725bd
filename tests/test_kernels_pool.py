"""pool_keys: the mean of every block, whatever its length."""

import numpy as np
import pytest
import torch
from impls import REF, make_case

import moba_fast
from moba_lab.agree import agree

pool = pytest.importorskip("moba_fast.kernels.pool", reason="triton is not here")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(k, cu_seqlens, block_size):
    """Compare with the reference on the same numbers; return k_mean."""
    cu = torch.tensor(cu_seqlens, device=DEVICE)
    k_mean = pool.pool_keys(k, moba_fast.partition(cu, block_size))
    expected = REF.pool_keys(
        k.double().cpu().numpy(), REF.partition(cu_seqlens, block_size)
    )
    assert k_mean.dtype == torch.float32
    agree(k_mean, expected, "k_mean")
    return k_mean


def keys(lengths, dtype=torch.float32, **shape):
    k = make_case(lengths, block_size=1, topk=1, **shape).k
    return torch.as_tensor(k).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block_size", [1, 3, 16, 100, 128])
def test_blocks_of_any_length(block_size, dtype):
    lengths = [5, 0, 201] if block_size > 3 else [5, 0, 11]
    k = keys(lengths, dtype, H=2, HK=2, D=20)
    check(k, np.cumsum([0, *lengths]).tolist(), block_size)


@pytest.mark.parametrize("D", [1, 5, 64, 80, 128, 192, 256])
def test_any_head_dimension(D):
    check(keys([7], D=D), [0, 7], 4)


@pytest.mark.parametrize("block_size", [63, 64, 65, 200, 1000])
def test_long_blocks_are_divided(block_size, monkeypatch):
    monkeypatch.setattr(pool, "PART", 64)
    check(keys([700, 3], H=2, HK=2), [0, 700, 703], block_size)


def test_more_parts_than_a_tile_has_rows(monkeypatch):
    monkeypatch.setattr(pool, "PART", 2)
    check(keys([300]), [0, 300], 300)


def test_any_strides():
    k = keys([9], H=4, HK=4, D=16)
    check(k[:, 1:3], [0, 9], 4)
    check(k.transpose(0, 1).contiguous().transpose(0, 1), [0, 9], 4)
    check(k[..., ::2], [0, 9], 4)


@pytest.mark.parametrize("part", [2, 2048])
def test_nan_stays_in_its_block(part, monkeypatch):
    monkeypatch.setattr(pool, "PART", part)
    k = keys([16], H=2, HK=2)
    clean = check(k, [0, 16], 4)
    k[5, 1, 2], k[9, 0, 3] = torch.nan, torch.inf
    k_mean = pool.pool_keys(k, moba_fast.partition(torch.tensor([0, 16]).to(DEVICE), 4))
    assert k_mean[1, 1, 2].isnan()
    assert k_mean[2, 0, 3] == torch.inf
    clean[1, 1, 2], clean[2, 0, 3] = torch.nan, torch.inf
    assert torch.equal(k_mean.nan_to_num(), clean.nan_to_num())


def test_no_keys():
    assert check(keys([0]), [0, 0], 4).shape == (0, 1, 4)

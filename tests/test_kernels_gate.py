"""select_blocks: the same blocks as the reference, for any shape, and for ties."""

import numpy as np
import pytest
import torch
from impls import REF, make_case

import moba_fast
from moba_lab.agree import agree

pytest.importorskip("triton", reason="triton is not here")

from moba_fast.kernels import gate
from moba_fast.kernels.tilings import FAMILIES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rounded(case, dtype):
    """Return the case with q and k as a dtype holds them."""
    q, k = (torch.as_tensor(x).to(dtype).double().numpy() for x in (case.q, case.k))
    return case.replace(q=q, k=k)


def choose(case, dtype=torch.float32, k_mean=None):
    """Return what the kernel chose, its blocks, and the means."""
    q, k = (torch.as_tensor(x).to(DEVICE, dtype) for x in (case.q, case.k))
    cu_q, cu_k = (
        torch.tensor(cu, device=DEVICE) for cu in (case.cu_seqlens, case.cu_seqlens_k)
    )
    blocks = moba_fast.partition(cu_k, case.block_size, cu_q)
    k_mean = moba_fast.pool_keys(k, blocks) if k_mean is None else k_mean
    return gate.select_blocks(q, k_mean, blocks, case.topk), blocks, k_mean


def check(case, dtype=torch.float32):
    """Compare with the reference on the same numbers; return selected."""
    case = rounded(case, dtype)
    selected, _, _ = choose(case, dtype)
    blocks = case.partition(REF)
    k_mean = REF.pool_keys(case.k, blocks)
    expected = REF.select_blocks(case.q, k_mean, blocks, case.topk)
    scores = REF.gate_scores(case.q, k_mean, blocks)
    assert selected.dtype == torch.int32
    agree(selected, expected, "selected", scores=scores)
    return selected


CASES = {
    "one sequence": make_case([100], block_size=4, topk=4),
    "a pack": make_case([17, 0, 1, 60, 0], block_size=3, topk=5, H=4, HK=2),
    "three heads in a group": make_case([40], block_size=4, topk=3, H=6, HK=2),
    "last queries of longer keys": make_case(
        [90, 9, 20], queries=[3, 0, 20], block_size=4, topk=4, H=2, HK=2
    ),
    "single-token blocks": make_case([40], block_size=1, topk=4, D=5),
    "blocks of 16": make_case([200], block_size=16, topk=3, D=16),
    "blocks of 100": make_case([330], block_size=100, topk=3, D=20),
    "blocks of 128": make_case([400], block_size=128, topk=2, D=8),
    "one past block": make_case([60], block_size=4, topk=2),
    "only the current block": make_case([9, 4], block_size=4, topk=1),
    "more slots than blocks": make_case([20], block_size=5, topk=9),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_chooses_the_same(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n_blocks", [33, 100, 1000])
def test_many_blocks(n_blocks, dtype):
    case = make_case([n_blocks], queries=[20], block_size=1, topk=8, H=2, D=16)
    check(case, dtype)


@pytest.mark.parametrize("D", [1, 33, 80, 128, 192, 256])
def test_any_head_dimension(D):
    check(make_case([60], queries=[30], block_size=4, topk=3, D=D), torch.float16)


@pytest.mark.parametrize("topk", [33, 34, 70, 100])
def test_more_slots_than_one_pass_keeps(topk):
    check(make_case([90, 50], queries=[20, 50], block_size=1, topk=topk))


def test_passes_part_ties():
    case = make_case([100], queries=[20], block_size=1, topk=70, whole=True, D=2)
    check(case, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("topk", [3, 5])
def test_ties_go_to_the_lower_block(topk, dtype):
    # Whole numbers: products and means are exact, so there are many real ties.
    case = make_case([300], block_size=2, topk=topk, whole=True)
    q, k = case.q, case.k
    selected = check(case.replace(k=np.ones_like(k)), dtype)
    past = range(topk - 1)
    assert (selected[-1, :, :-1] == torch.tensor(past, device=DEVICE)).all()
    check(case.replace(q=np.zeros_like(q)), dtype)
    check(case.replace(k=np.zeros_like(k)), dtype)
    check(case, dtype)


def test_scores_that_rise_and_fall():
    case = make_case([300], block_size=1, topk=6, D=1)
    for keys in (np.arange(300.0), -np.arange(300.0)):
        for sign in (1.0, -1.0):
            k, q = keys.reshape(-1, 1, 1), np.full_like(case.q, sign)
            check(case.replace(q=q, k=k), torch.float16)


@pytest.mark.parametrize("scale_q", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scale_k", [1e-5, 1e-3, 1.0, 6e4])
def test_the_range_of_float16(scale_q, scale_k):
    case = make_case([120], queries=[40], block_size=4, topk=4, D=16)
    case = case.replace(q=case.q * scale_q, k=case.k / np.abs(case.k).max() * scale_k)
    check(case, torch.float16)


def test_means_have_more_bits_than_queries():
    case = make_case([40], queries=[2], block_size=1, topk=4, H=1)
    # In float16 all of them would be one of three numbers.
    k_mean = torch.zeros(40, 1, 4, device=DEVICE)
    k_mean[:, 0, 0] = 1 + torch.arange(40.0) * 2**-14
    ones = case.replace(q=np.ones_like(case.q))
    selected, _, _ = choose(ones, torch.float16, k_mean)
    assert selected[1, 0].tolist() == [36, 37, 38, 39]


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_the_range_of_float32(exponent):
    case = make_case([60], block_size=4, topk=4, D=16)
    check(case.replace(k=case.k * 2.0**exponent))
    check(case.replace(q=case.q * 2.0**exponent))


def test_shares_of_queries_and_strides():
    case = make_case([70, 45], block_size=4, topk=4, H=4, HK=2, D=8)
    selected, blocks, k_mean = choose(case)
    q = torch.as_tensor(case.q).float().to(DEVICE)
    share = gate.select_blocks(q[50:91], k_mean, blocks.of_queries(50, 91), 4)
    assert torch.equal(share, selected[50:91])
    heads = gate.select_blocks(q[:, 2:], k_mean[:, 1:], blocks, 4)
    assert torch.equal(heads, selected[:, 2:])
    wide = q.repeat_interleave(2, dim=2)
    for strided in (q.transpose(0, 1).contiguous().transpose(0, 1), wide[..., ::2]):
        assert torch.equal(gate.select_blocks(strided, k_mean, blocks, 4), selected)


def assert_valid(selected, blocks):
    """Assert that every row is ascending past blocks, then -1, then its own block."""
    past = selected[..., :-1].long()
    first, current = blocks.first_of_query, blocks.of_query
    there = past >= 0
    assert (selected[..., -1] == current[:, None]).all()
    assert ((past >= first[:, None, None]) | ~there).all()
    assert (past < current[:, None, None]).all()
    ascending = past[..., 1:] > past[..., :-1]
    assert (ascending | ~there[..., 1:]).all()
    assert (there[..., :-1] | ~there[..., 1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("topk", [4, 36])
def test_what_is_not_finite_stays_in_its_rows(topk, dtype):
    case = make_case([44, 30], block_size=1, topk=topk, H=2, HK=2, D=8)
    clean, blocks, _ = choose(case, dtype)
    for value in (np.nan, np.inf, -np.inf):
        q, k = case.q.copy(), case.k.copy()
        q[30, 1, 3] = value
        selected, _, _ = choose(case.replace(q=q), dtype)
        assert_valid(selected, blocks)
        differs = (selected != clean).any(-1)
        assert differs.sum() <= 1
        differs[30, 1] = False
        assert not differs.any()
        k[20, 1] = value
        selected, _, _ = choose(case.replace(k=k), dtype)
        assert_valid(selected, blocks)
        differs = (selected != clean).any(-1)
        assert not differs[:, 0].any()
        assert not differs[:21].any()
        assert not differs[44:].any()


def test_huge_queries_are_ranked():
    case = make_case([60], block_size=4, topk=3, D=8)
    selected, _, k_mean = choose(case)
    q = torch.as_tensor(case.q).float().to(DEVICE) * 2.0**110
    cu = torch.tensor([0, 60], device=DEVICE)
    blocks = moba_fast.partition(cu, 4)
    assert torch.equal(gate.select_blocks(q, k_mean, blocks, 3), selected)


def test_no_queries():
    case = make_case([9], queries=[0], block_size=4, topk=3)
    assert choose(case)[0].shape == (0, 2, 3)
    assert choose(make_case([0], block_size=4, topk=3))[0].shape == (0, 2, 3)


def test_every_configuration_is_listed():
    listed = set(gate.configurations().values())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in range(1, 257):
            for rows in (0, 1, 15, 16, 31, 32, 63, 64, 127, 128, 5000):
                for family in FAMILIES:
                    assert gate.config(dtype, D, rows, family) in listed

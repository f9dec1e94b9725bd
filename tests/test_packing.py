"""A pack gives what each of its sequences gives alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from impls import FAST, IMPLS, REF, cases, largest_error, make_case

import moba_fast


def alone(case, b):
    """Cut one sequence out of a pack."""
    rows = slice(case.cu_seqlens[b], case.cu_seqlens[b + 1])
    keys = slice(case.cu_seqlens_k[b], case.cu_seqlens_k[b + 1])
    return rows, case.replace(
        q=case.q[rows],
        k=case.k[keys],
        v=case.v[keys],
        cu_seqlens=[0, rows.stop - rows.start],
        cu_seqlens_k=[0, keys.stop - keys.start],
    )


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@given(case=cases())
def test_a_pack_equals_its_sequences(impl, case):
    out, lse, selected = case.run(impl)
    first_block = np.asarray(case.partition(impl).cu_blocks)
    for b in range(len(case.cu_seqlens) - 1):
        rows, sequence = alone(case, b)
        expected = sequence.run(impl)
        shifted = np.where(expected[2] < 0, -1, expected[2] + first_block[b])
        assert selected[rows].tolist() == shifted.tolist()
        assert largest_error(out[rows], expected[0]) < 1e-12
        assert largest_error(lse[rows], expected[1]) < 1e-12


def test_gradients_of_a_pack_equal_those_of_its_sequences():
    case = make_case([11, 0, 3, 18], block_size=4, topk=3, H=4, HK=2)
    dout = torch.tensor(np.random.default_rng(1).normal(size=case.q.shape))

    def gradients(case, dout):
        leaves = [torch.tensor(x, requires_grad=True) for x in (case.q, case.k, case.v)]
        out = moba_fast.moba_attention(*leaves, **case.options)
        return torch.autograd.grad(out, leaves, dout)

    packed = gradients(case, dout)
    for b in (0, 2, 3):
        rows, sequence = alone(case, b)
        for x, y in zip(packed, gradients(sequence, dout[rows]), strict=True):
            assert largest_error(x[rows], y) < 1e-13


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_neighbours_do_not_leak(impl):
    case = make_case([9, 8], block_size=4, topk=3)
    moved = case.k.copy()
    moved[:9] += 100
    before, after = case.run(impl), case.replace(k=moved).run(impl)
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a[9:], b[9:])


def test_offsets_may_be_lists_arrays_or_tensors():
    case = make_case([9, 6], block_size=4, topk=2)
    expected = case.run(FAST)[0]
    for offsets in (
        np.array([0, 9, 15], dtype=np.int32),
        torch.tensor([0, 9, 15], dtype=torch.int32),
        torch.tensor([0, 9, 15]),
    ):
        out = case.replace(cu_seqlens=offsets, cu_seqlens_k=offsets).run(FAST)[0]
        assert np.array_equal(out, expected)
    out = case.replace(cu_seqlens_k=None).run(REF)[0]
    assert largest_error(out, expected) < 1e-13

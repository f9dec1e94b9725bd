"""The future reaches nobody: not through the keys and not through the gate."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from impls import FAST, IMPLS, REF, cases, make_case

import moba_fast


def change_after(case, token):
    """Replace queries, keys and values after a token by others."""
    rng = np.random.default_rng(99)
    moved = {}
    for name in "qkv":
        x = getattr(case, name).copy()
        x[token + 1 :] = rng.normal(size=x[token + 1 :].shape) * 3
        moved[name] = x
    return case.replace(**moved)


@given(cases(decoding=False), st.integers(0, 100))
def test_reference_is_bit_identical_before_the_change(case, token):
    before, after = case.run(REF), change_after(case, token).run(REF)
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a[: token + 1], b[: token + 1])


@given(cases(decoding=False), st.integers(0, 100))
def test_fast_is_unchanged_before_the_change(case, token):
    before, after = case.run(FAST), change_after(case, token).run(FAST)
    assert np.array_equal(before[2][: token + 1], after[2][: token + 1])
    for a, b in zip(before[:2], after[:2], strict=True):
        assert np.abs(a - b)[: token + 1].max(initial=0.0) < 1e-13


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_the_change_reaches_the_tokens_after_it(impl):
    case = make_case([24], block_size=4, topk=3)
    before, after = case.run(impl)[0], change_after(case, 10).run(impl)[0]
    assert (np.abs(before - after).max((1, 2)) > 1e-3).tolist() == [False] * 11 + [
        True
    ] * 13


def test_no_gradient_comes_from_the_future():
    case = make_case([24], block_size=4, topk=3)
    leaves = [torch.tensor(x, requires_grad=True) for x in (case.q, case.k, case.v)]
    out = moba_fast.moba_attention(*leaves, **case.options)
    out[: 10 + 1].sum().backward()
    for leaf in leaves:
        assert (leaf.grad[11:] == 0).all()
        assert (leaf.grad[:11] != 0).any()


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_last_queries_equal_the_end_of_a_full_pass(impl):
    case = make_case([23, 6, 9], block_size=4, topk=3, H=4, HK=2)
    whole = case.run(impl)
    tails = [5, 6, 1]
    rows = np.concatenate(
        [np.arange(b - n, b) for b, n in zip(case.cu_seqlens_k[1:], tails, strict=True)]
    )
    tail = case.replace(q=case.q[rows], cu_seqlens=np.cumsum([0, *tails]).tolist())
    for a, b in zip(tail.run(impl), whole, strict=True):
        assert np.abs(a - b[rows]).max() < 1e-13

"""Special cases with a known answer: full, current block only, window, sink."""

import numpy as np
import pytest
import torch
from impls import IMPLS, REF, largest_error, make_case


def full_attention(case):
    """Attend causally and densely to every earlier token of the same sequence."""
    out = np.zeros_like(case.q)
    for b, first in enumerate(case.cu_seqlens_k[:-1]):
        rows = slice(first, case.cu_seqlens_k[b + 1])
        q, k, v = (
            torch.tensor(x[rows]).transpose(0, 1) for x in (case.q, case.k, case.v)
        )
        part = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        out[rows] = part.transpose(0, 1).numpy()
    return out


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize("topk", [6, 7, 100])
def test_topk_of_all_blocks_is_full_attention(impl, topk):
    case = make_case([22, 9], block_size=4, topk=topk, H=4, HK=2)
    assert largest_error(case.run(impl)[0], full_attention(case)) < 1e-13


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize("block_size", [22, 23, 1000])
def test_a_block_of_all_tokens_is_full_attention(impl, block_size):
    case = make_case([22, 9], block_size=block_size, topk=1, H=4, HK=2)
    assert largest_error(case.run(impl)[0], full_attention(case)) < 1e-13


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_topk_1_reads_the_current_block_only(impl):
    case = make_case([22], block_size=4, topk=1)
    pieces = make_case([4] * 5 + [2], block_size=4, topk=1)
    pieces = pieces.replace(q=case.q, k=case.k, v=case.v)
    out, _, selected = case.run(impl)
    assert selected[:, 0, 0].tolist() == [i // 4 for i in range(22)]
    assert largest_error(out, full_attention(pieces)) < 1e-13
    assert largest_error(out, full_attention(case)) > 0.1


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_block_size_1_reads_single_tokens(impl):
    case = make_case([12], block_size=1, topk=3)
    out, _, selected = case.run(impl)
    for i in (0, 1, 11):
        reads = [n for n in selected[i, 1].tolist() if n >= 0]
        affinity = case.k[:i, 0] @ case.q[i, 1]
        assert reads == [*sorted(np.argsort(-affinity)[:2].tolist()), i]
        weights = np.exp(case.k[reads, 0] @ case.q[i, 1] / 2)
        expected = weights @ case.v[reads, 0] / weights.sum()
        assert largest_error(out[i, 1], expected) < 1e-13


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize("policy", ["window", "sink"])
def test_fixed_policies_are_gates(impl, policy):
    case = make_case([20], block_size=4, topk=2)
    current = np.arange(20) // 4
    past = current - 1 if policy == "window" else np.where(current > 0, 0, -1)
    selected = np.repeat(np.stack([past, current], -1)[:, None], 2, 1).astype(np.int32)
    out, _, _ = case.run(impl, selected=impl.array(selected))
    for i in range(20):
        reads = [t for t in range(i + 1) if t // 4 in selected[i, 0]]
        weights = np.exp(case.k[reads, 0] @ case.q[i, 0] / 2)
        expected = weights @ case.v[reads, 0] / weights.sum()
        assert largest_error(out[i, 0], expected) < 1e-13


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize("lengths", [[0], [0, 0], [1], [0, 1, 0]])
def test_almost_nothing(impl, lengths):
    case = make_case(lengths, block_size=4, topk=3)
    out, lse, selected = case.run(impl)
    assert out.shape == case.q.shape
    assert selected.shape == (len(case.q), 2, 3)
    assert largest_error(out, np.repeat(case.v, 2, axis=1)) < 1e-15
    assert np.isfinite(lse).all()


def test_full_attention_here_is_not_moba():
    case = make_case([22, 9], block_size=4, topk=2, H=4, HK=2)
    assert largest_error(case.run(REF)[0], full_attention(case)) > 0.1

"""Defects found in published MoBA code, one test each, over both packages."""

import numpy as np
import pytest
import torch
from impls import FAST, IMPLS, REF, largest_error, make_case
from torch.utils._python_dispatch import TorchDispatchMode

import moba_fast
import moba_ref


def definition(case):
    return moba_ref.moba_attention_definition(case.q, case.k, case.v, **case.options)


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_topk_1_does_not_fall_through_to_full_attention(impl):
    case = make_case([32], block_size=4, topk=1)
    out, _, selected = case.run(impl)
    assert selected.shape == (32, 2, 1)
    full = case.run(impl, topk=8)[0]
    assert largest_error(out, definition(case)) < 1e-13
    assert largest_error(out[4:], full[4:]) > 0.1


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_topk_3_of_8_leaves_blocks_out(impl):
    case = make_case([32], block_size=4, topk=3)
    out, _, selected = case.run(impl)
    assert len(set(selected[31, :, :-1].ravel().tolist())) < 7
    assert largest_error(out, definition(case)) < 1e-13
    assert largest_error(out, case.run(impl, topk=100)[0]) > 0.1


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize(("H", "HK"), [(4, 1), (4, 2), (6, 2), (3, 3)])
def test_grouped_query_heads_work(impl, H, HK):
    case = make_case([32, 5], block_size=4, topk=3, H=H, HK=HK)
    assert largest_error(case.run(impl)[0], definition(case)) < 1e-13


@pytest.mark.parametrize("n_blocks", [33, 100])
def test_the_choice_is_over_all_blocks(n_blocks):
    case = make_case([2 * n_blocks], block_size=2, topk=5, seed=n_blocks)
    # The best block is the last past one, far beyond any tile of 32.
    case.k[-4:-2] = 3 * case.q[-1, 0]
    for impl in IMPLS:
        out, _, selected = case.run(impl)
        assert n_blocks - 2 in selected[-1, 0]
        assert largest_error(out, definition(case)) < 1e-12


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_early_queries_name_no_future_block(impl):
    case = make_case([32], block_size=4, topk=3)
    case.k[28:] += 100 * case.q[0, 0]
    _, _, selected = case.run(impl)
    assert (selected <= (np.arange(32) // 4)[:, None, None]).all()


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_ties_select_exactly_topk(impl):
    case = make_case([32], block_size=4, topk=3)
    case = case.replace(k=np.ones_like(case.k))
    _, _, selected = case.run(impl)
    assert (selected >= 0).sum(-1)[:, 0].tolist() == [
        min(3, i // 4 + 1) for i in range(32)
    ]
    assert selected[31, 0].tolist() == [0, 1, 7]


def test_prefill_is_never_guessed_from_lengths():
    case = make_case([32], block_size=4, topk=3)
    q, k, v = (torch.tensor(x) for x in (case.q[-5:], case.k, case.v))
    with pytest.raises(ValueError, match="cu_seqlens_k is None"):
        moba_fast.moba_attention(q, k, v, block_size=4, topk=3)
    out = moba_fast.moba_attention(
        q, k, v, block_size=4, topk=3, cu_seqlens=[0, 5], cu_seqlens_k=[0, 32]
    )
    assert largest_error(out, definition(case)[-5:]) < 1e-13


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize("block_size", [1, 3, 7, 50])
def test_any_block_size_works(impl, block_size):
    case = make_case([50], block_size=block_size, topk=3)
    assert largest_error(case.run(impl)[0], definition(case)) < 1e-13


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_empty_sequences_and_strided_inputs_work(impl):
    case = make_case([0, 9, 0, 4, 0], block_size=4, topk=2)
    strided = {n: np.asfortranarray(getattr(case, n)) for n in "qkv"}
    expected = definition(case)
    assert largest_error(case.replace(**strided).run(impl)[0], expected) < 1e-13


class LargestTensor(TorchDispatchMode):
    """Record the most elements that any operator returned in one floating tensor."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.elements = max(self.elements, x.untyped_storage().nbytes() // 4)
        return result


def test_scores_never_exist_all_at_once(monkeypatch):
    monkeypatch.setattr("moba_fast.gate.SCORES_PER_CHUNK_ON_CPU", 2**14)
    S, H, block_size = 4096, 2, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(S, H, 4, generator=generator) for _ in range(3))
    q.requires_grad_()
    with LargestTensor() as largest:
        moba_fast.moba_attention(
            q, k, v, block_size=block_size, topk=3
        ).sum().backward()
    # Neither S x S nor S x H x N: the largest are partial results, (S, H, topk - 1, D).
    assert largest.elements <= S * H * 4 * 2
    assert largest.elements < S * H * (S // block_size) / 32


def test_more_sequences_than_a_launch_grid_holds():
    n = 65_537
    x = torch.arange(n, dtype=torch.float64)[:, None, None] / n
    offsets = torch.arange(n + 1, dtype=torch.int32)
    out = moba_fast.moba_attention(x, x, x, block_size=4, topk=3, cu_seqlens=offsets)
    assert torch.equal(out, x)


def test_nothing_is_cached_by_identity():
    case = make_case([20], block_size=4, topk=2)
    q, k, v = (torch.tensor(x) for x in (case.q, case.k, case.v))
    offsets = torch.tensor([0, 4, 20], dtype=torch.int32)
    moba_fast.moba_attention(q, k, v, block_size=4, topk=2, cu_seqlens=offsets)
    offsets[1] = 13
    out = moba_fast.moba_attention(q, k, v, block_size=4, topk=2, cu_seqlens=offsets)
    moved = case.replace(cu_seqlens=[0, 13, 20], cu_seqlens_k=[0, 13, 20])
    assert largest_error(out, moved.run(REF)[0]) < 1e-13
    assert largest_error(out, case.run(FAST)[0]) > 0.1

"""pool_keys, gate_scores, select_blocks: the mean, the causal rules, the choice."""

import numpy as np
import pytest
import torch
from hypothesis import given
from impls import FAST, IMPLS, REF, cases, make_case

from moba_fast import gate
from moba_lab.agree import agree


def choose(impl, case):
    """Return k_mean, scores and selected as NumPy arrays."""
    blocks = case.partition(impl)
    q, k = impl.array(case.q), impl.array(case.k)
    k_mean = impl.pool_keys(k, blocks)
    scores = impl.gate_scores(q, k_mean, blocks)
    selected = impl.select_blocks(q, k_mean, blocks, case.topk)
    return tuple(np.asarray(x) for x in (k_mean, scores, selected))


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_means_of_short_blocks_divide_by_their_length(impl):
    case = make_case([5, 2], block_size=4, topk=2)
    k_mean, _, _ = choose(impl, case)
    for n, tokens in enumerate([slice(0, 4), slice(4, 5), slice(5, 7)]):
        assert np.allclose(k_mean[n], case.k[tokens].mean(0), rtol=1e-14)


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_scores_obey_the_causal_rules(impl):
    case = make_case([7, 6], block_size=3, topk=2, H=4, HK=2)
    k_mean, scores, _ = choose(impl, case)
    current = [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4]
    first = [0] * 7 + [3] * 6
    for i in range(13):
        for n in range(5):
            if n == current[i]:
                assert (scores[i, :, n] == np.inf).all()
            elif not first[i] <= n < current[i]:
                assert (scores[i, :, n] == -np.inf).all()
            else:
                for h in range(4):
                    expected = case.q[i, h] @ k_mean[n, h // 2]
                    assert abs(scores[i, h, n] - expected) < 1e-14


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_selected_is_clean_before_any_mask(impl):
    case = make_case([40, 3, 0, 17], block_size=4, topk=4, H=3)
    _, _, selected = choose(impl, case)
    blocks = case.partition(REF)
    assert selected.dtype == np.int32
    assert (selected[..., -1] == blocks.of_query[:, None]).all()
    for i in range(len(case.q)):
        first, current = blocks.first_of_query[i], blocks.of_query[i]
        for row in selected[i]:
            past = row[:-1][row[:-1] >= 0]
            assert len(past) == min(3, current - first)
            assert (past >= first).all()
            assert (past < current).all()
            assert (np.diff(past) > 0).all()
            assert (row[len(past) : -1] == -1).all()


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_ties_go_to_the_lower_block(impl):
    case = make_case([24], block_size=4, topk=3)
    case = case.replace(k=np.ones_like(case.k))
    _, _, selected = choose(impl, case)
    assert selected[23].tolist() == [[0, 1, 5]] * 2
    assert selected[7].tolist() == [[0, -1, 1]] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "HK"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("D", [5, 64, 100])
def test_ties_are_not_decided_by_rounding(dtype, H, HK, D):
    # Matrix products round equal columns differently, depending on where they stand.
    generator = torch.Generator().manual_seed(D)
    for n_blocks, n_queries in ((5, 1), (9, 1), (17, 3), (40, 2)):
        block = torch.randn(2, HK, D, generator=generator).to(dtype)
        k = torch.cat([block.repeat(n_blocks, 1, 1), block[:n_queries]])
        blocks = FAST.partition([0, len(k)], 2, [0, n_queries])
        q = torch.randn(n_queries, H, D, generator=generator).to(dtype)
        selected = FAST.select_blocks(q, FAST.pool_keys(k, blocks), blocks, 4)
        assert (selected[..., :-1] == torch.arange(3)).all()


def test_ties_at_the_cut_keep_what_is_above_it():
    scores = torch.tensor([[[1.0, 2, 1, 3, 1]], [[5.0, 1, 5, 5, 9]]])
    columns = gate.top_blocks(scores, 3, torch.ones(2, 1), torch.ones(1, 5))
    assert columns.sort(-1).values.tolist() == [[[0, 1, 3]], [[0, 2, 4]]]


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_topk_beyond_all_blocks_is_padded(impl):
    case = make_case([6], block_size=2, topk=9)
    _, _, selected = choose(impl, case)
    assert selected[5, 0].tolist() == [0, 1, -1, -1, -1, -1, -1, -1, 2]


@pytest.mark.parametrize("n_blocks", [33, 100, 1000])
def test_best_blocks_are_found_among_many(n_blocks):
    case = make_case([n_blocks * 2], block_size=2, topk=8, seed=n_blocks)
    case = case.replace(q=case.q[-4:], cu_seqlens=[0, 4])
    _, scores, expected = choose(REF, case)
    _, _, selected = choose(FAST, case)
    agree(selected, expected, "selected", scores=scores)
    past = np.sort(np.argsort(-scores[-1, 0, : n_blocks - 1])[:7])
    assert selected[-1, 0, :-1].tolist() == past.tolist()


@given(cases())
def test_twins_agree(case):
    fast, ref = choose(FAST, case), choose(REF, case)
    agree(torch.tensor(fast[0]), ref[0], "k_mean")
    agree(torch.tensor(fast[1]), ref[1], "scores")
    agree(fast[2], ref[2], "selected", scores=ref[1])


@given(cases())
def test_chunks_do_not_change_the_choice(case):
    q, k = torch.tensor(case.q), torch.tensor(case.k)
    blocks = case.partition(FAST)
    k_mean = gate.pool_keys(k, blocks)
    whole = gate.select_blocks(q, k_mean, blocks, case.topk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "SCORES_PER_CHUNK_ON_CPU", 8)
        assert torch.equal(gate.select_blocks(q, k_mean, blocks, case.topk), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_of_every_dtype_are_those_of_the_reference(dtype):
    case = make_case([600, 0, 45], block_size=32, topk=4, H=4, HK=2, D=16)
    k = torch.tensor(case.k).to(dtype)
    exact = REF.pool_keys(k.double().numpy(), case.partition(REF))
    k_mean = FAST.pool_keys(k, case.partition(FAST))
    eps = torch.finfo(k_mean.dtype).eps
    assert k_mean.dtype == gate.gate_dtype(k)
    np.testing.assert_allclose(k_mean.numpy(), exact, rtol=0, atol=32 * eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_are_scored_in_float32(dtype):
    case = make_case([600], block_size=8, topk=4, H=4, HK=2, D=16)
    q, k = (torch.tensor(x).to(dtype) for x in (case.q, case.k))
    case = case.replace(q=q.double().numpy(), k=k.double().numpy())
    blocks = case.partition(FAST)
    k_mean = FAST.pool_keys(k, blocks)
    assert k_mean.dtype == FAST.gate_scores(q, k_mean, blocks).dtype == torch.float32
    selected = FAST.select_blocks(q, k_mean, blocks, 4)
    _, scores, expected = choose(REF, case)
    agree(selected, expected, "selected", scores=scores)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("columns", [8, 13, 64, 67, 256])
def test_the_largest_by_groups_are_those_of_topk(count, columns):
    generator = torch.Generator().manual_seed(columns + count)
    scores = torch.randn(50, 2, columns, generator=generator)
    scores[10:20, :, count // 2 :] = -torch.inf
    scores[20:30] = scores[20:30].round()
    scores[30:40, 0, ::3] = torch.nan
    expected = scores.topk(count, dim=-1).values
    values, found = gate.largest(scores, count)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    scored = found < columns
    assert (values[~scored] == -torch.inf).all()
    picked = scores.gather(-1, found.clamp(max=columns - 1))
    torch.testing.assert_close(
        picked[scored], values[scored], rtol=0, atol=0, equal_nan=True
    )
    different = found.sort(-1).values.diff(dim=-1) > 0
    assert different.all()

"""The agreement policy passes what it should and fails what it should."""

import numpy as np
import pytest
import torch
from impls import FAST, REF, make_case

from moba_lab.agree import agree, plain_attention, selected_tokens

CASE = make_case([40, 24], block_size=4, topk=3, H=2, HK=1, seed=3)


def reference():
    out, lse, selected = CASE.run(REF)
    blocks = CASE.partition(REF)
    k_mean = REF.pool_keys(CASE.k, blocks)
    return out, lse, selected, REF.gate_scores(CASE.q, k_mean, blocks)


def test_equal_values_agree_and_the_line_says_so(capsys):
    out, _, selected, scores = reference()
    agree(torch.tensor(out), out, "out")
    agree(out.copy(), torch.tensor(out), "out")
    agree(torch.tensor(selected), selected, "selected", scores=scores)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("out           agrees: max 0.0e+00")
    assert lines[1] == lines[0]
    assert lines[2] == "selected      agrees: 128 rows, 0 exempt as near ties"


def test_an_error_beyond_the_bound_names_the_worst_place():
    out = reference()[0]
    wrong = torch.tensor(out).float()
    wrong[17, 1, 2] += 0.01
    with pytest.raises(AssertionError, match="worst at token 17, head 1, dimension 2"):
        agree(wrong, out, "out")


def test_twice_the_plain_error_is_the_bound():
    out = np.ones((2, 1, 1))
    plain = torch.ones(2, 1, 1) + 0.01
    agree(torch.ones(2, 1, 1) + 0.019, out, "out", plain=plain)
    with pytest.raises(AssertionError, match=r"allowed 2\.0e-02"):
        agree(torch.ones(2, 1, 1) + 0.021, out, "out", plain=plain)


@pytest.mark.parametrize("plain", [None, torch.full((3, 1, 1), torch.nan)])
def test_nan_never_passes(plain):
    fast = torch.tensor([1.0, torch.nan, 1.0]).reshape(3, 1, 1)
    with pytest.raises(AssertionError, match="NaN at token 1"):
        agree(fast, np.ones((3, 1, 1)), "out", plain=plain)


def test_a_plain_result_with_nan_allows_nothing():
    plain = torch.full((3, 1, 1), torch.nan)
    with pytest.raises(AssertionError, match="allowed nan"):
        agree(torch.ones(3, 1, 1), np.ones((3, 1, 1)), "out", plain=plain)


def test_infinities_agree_only_with_themselves():
    ref = np.array([np.inf, -np.inf, 1.0])
    agree(torch.tensor(ref), ref, "scores")
    for value in (-torch.inf, 3.0):
        with pytest.raises(AssertionError):
            agree(torch.tensor([value, -torch.inf, 1.0]), ref, "scores")


def test_shapes_and_integers_must_be_equal():
    with pytest.raises(AssertionError, match=r"expected shape \(2,\), got \(3,\)"):
        agree(torch.zeros(3), np.zeros(2), "lse")
    with pytest.raises(AssertionError, match="1 of 3 integers differ, first at"):
        agree(torch.tensor([1, 2, 4]), np.array([1, 2, 3]), "query")


def swap_last_past_block(scores, selected, i, gap):
    """Give query i another last past block, scoring `gap` less than the chosen one."""
    scores, other = scores.copy(), selected.copy()
    chosen = selected[i, 0, :-1]
    spare = next(n for n in range(chosen[-1]) if n not in chosen)
    scores[i, 0, spare] = (
        scores[i, 0, chosen[-1]] - gap * np.abs(scores[i, 0, :3]).max()
    )
    other[i, 0, :-1] = sorted([chosen[0], spare])
    return scores, other


def test_near_ties_are_exempt_when_they_are_few():
    _, _, selected, scores = reference()
    i = next(i for i in range(30, 40) if selected[i, 0, 1] > 3)
    near, other = swap_last_past_block(scores, selected, i, gap=1e-6)
    many = [np.concatenate([x] * 10) for x in (other, selected, near)]
    many[0][: 64 * 9] = many[1][: 64 * 9]
    agree(many[0], many[1], "selected", scores=many[2])
    with pytest.raises(AssertionError, match="1 of 128 rows differ at near ties"):
        agree(other, selected, "selected", scores=near)


def test_a_worse_choice_is_no_near_tie():
    _, _, selected, scores = reference()
    i = next(i for i in range(30, 40) if selected[i, 0, 1] > 3)
    far, other = swap_last_past_block(scores, selected, i, gap=1e-2)
    with pytest.raises(AssertionError, match=f"first at token {i}, head 0"):
        agree(other, selected, "selected", scores=far)


def test_a_wrong_current_block_is_no_near_tie():
    _, _, selected, scores = reference()
    wrong = selected.copy()
    wrong[9, 0, -1] = 1
    with pytest.raises(AssertionError, match="token 9, head 0"):
        agree(wrong, selected, "selected", scores=scores)


def test_plain_attention_is_the_reference_in_float64():
    out, lse, selected, _ = reference()
    q, k, v = (torch.tensor(x) for x in (CASE.q, CASE.k, CASE.v))
    plain = plain_attention(q, k, v, selected, CASE.partition(FAST))
    agree(plain[0], out, "out")
    agree(plain[1], lse, "lse")
    mask = REF.token_mask(CASE.q, CASE.k, **CASE.options)
    blocks = CASE.partition(FAST)
    assert np.array_equal(selected_tokens(selected, blocks).numpy(), mask)

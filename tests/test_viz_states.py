"""What figures show is decided by `states` and `token_states`: tested cell by cell."""

import numpy as np
import pytest
import torch
from pictures import example, pack_by_hand

import moba_fast
from moba_lab import viz
from moba_lab.viz import State
from moba_ref import partition, token_mask

LETTER = dict(zip(".-#oX", State, strict=True))


def picture(text):
    return np.array([[LETTER[c] for c in row] for row in text.split()])


def test_states_of_a_pack_cell_by_cell():
    blocks, selected = pack_by_hand()
    expected = "o.... o.... #o... #o... -#o.. ...o. ...o. ...#o ...#o"
    got = viz.states(selected, blocks)
    assert got.dtype == np.int8
    assert got.shape == (9, 1, 5)
    np.testing.assert_array_equal(got[:, 0], picture(expected))


def test_what_breaks_the_rules_is_a_leak_and_an_unread_current_block_is_not_current():
    blocks, selected = pack_by_hand()
    selected[2, 0] = [2, 1]  # block 2 lies in the future of query 2
    selected[7, 0] = [0, 4]  # block 0 belongs to the other sequence
    selected[8, 0] = [3, -1]  # the current block, 4, is not read
    rows = viz.states(selected, blocks)[[2, 7, 8], 0]
    np.testing.assert_array_equal(rows, picture("-oX.. X..-o ...#-"))


def test_token_states_of_selected_cell_by_cell():
    blocks, selected = pack_by_hand()
    expected = """o........ oo....... ##o...... ##oo..... --##o....
        .....o... .....oo.. .....##o. .....##oo"""
    got = viz.token_states(selected, blocks)[:, 0]
    np.testing.assert_array_equal(got, picture(expected))


def test_token_states_of_a_mask_equal_those_of_selected_and_show_its_leaks():
    blocks, selected = pack_by_hand()
    expected = viz.token_states(selected, blocks)
    mask = expected >= State.SELECTED
    np.testing.assert_array_equal(viz.token_states(mask, blocks), expected)
    mask[0, 0, 1] = mask[5, 0, 0] = True
    leaks = np.argwhere(viz.token_states(mask, blocks)[:, 0] == State.LEAK)
    assert leaks.tolist() == [[0, 1], [5, 0]]


@pytest.mark.parametrize("packed", [False, True])
def test_the_mask_of_the_definition_and_selected_give_the_same_picture(packed):
    from moba_lab.example import running_example

    e, made = running_example(packed=packed), example(packed)
    settings = {"block_size": e.block_size, "topk": e.topk}
    mask = token_mask(e.q, e.k, cu_seqlens=e.cu_seqlens, **settings)
    np.testing.assert_array_equal(
        viz.token_states(mask, made.blocks),
        viz.token_states(made.selected, made.blocks),
    )


def test_queries_that_are_the_last_ones_of_longer_keys():
    blocks = partition([0, 6], block_size=2, cu_seqlens_q=[0, 2])
    selected = np.array([[[1, 2]], [[0, 2]]])
    got = viz.states(selected, blocks)[:, 0]
    np.testing.assert_array_equal(got, picture("-#o #-o"))
    tokens = viz.token_states(selected, blocks)[:, 0]
    np.testing.assert_array_equal(tokens, picture("--##o. ##--oo"))


def test_tensors_of_the_fast_package_give_the_same_states():
    blocks, selected = pack_by_hand()
    fast = moba_fast.partition(torch.tensor([0, 5, 9]), 2)
    got = viz.states(torch.from_numpy(selected), fast)
    np.testing.assert_array_equal(got, viz.states(selected, blocks))


def test_half_precision_tensors_that_need_gradients_are_drawn():
    made = example()
    finite = np.where(np.isfinite(made.scores), made.scores, 0)
    scores = torch.tensor(finite, dtype=torch.bfloat16, requires_grad=True)
    assert viz.gate_map(scores, made.blocks).finding.startswith("Head 0: query 25")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s: s[:-1], ValueError, r"\(S, H, topk\) with S=9 .* \(8, 1, 2\)"),
        (lambda s: s[:, 0], ValueError, r"got shape \(9, 2\)"),
        (lambda s: s + 1, ValueError, "-1 .none. to 4, got 0 to 5"),
        (lambda s: s - 1, ValueError, "got -2 to 3"),
        (lambda s: s.astype(float), TypeError, "integers, got float64"),
    ],
)
def test_selected_that_does_not_fit_is_refused(change, error, words):
    blocks, selected = pack_by_hand()
    with pytest.raises(error, match=words):
        viz.states(change(selected), blocks)


def test_a_mask_of_another_shape_is_refused():
    blocks, _ = pack_by_hand()
    with pytest.raises(ValueError, match=r"\(9, H, 9\), got \(9, 9\)"):
        viz.token_states(np.ones((9, 9), dtype=bool), blocks)


def test_something_that_is_not_blocks_is_refused():
    _, selected = pack_by_hand()
    with pytest.raises(TypeError, match=r"Blocks .* got list without start"):
        viz.states(selected, [0, 5, 9])

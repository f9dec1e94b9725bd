"""Wrong arguments of the public call get an error that helps, and nothing else."""

import numpy as np
import pytest
import torch

import moba_fast
import moba_ref

Q, K = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
GOOD = {"q": Q, "k": K, "v": K, "block_size": 2, "topk": 2}
SELECTED = moba_fast.moba_attention(**GOOD, return_aux=True)[2]


def edited(i, h, row):
    selected = SELECTED.clone()
    selected[i, h] = torch.tensor(row)
    return selected


WRONG = [
    ({"q": np.zeros((6, 4, 8))}, TypeError, "q must be a torch.Tensor, got ndarray"),
    ({"q": torch.zeros(1, 6, 4, 8)}, ValueError, r"\(1, 6, 4, 8\).*cu_seqlens"),
    ({"k": torch.zeros(6, 16)}, ValueError, r"k must be \(tokens, heads.*\(6, 16\)"),
    ({"k": K.bfloat16()}, TypeError, "'k': 'bfloat16'.*cast them"),
    ({"q": Q.int(), "k": K.int(), "v": K.int()}, TypeError, "float64, float32"),
    ({"v": torch.zeros(6, 1, 8)}, ValueError, r"one shape.*v \(6, 1, 8\)"),
    ({"q": torch.zeros(6, 4, 7)}, ValueError, r"same head dimension.*\(6, 4, 7\)"),
    (
        {"q": torch.zeros(6, 3, 8)},
        ValueError,
        "divide the query heads, got HK=2 and H=3",
    ),
    ({"q": torch.zeros(6, 0, 8)}, ValueError, "HK=2 and H=0"),
    ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ({"block_size": 2.0}, TypeError, r"block_size must be an int, got 2\.0"),
    ({"topk": 0}, ValueError, "topk must be at least 1, got 0; topk=1 reads"),
    ({"topk": True}, TypeError, "topk must be an int, got True"),
    ({"cu_seqlens": [0, 5]}, ValueError, "cu_seqlens must start at 0 and end .* 6"),
    ({"cu_seqlens": [1, 6]}, ValueError, "got 1 and 6"),
    ({"cu_seqlens": [0, 4, 3, 6]}, ValueError, "from 4 to 3 at sequence 1"),
    ({"cu_seqlens": [[0, 6]]}, ValueError, r"one-dimensional.*\(1, 2\)"),
    ({"cu_seqlens": [6]}, ValueError, "one-dimensional with B"),
    ({"cu_seqlens": [0.0, 6.0]}, TypeError, "cu_seqlens must hold integers"),
    ({"cu_seqlens_k": [0, 3, 6]}, ValueError, "same sequences, got 1 and 2"),
    (
        {"cu_seqlens": [0, 4, 6], "cu_seqlens_k": [0, 3, 6]},
        ValueError,
        "sequence 0 has 4 queries and 3 keys",
    ),
    (
        {"q": torch.zeros(3, 4, 8)},
        ValueError,
        "cu_seqlens_k must start .* 6; got 0 and 3",
    ),
    ({"backend": "gpu"}, ValueError, "unknown backend 'gpu': choose one of 'auto'"),
    ({"backend": "triton"}, ValueError, "backend 'triton' does not run here: "),
    ({"selected": SELECTED.float()}, TypeError, "integer tensor"),
    ({"selected": SELECTED[:5]}, ValueError, r"\(6, 4, 2\).*got \(5, 4, 2\)"),
    ({"selected": edited(1, 2, [1, 0])}, ValueError, "query 1, head 2"),
    ({"selected": edited(5, 0, [-1, 1])}, ValueError, "current block in its last"),
    ({"selected": edited(3, 1, [2, 1])}, ValueError, r"query 3, head 1.*\[2, 1\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        moba_fast.moba_attention(**{**GOOD, **change})


def test_the_arguments_before_the_change_are_right():
    assert moba_fast.moba_attention(**GOOD, selected=SELECTED).shape == Q.shape


def test_a_block_named_twice_is_wrong():
    _, _, selected = moba_fast.moba_attention(**{**GOOD, "topk": 3}, return_aux=True)
    selected[5, 0] = torch.tensor([1, 1, 2])
    with pytest.raises(ValueError, match="ascending"):
        moba_fast.moba_attention(**{**GOOD, "topk": 3}, selected=selected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((6, 4))}, r"expected q \(S, H, D\)"),
        ({"q": np.zeros((6, 3, 8))}, "2 key/value heads must divide the 3"),
        ({"topk": 0}, "topk counts the current block"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"cu_seqlens": [0, 5]}, "offsets end at 5 queries and 5 keys, but q has 6"),
        ({"q": np.zeros((3, 4, 8))}, "offsets end at 3 queries and 3 keys"),
        ({"selected": np.zeros((6, 4, 3), int)}, r"\(6, 4, 2\), got \(6, 4, 3\)"),
    ],
)
def test_the_reference_names_wrong_arguments_too(change, message):
    good = {**GOOD, **{name: np.asarray(GOOD[name]) for name in "qkv"}}
    with pytest.raises(ValueError, match=message):
        moba_ref.moba_attention(**{**good, **change})

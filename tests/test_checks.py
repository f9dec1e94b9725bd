"""Wrong arguments of the public call get an error that helps, and nothing else."""

import numpy as np
import pytest
import torch
from impls import IMPLS

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
    (
        {"k": K.bfloat16()},
        TypeError,
        "must share one dtype.*'k': 'bfloat16'.*cast them",
    ),
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
    ({"topk": np.True_}, TypeError, "topk must be an int, got .*True"),
    ({"topk": torch.tensor(True)}, TypeError, r"topk must be an int, got tensor\(True"),
    ({"block_size": np.float64(2)}, TypeError, "block_size must be an int, got"),
    (
        {"block_size": torch.tensor(2.0, requires_grad=True)},
        TypeError,
        "block_size must be an int, got tensor",
    ),
    ({"block_size": torch.tensor([2, 2])}, TypeError, "block_size must be an int"),
    ({"block_size": np.int64(0)}, ValueError, "block_size must be at least 1, got 0"),
    ({"workspace_bytes": "1"}, TypeError, "workspace_bytes must be an int, got '1'"),
    ({"cu_seqlens": [0, 5]}, ValueError, "cu_seqlens must start at 0 and end .* 6"),
    ({"cu_seqlens": [1, 6]}, ValueError, "got 1 and 6"),
    ({"cu_seqlens": [0, 4, 3, 6]}, ValueError, "from 4 to 3 at sequence 1"),
    ({"cu_seqlens": [[0, 6]]}, ValueError, r"one-dimensional.*\(1, 2\)"),
    ({"cu_seqlens": [6]}, ValueError, "one-dimensional with B"),
    ({"cu_seqlens": [0.0, 6.0]}, TypeError, "cu_seqlens must hold integers"),
    ({"cu_seqlens": [False, True]}, TypeError, "hold integers, got torch.bool"),
    # Modulo 2^32 these are 6, and 3 between 0 and 6.
    ({"cu_seqlens": [0, 2**32 + 6]}, ValueError, "tokens, 6; got 0 and 4294967302"),
    (
        {"cu_seqlens": torch.tensor([0, 2**32 + 3, 6])},
        ValueError,
        "goes from 4294967299 to 6 at sequence 1",
    ),
    ({"cu_seqlens_k": [0, 2**32 + 6]}, ValueError, "cu_seqlens_k must .* 4294967302"),
    ({"cu_seqlens": [0, 2**70]}, TypeError, "integers, got .*1180591620717411303424"),
    ({"cu_seqlens_k": [0, 3, 6]}, ValueError, "same sequences, got 1 and 2"),
    (
        {"cu_seqlens": [0, 4, 6], "cu_seqlens_k": [0, 3, 6]},
        ValueError,
        "sequence 0 has 4 queries and 3 keys",
    ),
    (
        {"q": torch.zeros(3, 4, 8)},
        ValueError,
        "cu_seqlens_k is None.* which end at 3, but k has 6 .*give cu_seqlens_k",
    ),
    (
        {"q": torch.zeros(3, 4, 8), "cu_seqlens": [0, 1, 3]},
        ValueError,
        "cu_seqlens_k is None.* which end at 3, but k has 6",
    ),
    # Heads first, with fewer key/value heads than query heads.
    (
        {
            "q": torch.zeros(4, 6, 8),
            "k": torch.zeros(2, 6, 8),
            "v": torch.zeros(2, 6, 8),
        },
        ValueError,
        r"axes must be \(tokens, heads, head dimension\)",
    ),
    ({"backend": "gpu"}, ValueError, "unknown backend 'gpu': choose one of 'auto'"),
    ({"backend": "flash"}, ValueError, "backend 'flash' does not run here: "),
    ({"selected": SELECTED.float()}, TypeError, "integer tensor"),
    ({"selected": SELECTED[:5]}, ValueError, r"\(6, 4, 2\).*got \(5, 4, 2\)"),
    ({"selected": edited(1, 2, [1, 0])}, ValueError, "query 1, head 2"),
    ({"selected": edited(5, 0, [-1, 1])}, ValueError, "current block in its last"),
    ({"selected": edited(3, 1, [2, 1])}, ValueError, r"query 3, head 1.*\[2, 1\]"),
]
INTEGERS = [np.int64, np.uint8, torch.tensor]
# Rows of topk=4 for query 5, which stands in block 2 and may read blocks 0 and 1.
WRONG_ROWS = [
    [1, 1, -1, 2],
    [1, 0, -1, 2],
    [-1, 0, 1, 2],
    [0, -1, 1, 2],
    [-2, -1, -1, 2],
    [0, 2, -1, 2],
    [0, 1, 3, 2],
    [0, 1, -1, 1],
    [0, 1, 2, -1],
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        moba_fast.moba_attention(**{**GOOD, **change})


def test_the_arguments_before_the_change_are_right():
    assert moba_fast.moba_attention(**GOOD, selected=SELECTED).shape == Q.shape


@pytest.mark.parametrize("integer", INTEGERS)
def test_sizes_may_be_any_integer(integer):
    sizes = {"block_size": integer(2), "topk": integer(2)}
    sizes["workspace_bytes"] = np.int64(2**20)
    assert moba_fast.moba_attention(**{**GOOD, **sizes}).shape == Q.shape


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize("row", WRONG_ROWS, ids=str)
def test_a_wrong_choice_is_named(impl, row):
    good = {**GOOD, **{name: impl.array(GOOD[name]) for name in "qkv"}, "topk": 4}
    selected = impl.moba_attention(**good, return_aux=True)[2]
    assert impl.moba_attention(**good, selected=selected).shape == Q.shape
    assert selected[5, 3].tolist() == [0, 1, -1, 2]
    selected[5, 3] = impl.array(row)
    with pytest.raises(ValueError, match=r"ascending .*, then -1") as error:
        impl.moba_attention(**good, selected=selected)
    assert "query 5, head 3 stands in block 2, may read" in str(error.value)
    assert f"past blocks [0, 1], and has {row}" in str(error.value)


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

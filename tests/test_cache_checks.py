"""Wrong arguments of the cache get an error that helps, and change nothing."""

import numpy as np
import pytest
import torch

from moba_fast import PagedKVCache

X, Q = torch.zeros(6, 2, 8), torch.zeros(6, 4, 8)
SIZES = {"block_size": 2, "kv_heads": 2, "head_dim": 8}


def filled():
    """Make two sequences of 5 and 3 tokens that own 3 and 2 pages."""
    cache = PagedKVCache(**SIZES, sequences=2)
    x = torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(0))
    cache.append(x, x, [0, 5, 8])
    return cache


def state(cache):
    return [*cache.gather(), cache.table.host.clone(), sorted(cache.pool.free)]


WRONG_SIZES = [
    ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ({"kv_heads": 2.0}, TypeError, "kv_heads must be an int, got 2.0"),
    ({"head_dim": -1}, ValueError, "head_dim must be at least 1, got -1"),
    ({"sequences": 0}, ValueError, "sequences must be at least 1, got 0"),
    ({"pages": 0}, ValueError, "pages must be at least 1, got 0"),
    ({"dtype": torch.int32}, TypeError, "dtype must be float64.*got torch.int32"),
    ({"dtype": "float32"}, TypeError, "dtype must be float64.*got float32"),
]
WRONG_APPENDS = [
    ({"k": np.zeros((6, 2, 8))}, TypeError, "k must be a torch.Tensor, got ndarray"),
    ({"v": X[None]}, ValueError, r"v must be \(tokens, 2, 8\).*got shape \(1, 6, 2, 8"),
    ({"k": X[:, :1]}, ValueError, r"k must be \(tokens, 2, 8\).*\(6, 1, 8\)"),
    ({"v": X[..., :7]}, ValueError, r"v must be \(tokens, 2, 8\).*\(6, 2, 7\)"),
    (
        {"k": X.bfloat16()},
        TypeError,
        "k must be torch.float32 as the cache, got .*bflo",
    ),
    ({"v": X.to("meta")}, ValueError, "v must be on cpu, got meta"),
    ({"v": X.clone().requires_grad_()}, ValueError, "v requires one.*no_grad"),
    ({"v": X[:5]}, ValueError, "as many tokens, got 6 and 5"),
    ({"k": X[:5], "v": X[:5]}, ValueError, "5 tokens are not a multiple of 2 sequen"),
    ({"cu_seqlens": [0, 3, 5]}, ValueError, "start at 0 and end .* 6; got 0 and 5"),
    ({"cu_seqlens": [0, 6]}, ValueError, "an offset more than .* sequences, 3; got 2"),
    ({"cu_seqlens": [0, 7, 6]}, ValueError, "never decrease.*from 7 to 6"),
    ({"cu_seqlens": [0.0, 3.0, 6.0]}, TypeError, "cu_seqlens must hold integers"),
    ({"cu_seqlens": [0, 3, 2**32 + 6]}, ValueError, "6; got 0 and 4294967302"),
]
ROWS = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2], [3, -1, 4]])[:, None]
SELECTED = ROWS[[1, 2, 3]].repeat(1, 4, 1).int()
WRONG_ATTENDS = [
    ({"q": np.zeros((2, 4, 8))}, TypeError, "q must be a torch.Tensor, got ndarray"),
    ({"q": Q[:2, 0]}, ValueError, r"q must be \(tokens, H, 8\).*got shape \(2, 8\)"),
    ({"q": Q[:2, :, :4]}, ValueError, r"q must be \(tokens, H, 8\).*\(2, 4, 4\)"),
    ({"q": Q[:2, :3]}, ValueError, "divide the query heads, got HK=2 and H=3"),
    ({"q": Q[:2, :0]}, ValueError, "divide the query heads, got HK=2 and H=0"),
    ({"q": Q[:2].double()}, TypeError, "q must be torch.float32 as the cache"),
    ({"q": Q[:2].clone().requires_grad_()}, ValueError, "q requires one"),
    ({"q": Q[:3]}, ValueError, "3 tokens are not a multiple of 2"),
    ({"cu_seqlens": [0, 1]}, ValueError, "cu_seqlens must start .* 2; got 0 and 1"),
    ({"cu_seqlens": [0, 1, 1, 2]}, ValueError, "sequences, 3; got 4"),
    (
        {"q": Q, "cu_seqlens": [0, 1, 6]},
        ValueError,
        "sequence 1 has 5 queries and 3 tokens; append the keys first",
    ),
    ({"topk": 0}, ValueError, "topk must be at least 1, got 0; topk=1 reads"),
    ({"topk": 2.0}, TypeError, r"topk must be an int, got 2\.0"),
    (
        {"topk": None, "selected": SELECTED},
        ValueError,
        "topk=None reads every block: give topk or no selected",
    ),
    (
        {"topk": 3, "selected": SELECTED},
        ValueError,
        r"selected must be .*\(2, 4, 3\).*got \(3, 4, 3\)",
    ),
    (
        {"topk": 3, "selected": SELECTED[:2]},
        ValueError,
        r"query 1, head 0 stands in block 4.*past blocks \[3\]",
    ),
    ({"topk": 3, "selected": SELECTED[1:].float()}, TypeError, "integer tensor"),
]
WRONG_CALLS = [
    ("crop", [np.int64(4)], ValueError, "from 0 to 3; got 4 at place 1"),
    ("crop", [[5]], ValueError, r"lengths must be a list .* 2 of them; got shape \(1,"),
    ("crop", [[5, 4]], ValueError, "from 0 to 3; got 4 at place 1"),
    ("crop", [[-1, 3]], ValueError, "from 0 to 5; got -1 at place 0"),
    ("crop", [4], ValueError, "from 0 to 3; got 4 at place 1"),
    ("crop", [[1.0, 2.0]], TypeError, "lengths must hold integers, got torch.float32"),
    ("crop", [True], TypeError, "lengths must hold integers, got torch.bool"),
    ("reorder", [[0, 2]], ValueError, "sequences, here from 0 to 1; got 2 at place 1"),
    ("reorder", [[-1]], ValueError, "from 0 to 1; got -1 at place 0"),
    ("reorder", [[[0, 1]]], ValueError, r"index must be a list .*shape \(1, 2\)"),
    ("reorder", [0], ValueError, r"index must be a list of sequences; got shape \(\)"),
    ("reorder", [[True, False]], TypeError, "index must hold integers, got torch.bool"),
    ("release", [[2]], ValueError, "sequences must be .* from 0 to 1; got 2"),
    ("add_sequences", [0], ValueError, "n must be at least 1, got 0"),
    ("blocks", [[]], TypeError, "cu_seqlens must hold integers"),
    ("blocks", [[0, 2]], ValueError, "sequences, 3; got 2"),
    ("blocks", [[0, 6, 6]], ValueError, "sequence 0 has 6 queries and 5 tokens"),
]
K_PAGES = torch.zeros(6, 2, 2, 8)
HANDED = {
    "k_pages": K_PAGES,
    "v_pages": K_PAGES.clone(),
    "page_table": [[4, 0, 2], [1, 3, -1]],
    "lengths": [5, 3],
}
WRONG_HAND_OVERS = [
    ({"k_pages": [1]}, TypeError, "k_pages must be a torch.Tensor, got list"),
    ({"k_pages": K_PAGES[0]}, ValueError, r"\(pages, block_size, HK, D\).*\(2, 2, 8\)"),
    ({"v_pages": K_PAGES[:5]}, ValueError, r"\(6, 2, 2, 8\) and \(5, 2, 2, 8\)"),
    ({"v_pages": K_PAGES.half()}, TypeError, "both be float64.*float16"),
    ({"k_pages": K_PAGES.int(), "v_pages": K_PAGES.int()}, TypeError, "torch.int32"),
    ({"v_pages": K_PAGES.to("meta")}, ValueError, "one device, got .*'meta'"),
    (
        {"k_pages": K_PAGES[:, :0], "v_pages": K_PAGES[:, :0]},
        ValueError,
        r"one shape; got \(6, 0, 2, 8\)",
    ),
    ({"k_mean": torch.zeros(5, 2, 8)}, ValueError, r"\(6, 2, 8\), got \(5, 2, 8\)"),
    ({"k_mean": torch.zeros(6, 2, 8).half()}, TypeError, "k_mean float32"),
    ({"k_mean": 1}, TypeError, "k_mean must be a torch.Tensor, got int"),
    ({"page_table": [4, 0]}, ValueError, r"\(sequences, pages.*got shape \(2,\)"),
    ({"page_table": [[0.0]]}, TypeError, "page_table must hold integers, got .*float"),
    ({"page_table": [[4, 0, 6], [1, 3, -1]]}, ValueError, r"0 to 5, .*row 0 is \[4, 0"),
    ({"page_table": [[4, 0, 2], [1, -1, 3]]}, ValueError, r"row 1 is \[1, -1, 3\]"),
    ({"page_table": [[4, 0, 2], [1, -2, -2]]}, ValueError, r"row 1 is \[1, -2, -2\]"),
    ({"page_table": [[4, 0, 4], [1, 3, -1]]}, ValueError, "different pages.*row 0"),
    ({"lengths": [5, 5]}, ValueError, "fit into the pages.* from 0 to 4; got 5 at pl"),
    ({"lengths": [5]}, ValueError, r"lengths must be a list .*2 of them; got shape"),
    ({"lengths": [5.0, 3.0]}, TypeError, "lengths must hold integers"),
    ({"free_pages": [6]}, ValueError, "free_pages must be pages, here from 0 to 5"),
    ({"free_pages": [5, 5]}, ValueError, r"named once.*got free_pages \[5, 5\]"),
    ({"free_pages": [4]}, ValueError, r"hold no other token; got free_pages \[4\]"),
    (
        {"page_table": [[4, 0, 2], [1, 3, 0]]},
        ValueError,
        r"named once .*\[0\] after the lengths",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_SIZES)
def test_wrong_sizes(change, error, message):
    with pytest.raises(error, match=message):
        PagedKVCache(**{**SIZES, **change})


@pytest.mark.parametrize(("change", "error", "message"), WRONG_APPENDS)
def test_wrong_appends(change, error, message):
    cache, before = filled(), state(filled())
    with pytest.raises(error, match=message):
        cache.append(**{"k": X, "v": X, **change})
    assert_unchanged(cache, before)


@pytest.mark.parametrize(("change", "error", "message"), WRONG_ATTENDS)
def test_wrong_attends(change, error, message):
    with pytest.raises(error, match=message):
        filled().attend(**{"q": Q[:2], "topk": 2, **change})


@pytest.mark.parametrize(("method", "arguments", "error", "message"), WRONG_CALLS)
def test_wrong_calls(method, arguments, error, message):
    cache, before = filled(), state(filled())
    with pytest.raises(error, match=message):
        getattr(cache, method)(*arguments)
    assert_unchanged(cache, before)


@pytest.mark.parametrize(("change", "error", "message"), WRONG_HAND_OVERS)
def test_wrong_hand_overs(change, error, message):
    with pytest.raises(error, match=message):
        PagedKVCache.from_pages(**{**HANDED, **change})


def assert_unchanged(cache, before):
    for a, b in zip(state(cache), before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_arguments_before_the_change_are_right():
    cache = filled()
    assert cache.attend(Q[:2], topk=3, selected=SELECTED[1:]).shape == (2, 4, 8)
    cache.append(X, X)
    assert cache.lengths.tolist() == [8, 6]
    assert PagedKVCache.from_pages(**HANDED).gather()[2].tolist() == [0, 5, 8]
    more = {"k_mean": torch.zeros(6, 2, 8), "free_pages": [5]}
    assert PagedKVCache.from_pages(**HANDED, **more).pool.free == [5]


def test_a_cache_without_sequences_says_what_it_needs():
    cache = filled()
    cache.release([0, 1])
    assert sorted(cache.pool.free) == list(range(len(cache.pool.k)))
    assert cache.attend(Q[:0], topk=2).shape == (0, 4, 8)
    with pytest.raises(ValueError, match="6 tokens are not a multiple of 0 sequences"):
        cache.append(X, X)
    cache.add_sequences()
    cache.append(X, X)
    assert cache.lengths.tolist() == [6]


def test_what_the_caller_passed_stays_theirs():
    cache, kept = filled(), torch.tensor([4, 2])
    cache.crop(kept)
    kept[0] = 99
    assert cache.lengths.tolist() == [4, 2]
    lengths, table = torch.tensor([5, 3]), torch.tensor(HANDED["page_table"])
    cache = PagedKVCache.from_pages(K_PAGES.clone(), K_PAGES.clone(), table, lengths)
    lengths[0], table[0, 0] = 1, 1
    assert cache.lengths.tolist() == [5, 3]
    assert cache.table.host[0, 0] == 4


@pytest.mark.parametrize("integer", [np.int64, torch.tensor])
def test_sizes_may_be_any_integer(integer):
    sizes = {name: integer(size) for name, size in SIZES.items()}
    cache = PagedKVCache(**sizes, sequences=integer(2), pages=integer(4))
    cache.add_sequences(integer(1))
    x = torch.ones(6, 2, 8)
    cache.append(x, x, [0, 3, 6, 6])
    assert cache.attend(Q, topk=integer(2), cu_seqlens=[0, 3, 6, 6]).shape == Q.shape
    cache.crop(integer(0))
    assert cache.lengths.tolist() == [0, 0, 0]
    assert len(cache.pool.k) == 4
    assert all(type(n) is int for n in cache.pool.k.shape)

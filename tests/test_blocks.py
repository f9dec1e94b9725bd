"""partition: blocks tile every sequence, and every query knows its block."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from impls import FAST, IMPLS, REF, cases

import moba_ref
from moba_lab.agree import agree

FIELDS = ("cu_seqlens", "cu_blocks", "start", "end", "of_token")
QUERY_FIELDS = ("position", "of_query", "first_of_query")


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_pack_with_tails(impl):
    blocks = impl.partition([0, 9, 15, 25], block_size=4)
    assert blocks.start.tolist() == [0, 4, 8, 9, 13, 15, 19, 23]
    assert blocks.end.tolist() == [4, 8, 9, 13, 15, 19, 23, 25]
    assert blocks.cu_blocks.tolist() == [0, 3, 5, 8]
    assert blocks.of_token.tolist() == [0] * 4 + [1] * 4 + [2] + [3] * 4 + [4] * 2 + [
        *[5] * 4,
        *[6] * 4,
        *[7] * 2,
    ]
    assert blocks.position.tolist() == list(range(25))


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_queries_are_the_last_tokens(impl):
    blocks = impl.partition([0, 9, 15], 4, cu_seqlens_q=[0, 2, 3])
    assert blocks.position.tolist() == [7, 8, 14]
    assert blocks.of_query.tolist() == [1, 2, 4]
    assert blocks.first_of_query.tolist() == [0, 0, 3]


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize("cu_seqlens", [[0, 0], [0, 0, 3, 3], [0, 5, 5, 5, 6]])
def test_empty_sequences_own_no_block(impl, cu_seqlens):
    blocks = impl.partition(cu_seqlens, block_size=2)
    n_blocks = [-(-(b - a) // 2) for a, b in pairwise(cu_seqlens)]
    assert np.diff(blocks.cu_blocks).tolist() == n_blocks
    assert len(blocks.of_token) == cu_seqlens[-1]


@given(cases())
def test_blocks_tile_the_tokens(case):
    blocks = case.partition(REF)
    tiled = [
        t for a, b in zip(blocks.start, blocks.end, strict=True) for t in range(a, b)
    ]
    assert tiled == list(range(case.cu_seqlens_k[-1]))
    assert ((blocks.end - blocks.start) <= case.block_size).all()
    # Only the last block of a sequence may be short.
    short = np.flatnonzero(blocks.end - blocks.start < case.block_size)
    assert set(short + 1) <= set(blocks.cu_blocks.tolist())
    assert (blocks.first_of_query <= blocks.of_query).all()


@given(cases())
def test_twins_agree(case):
    fast, ref = case.partition(FAST), case.partition(REF)
    for field in FIELDS + QUERY_FIELDS:
        agree(getattr(fast, field), getattr(ref, field), field)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 4], 0), "block_size must be at least 1"),
        (([1, 4], 2), "must start at 0"),
        (([0, 4, 3], 2), "never decrease"),
        (([0], 2), "at least two integers"),
        (([0.0, 4.0], 2), "at least two integers"),
        (([0, 4], 2, [0, 5]), "sequence 0 has 5 queries and 4 keys"),
        (([0, 4], 2, [0, 1, 4]), "same number of sequences"),
    ],
)
def test_reference_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        moba_ref.partition(*arguments)


@pytest.mark.parametrize(("first", "last"), [(0, 12), (0, 5), (4, 9), (7, 7)])
def test_queries_of_blocks_are_counted_in_a_share(first, last):
    whole = FAST.partition([0, 9, 15], 4, cu_seqlens_q=[0, 8, 12])
    blocks = whole.of_queries(first, last)
    assert (blocks is whole) == ((first, last) == (0, 12))
    position, starts = blocks.position.tolist(), whole.start.tolist()
    expected = [sum(p < start for p in position) for start in [*starts, 15]]
    assert blocks.cu_queries.tolist() == expected
    assert blocks.cu_queries is blocks.cu_queries

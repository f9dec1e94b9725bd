"""The explorer says what the reference says, under every setting."""

import numpy as np
import pytest
from traitlets import TraitError

import moba_ref
from moba_lab.example import running_example
from moba_lab.explorer import BlockExplorer


def explore(packed=False, **settings):
    e = running_example(packed=packed)
    return BlockExplorer(
        e.q,
        e.k,
        e.v,
        cu_seqlens=e.cu_seqlens,
        **{"block_size": 4, "topk": 3, **settings},
    )


def reference(explorer, packed=False):
    """Return selected, scores and shares (N,) of the query that is shown."""
    e, query, head = running_example(packed=packed), explorer.query, explorer.head
    where = {"block_size": explorer.block_size, "topk": explorer.topk}
    where["cu_seqlens"] = e.cu_seqlens
    selected = moba_ref.moba_attention(e.q, e.k, e.v, **where, return_aux=True)[2]
    blocks = moba_ref.partition(e.cu_seqlens, explorer.block_size)
    scores = moba_ref.gate_scores(e.q, moba_ref.pool_keys(e.k, blocks), blocks)
    # The value of every key is the number of its block, one block at a time.
    reads = np.eye(len(blocks.start))[blocks.of_token][:, None]
    shares = [
        moba_ref.moba_attention_definition(
            e.q, e.k, np.broadcast_to(reads[..., n : n + 1], e.k.shape), **where
        )[query, head, 0]
        for n in range(len(blocks.start))
    ]
    return selected[query, head], scores[query, head], np.array(shares)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("changes", [{}, {"topk": 2, "query": 9}, {"block_size": 5}])
def test_what_is_shown_is_what_the_reference_says(packed, changes):
    explorer = explore(packed, head=1)
    for name, value in changes.items():
        setattr(explorer, name, value)
    selected, scores, shares = reference(explorer, packed)
    rows = {row["block"]: row for row in explorer.detail["rows"]}
    assert [n for n in rows if rows[n]["share"] > 0] == selected[selected >= 0].tolist()
    for n, row in rows.items():
        assert row["share"] == pytest.approx(shares[n], abs=1e-12)
        assert row["score"] is None or row["score"] == pytest.approx(scores[n])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"topk": 0}, "topk must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"head": 2}, "head must be 0 to 1, got 2"),
        ({"query": 32}, "query must be 0 to 31, got 32"),
    ],
)
def test_a_bad_setting_is_refused_and_loses_nothing(change, said):
    explorer = explore()
    before = {name: getattr(explorer, name) for name in (*change, "detail")}
    [(name, value)] = change.items()
    with pytest.raises(TraitError, match=said):
        setattr(explorer, name, value)
    assert {name: getattr(explorer, name) for name in before} == before
    with pytest.raises((ValueError, IndexError), match=said):
        explore(**change)

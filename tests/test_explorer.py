"""The explorer says what the reference says, under every setting."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from impls import cases, make_case
from pictures import scene
from PIL import Image
from traitlets import TraitError

import moba_ref
from moba_lab.example import running_example
from moba_lab.explorer import BlockExplorer, block_shares
from moba_lab.explorer.call import Call
from moba_lab.model import Config, Model
from moba_lab.notebooks.clean import WIDGET
from moba_lab.viz import State, block_weights, states

ROOT = Path(__file__).parent.parent
PACK = make_case([9, 0, 14], block_size=4, topk=3, H=4, HK=2, seed=5)


@given(cases(decoding=False))
def test_shares_are_the_weights_with_which_the_reference_merges(case):
    assume(len(case.q))
    options = (case.cu_seqlens, case.block_size, case.topk)
    ref = scene(case.q, case.k, case.v, *options)
    for head in range(case.q.shape[1]):
        lse = (ref.lse_current, ref.lse_past, ref.routing)
        expected = block_weights(*lse, ref.blocks, head)
        for query in range(len(case.q)):
            where = (ref.blocks, query, head)
            found = block_shares(case.q, case.k, ref.selected, *where)
            assert found == pytest.approx(expected[query], abs=1e-9)


def test_shares_of_the_last_queries_of_longer_keys():
    case = make_case([11, 6], queries=[2, 3], block_size=4, topk=2, seed=1)
    blocks = case.partition(moba_ref)
    _, lse, selected = moba_ref.moba_attention(
        case.q, case.k, case.v, **case.options, return_aux=True
    )
    mask = moba_ref.token_mask(case.q, case.k, **case.options)
    for query in range(5):
        logits = np.where(mask[query, 1], case.k[:, 0] @ case.q[query, 1] / 2, -np.inf)
        weights = np.exp(logits - lse[query, 1])
        expected = np.bincount(blocks.of_token, weights, minlength=len(blocks.start))
        found = block_shares(case.q, case.k, selected, blocks, query, head=1)
        assert found == pytest.approx(expected)


def test_the_scale_of_the_softmax_counts():
    q = k = np.arange(6.0).reshape(6, 1, 1)
    blocks = moba_ref.partition([0, 6], block_size=2)
    selected = np.array([[[-1, 0]]] * 4 + [[[0, 2]]] * 2)
    even = block_shares(q, k, selected, blocks, 4, softmax_scale=0.0)
    assert even == pytest.approx([2 / 3, 0, 1 / 3])
    assert block_shares(q, k, selected, blocks, 4)[2] > 0.99
    explorer = BlockExplorer(q, k, k, block_size=2, topk=2, query=5, softmax_scale=0.0)
    assert explorer.detail["rows"][-2]["share"] == 0.5


def test_large_scores_do_not_overflow():
    q, k, _ = np.random.default_rng(0).normal(size=(3, 6, 1, 4))
    blocks = moba_ref.partition([0, 6], block_size=2)
    selected = np.array([[[-1, 0]]] * 2 + [[[0, 1]]] * 2 + [[[0, 2]]] * 2)
    for scale in (1e4, -1e4):
        shares = block_shares(q, k, selected, blocks, 5, softmax_scale=scale)
        assert sorted(shares) == pytest.approx([0, 0, 1])


def explore(case=PACK, **settings):
    chosen = {"block_size": case.block_size, "topk": case.topk, **settings}
    return BlockExplorer(case.q, case.k, case.v, cu_seqlens=case.cu_seqlens, **chosen)


def check_against_reference(explorer, case=PACK):
    """Assert that the map and the shown query are those of the reference."""
    chosen = {"block_size": explorer.block_size, "topk": explorer.topk}
    ref = scene(case.q, case.k, case.v, case.cu_seqlens, **chosen)
    head, query = explorer.head, explorer.query
    cells = states(ref.selected, ref.blocks)[:, head]
    shape = (explorer.picture["queries"], explorer.picture["blocks"])
    shown = np.frombuffer(explorer.picture["cells"], dtype=np.uint8).reshape(shape)
    np.testing.assert_array_equal(shown, cells)
    lse = (ref.lse_current, ref.lse_past, ref.routing)
    weights = block_weights(*lse, ref.blocks, head)[query]
    scores = ref.scores[query, head]
    *read, left_out = explorer.detail["rows"]
    if left_out["state"] != State.PAST:
        read.append(left_out)
    else:
        rest = np.where(cells[query] == State.PAST, scores, -np.inf)
        assert left_out["block"] == rest.argmax()
        assert left_out["score"] == pytest.approx(rest.max())
        assert left_out["share"] == 0
    blocks = [n for n in ref.selected[query, head].tolist() if n >= 0]
    assert [row["block"] for row in read] == blocks
    assert [row["share"] for row in read] == pytest.approx(weights[blocks])
    *past, own = [row["score"] for row in read]
    assert past == pytest.approx(scores[blocks[:-1]])
    assert own is None


@pytest.mark.parametrize("head", range(4))
@pytest.mark.parametrize("query", [0, 8, 9, 22])
def test_every_head_and_sequence_as_in_the_reference(head, query):
    check_against_reference(explore(head=head, query=query))


CHANGES = [
    {"topk": 1},
    {"topk": 2, "query": 21},
    {"topk": 9},
    {"block_size": 1},
    {"block_size": 5, "head": 3},
    {"block_size": 100},
    {"head": 2, "query": 15, "topk": 4},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_setting_is_recomputed(changes):
    explorer = explore(query=20)
    for name, value in changes.items():
        setattr(explorer, name, value)
    check_against_reference(explorer)


def test_settings_that_a_page_sends_together_are_taken_together():
    explorer = explore(query=20)
    explorer.set_state({"topk": 2, "block_size": 3, "head": 1, "query": 17})
    assert explorer.detail["query"] == 17
    check_against_reference(explorer)


def test_tensors_give_what_arrays_give():
    q, k, v = (torch.tensor(x, requires_grad=True) for x in (PACK.q, PACK.k, PACK.v))
    chosen = {"block_size": 4, "topk": 3, "query": 22}
    offsets = torch.tensor(PACK.cu_seqlens, dtype=torch.int32)
    explorer = BlockExplorer(q, k, v, cu_seqlens=offsets, **chosen)
    assert explorer.detail == explore(query=22).detail
    half = [x.detach().bfloat16() for x in (q, k, v)]
    explorer = BlockExplorer(*half, cu_seqlens=offsets, **chosen)
    rounded = [x.double().numpy() for x in half]
    case = PACK.replace(**dict(zip("qkv", rounded, strict=True)))
    for row, expected in zip(
        explorer.detail["rows"], explore(case, query=22).detail["rows"], strict=True
    ):
        assert row["block"] == expected["block"]
        assert row["share"] == pytest.approx(expected["share"], abs=1e-6)


def test_it_begins_with_the_query_that_looks_back_farthest():
    e = running_example()
    explorer = BlockExplorer(e.q, e.k, e.v, block_size=4, topk=3)
    cells = np.frombuffer(explorer.picture["cells"], np.uint8).reshape(32, 8)
    reach = [
        (row == State.CURRENT).argmax() - (row >= State.SELECTED).argmax()
        for row in cells
    ]
    assert reach[explorer.query] == max(reach)


def test_text_goes_up_to_the_byte_of_the_query():
    text = b"first one\nsecond sequen\n"[:23]
    explorer = explore(text=text, query=20, head=1)
    for row in explorer.detail["rows"]:
        a, b = row["first"], row["last"]
        assert row["text"] == text[a : b + 1].decode().replace("\n", "↵")
        assert b <= 20
    own = explorer.detail["rows"][explorer.topk - 1]
    assert own["state"] == State.CURRENT
    assert own["text"][-1] == chr(text[20])
    assert all(row["text"] is None for row in explore().detail["rows"])


@pytest.fixture(scope="module")
def layers():
    """Run a small model with a MoBA layer and a full one on two texts."""
    torch.manual_seed(0)
    shape = {"width": 32, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8}
    model = Model(Config(**shape, block_size=8, topk=3, attention=("moba", "full")))
    tokens = torch.randint(32, 127, (90,))
    with torch.no_grad():
        _, aux = model(tokens, torch.tensor([0, 37, 90], dtype=torch.int32), True)
    return tokens.to(torch.uint8), aux


@pytest.mark.parametrize(("head", "query"), [(0, 36), (3, 89)])
def test_a_layer_shows_what_it_read(layers, head, query):
    tokens, (aux, _) = layers
    explorer = BlockExplorer.of_layer(aux, tokens, head=head, query=query)
    assert (explorer.block_size, explorer.topk) == (8, 3)
    rows = [row for row in explorer.detail["rows"] if row["state"] != State.PAST]
    assert [row["block"] for row in rows] == aux.selected[query, head].tolist()
    weights = aux.weights(query)[head].double()
    of_token = torch.as_tensor(aux.blocks.of_token)
    for row in rows:
        share = weights[of_token == row["block"]].sum().item()
        assert row["share"] == pytest.approx(share, abs=1e-6)
    assert rows[-1]["text"][-1] == chr(tokens[query])


def test_a_full_layer_needs_to_be_told_what_to_choose(layers):
    _, (_, full) = layers
    with pytest.raises(ValueError, match="this layer attends in full"):
        BlockExplorer.of_layer(full)
    explorer = BlockExplorer.of_layer(full, topk=2, query=89)
    assert len([r for r in explorer.detail["rows"] if r["state"] != State.PAST]) == 2


BAD_SETTINGS = [
    ({"topk": 0}, ValueError, "topk must be at least 1, got 0"),
    ({"block_size": -1}, ValueError, "block_size must be at least 1, got -1"),
    ({"head": 4}, IndexError, "head must be 0 to 3, got 4"),
    ({"query": 23}, IndexError, "query must be 0 to 22, got 23"),
]


@pytest.mark.parametrize(("change", "error", "said"), BAD_SETTINGS)
def test_a_bad_setting_is_refused_and_loses_nothing(change, error, said):
    with pytest.raises(error, match=said):
        explore(**change)
    explorer = explore(query=20)
    kept = ("block_size", "topk", "head", "query", "detail", "picture")
    before = {name: getattr(explorer, name) for name in kept}
    [(name, value)] = change.items()
    with pytest.raises(TraitError, match=said):
        setattr(explorer, name, value)
    assert {name: getattr(explorer, name) for name in kept} == before


def test_settings_must_be_integers():
    with pytest.raises(TypeError, match=r"topk must be an integer, got 2\.0"):
        explore(topk=2.0)
    assert explore(query=np.int64(7)).query == 7


ZEROS = np.zeros((6, 2, 4))
BAD_CALLS = [
    ({"k": ZEROS[:5]}, ValueError, r"got q \(6, 2, 4\), k \(5, 2, 4\)"),
    ({"q": ZEROS[0]}, ValueError, r"got q \(2, 4\)"),
    ({"q": np.zeros((6, 3, 4))}, ValueError, "where HK divides H"),
    ({"v": np.zeros((6, 2, 3))}, ValueError, r"v \(6, 2, 3\)"),
    (dict.fromkeys("qkv", ZEROS[:0]), ValueError, "none is empty"),
    ({"cu_seqlens": [0, 5]}, ValueError, "must end at the 6 tokens, got 5"),
    ({"cu_seqlens": [0, 5, 4, 6]}, ValueError, "never decrease"),
    ({"text": b"seven b"}, ValueError, "text must hold 6 bytes"),
    ({"text": "string"}, TypeError, "use text.encode()"),
]


@pytest.mark.parametrize(("change", "error", "said"), BAD_CALLS)
def test_a_bad_call_is_refused(change, error, said):
    arguments = dict.fromkeys("qkv", ZEROS) | change
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(error, match=said):
        BlockExplorer(q, k, v, block_size=2, topk=2, **arguments)


def test_what_no_page_can_draw_is_refused():
    x = np.zeros((2**14, 1, 1), dtype=np.float32)
    with pytest.raises(ValueError, match="at most 16,384 queries"):
        Call(*[np.concatenate([x, x])] * 3)
    call = Call(x, x, x)
    call.check(block_size=64, topk=1, head=0, query=0)
    with pytest.raises(ValueError, match=r"block_size=63 make 4,276,224 cells"):
        call.check(block_size=63, topk=1, head=0, query=0)


@pytest.mark.parametrize(
    ("lengths", "block_size", "expected"),
    [
        ([6, 3], 4, [1, 2, 3, 4, 5, 6]),
        ([6], 9, [1, 2, 3, 4, 5, 6, 9]),
        ([1000], 48, [8, 16, 32, 48, 64, 128, 256, 512, 1024]),
        ([100] * 10, 32, [16, 32, 64, 128]),
    ],
)
def test_sizes_to_choose_from(lengths, block_size, expected):
    x = np.zeros((sum(lengths), 1, 1))
    call = Call(x, x, x, cu_seqlens=np.cumsum([0, *lengths]))
    assert call.sizes(block_size) == expected


def test_infinite_and_missing_numbers_reach_the_page_as_none():
    q, k, v = np.random.default_rng(0).normal(size=(3, 8, 1, 2))
    k[1] = np.nan
    explorer = BlockExplorer(q, k, v, block_size=2, topk=9, query=7)
    assert [row["score"] is None for row in explorer.detail["rows"]] == [
        True,
        False,
        False,
        True,
    ]
    assert all(row["share"] is None for row in explorer.detail["rows"])
    assert "none" in explorer.figure().axes[1].texts[0].get_text()


def test_the_picture_carries_the_sentence_and_the_widget():
    explorer = explore(query=20, text=bytes(range(65, 88)))
    data, metadata = explorer._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain", WIDGET}
    sentence = explorer.detail["sentence"].removeprefix("What to see: ")
    assert data["text/plain"].endswith(sentence)
    assert metadata["image/png"]["alt"] == data["text/plain"]
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert image.size == (metadata["image/png"]["width"], 480)
    assert len(data["image/png"]) < 60_000


def test_the_figure_shows_the_shares_and_the_text():
    explorer = explore(query=20, head=1, text=bytes(range(65, 88)))
    left, right = explorer.figure().axes
    rows = explorer.detail["rows"]
    assert [bar.get_width() for bar in right.patches] == pytest.approx(
        [row["share"] for row in rows if row["share"]]
    )
    ticks = [label.get_text() for label in right.get_yticklabels()]
    assert ticks == [str(row["block"]) for row in rows]
    written = "".join(text.get_text() for text in right.texts)
    assert all(row["text"] in written for row in rows)
    assert left.get_title() == "head 1, topk=3"


def test_the_figure_keeps_the_largest_of_many_shares():
    explorer = explore(block_size=1, topk=14, query=22, head=0)
    bars = [bar.get_width() for bar in explorer.figure().axes[1].patches]
    shares = sorted(row["share"] for row in explorer.detail["rows"])
    assert sorted(bars) == pytest.approx(shares[-8:])


WITHOUT_ANYWIDGET = """
import sys, warnings
sys.modules["anywidget"] = None
from moba_lab.example import running_example
from moba_lab.explorer import BlockExplorer
e = running_example()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    explorer = BlockExplorer(e.q, e.k, e.v, block_size=4, topk=3, query=22)
explorer.topk = 2
print(sorted(explorer._repr_mimebundle_()[0]), explorer.detail["sentence"])
print(said[0].message)
"""


def test_without_anywidget_it_is_a_picture():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_ANYWIDGET],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines() == [
        "['image/png', 'text/plain'] "
        "What to see: query 22 reads block 1 and its own, 5.",
        "anywidget is not installed, so the explorer is a still picture; "
        "pip install anywidget",
    ], result.stderr

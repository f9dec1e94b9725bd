"""Backend "triton" through the public call, in Triton's interpreter without a GPU."""

import re
import weakref

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here")

import moba_fast
from moba_fast import fused, workspace
from moba_fast.blocks import lay_out_once
from moba_fast.kernels import route
from moba_fast.workspace import fused_parts
from moba_lab.check_cases import Case, Target, check_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = Target(DEVICE, "triton", "triton", ("float32", "float16"))
# Room for some of 70 queries of one key/value head, forward and backward.
LIMIT = 20_000
CASES = [
    Case("grouped heads", (70,), 16, 3, H=4, HK=2, D=16),
    Case("pack with empty sequences", (50, 0, 3, 32), 16, 3, HK=2, D=20),
    Case("last queries", (70, 33, 16), 16, 3, HK=2, D=16, queries=(13, 33, 1)),
    Case("topk of 1", (70,), 32, 1, D=16),
]


def draw(n, heads, heads_k, D=16):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, heads_k, heads_k)
    return [torch.randn(n, h, D, generator=generator).to(DEVICE) for h in shapes]


@pytest.mark.parametrize("dtype", TRITON.dtypes)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_agrees_with_the_reference(case, dtype):
    for check in check_case(TRITON, case, dtype):
        assert check.ok, check


def test_shares_of_a_call_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(workspace, "FEWEST_QUERIES", 8)
    q, k, v = draw(70, 4, 2)
    for backward in (False, True):
        parts = fused_parts(q, k, 16, 3, LIMIT, backward)
        assert len(parts) == 2
        assert all(len(part.queries) > 1 for part in parts)
    results = []
    for workspace_bytes in (2**31, LIMIT):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        options = {"backend": "triton", "workspace_bytes": workspace_bytes}
        out = moba_fast.moba_attention(*leaves, block_size=16, topk=3, **options)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for name, whole, divided in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        # dk and dv of two shares are added to each other.
        exact = name in ("out", "dq")
        difference = (whole - divided).abs().max().item()
        assert difference <= (0 if exact else 1e-5), name


def test_a_workspace_that_is_too_small_says_what_is_needed():
    q, k, _ = draw(300, 2, 1)
    with pytest.raises(ValueError, match=r"^workspace_bytes=1000 is too") as error:
        fused_parts(q, k, 32, 3, limit=1000)
    needed = int(re.search(r"needs (\d+) bytes", str(error.value))[1])
    assert len(fused_parts(q, k, 32, 3, needed)) == 1
    with pytest.raises(ValueError, match="raise workspace_bytes to that or more"):
        fused_parts(q, k, 32, 3, needed - 8)


def test_results_of_a_share_are_gone_before_the_next_one(monkeypatch):
    alive, original = [], fused.attend_past

    def watched(*arguments):
        assert all(x() is None for x in alive)
        results = original(*arguments)
        alive.extend(weakref.ref(x) for x in results)
        return results

    monkeypatch.setattr(fused, "attend_past", watched)
    monkeypatch.setattr(workspace, "FEWEST_QUERIES", 8)
    q, k, v = draw(70, 4, 2)
    options = {"backend": "triton", "workspace_bytes": LIMIT}
    moba_fast.moba_attention(q, k, v, block_size=16, topk=3, **options)
    shares = sum(len(part.queries) for part in fused_parts(q, k, 16, 3, LIMIT))
    assert len(alive) == 2 * shares > 4


@pytest.mark.parametrize("limit", [2**12, 2**16, 2**20])
def test_counters_stay_within_their_share(limit, monkeypatch):
    sizes, original = [], route.query_chunks

    def watched(n_queries, heads, n_blocks, most):
        chunks = original(n_queries, heads, n_blocks, most)
        sizes.append((8 * heads * n_blocks * chunks, 8 * heads * n_blocks))
        return chunks

    monkeypatch.setattr(route, "query_chunks", watched)
    q, k, v = draw(900, 2, 1)
    q, blocks = q[-300:], moba_fast.partition([0, 900], 30, [0, 300])
    selected = fused.select(q, k, blocks, 3)
    monkeypatch.setattr(fused, "attend_past", lambda *_: (None, None))
    monkeypatch.setattr(fused, "attend_current", lambda *_: None)
    monkeypatch.setattr(fused, "fused_parts", one_part)
    fused.attend(q, k, v, selected, blocks, 1.0, limit)
    [(taken, fewest)] = sizes
    assert taken <= max(limit // 8, fewest)


def one_part(q, *_):
    everything = slice(None)
    return [workspace.Part(everything, everything, [(0, len(q))])]


def test_blocks_are_laid_out_once_for_layers_alike():
    device = torch.device(DEVICE)
    offsets = (0, 9, 20), (0, 9, 20)
    first = lay_out_once(*offsets, 4, device)
    assert lay_out_once((0, 9, 20), (0, 9, 20), 4, device) is first
    for others in (((0, 9, 20), (0, 8, 19)), ((0, 8, 20), (0, 8, 20))):
        other = lay_out_once(*others, 4, device)
        assert other is not first
        assert torch.equal(other.offsets[0], torch.tensor(others[0]))
    assert lay_out_once(*offsets, 5, device).block_size == 5

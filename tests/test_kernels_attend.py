"""attend_past and attend_current of the kernels: the reference's numbers, any input."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from impls import REF, make_case
from kernel_cases import CASES as SHARED_CASES

import moba_fast
from moba_fast.attend import past_lists
from moba_lab.agree import agree, plain_attention

pytest.importorskip("triton", reason="triton is not here")

from moba_fast.kernels import attend, combine, tiles, tilings
from moba_fast.route import Lists

# Rows of zero weights and of NaN, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
SCALE = 0.3


def rounded(case, dtype):
    """Return the case with q, k and v as a dtype holds them."""
    names = ("q", "k", "v")
    values = [torch.tensor(getattr(case, n)).to(dtype).double().numpy() for n in names]
    return case.replace(**dict(zip(names, values, strict=True)))


def tensors_of(case, dtype, selected=None):
    """Return q, k, v, selected and blocks; the reference chooses unless it is given."""
    if selected is None:
        selected = case.run(REF, softmax_scale=SCALE)[2]
    tensors = [torch.tensor(x).to(DEVICE, dtype) for x in (case.q, case.k, case.v)]
    cu = [torch.tensor(x, device=DEVICE) for x in (case.cu_seqlens_k, case.cu_seqlens)]
    selected = torch.as_tensor(selected).to(DEVICE, torch.int32)
    return *tensors, selected, moba_fast.partition(cu[0], case.block_size, cu[1])


def lists_of(selected, blocks, k):
    """Build Lists without a kernel; padding is no valid pair."""
    heads, slots = selected.shape[1], selected.shape[2] - 1
    routing = moba_fast.route(selected, blocks)
    lists = past_lists(routing, blocks, selected, k, "aten")
    places = routing.place if lists.pairs is None else routing.place[lists.pairs]
    pairs = places.new_full((len(selected) * heads * slots,), -(2**31)).int()
    pairs[: len(places)] = places.int()
    return Lists(pairs, lists.pack.cu_q.int(), slots)


def attend_lists(q, k, v, selected, blocks):
    """Return out_past and lse_past with NaN in the rows of no pair, and the lists."""
    lists = lists_of(selected, blocks, k)
    past = attend.attend_past(q, k, v, lists, blocks, SCALE)
    idle = torch.ones(len(lists.pairs), dtype=torch.bool, device=DEVICE)
    idle[lists.pairs[: lists.cu_pairs[-1]].long()] = False
    for x in past:
        x[idle] = torch.nan
    return *past, lists


def run(q, k, v, selected, blocks, out=None, lse=None):
    """Return out and lse of both kernels; what they do not write is NaN."""
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[:2], device=DEVICE) if lse is None else lse
    out.fill_(torch.nan)
    lse.fill_(torch.nan)
    out_past, lse_past, _ = attend_lists(q, k, v, selected, blocks)
    combine.attend_current(
        *(q, k, v, out_past, lse_past, selected, blocks, SCALE, out, lse)
    )
    return out, lse


def check(case, dtype=torch.float32, selected=None):
    """Compare with the reference, which is given the same choice."""
    case = rounded(case, dtype)
    tensors = tensors_of(case, dtype, selected)
    chosen = tensors[3].cpu().numpy()
    wanted = case.run(REF, softmax_scale=SCALE, selected=chosen)
    plain = plain_attention(*tensors, SCALE)
    for name, a, b, c in zip(
        ("out", "lse"), run(*tensors), wanted, plain, strict=False
    ):
        agree(a, b, name, plain=c)


def draw_choice(case, seed=0):
    """Choose past blocks at random, any number of them, in the form of selected."""
    rng, blocks = np.random.default_rng(seed), case.partition(REF)
    selected = np.full((*case.q.shape[:2], case.topk), -1)
    for i, heads in enumerate(selected):
        past = np.arange(blocks.first_of_query[i], blocks.of_query[i])
        for row in heads:
            count = rng.integers(0, min(len(past), case.topk - 1), endpoint=True)
            row[:count] = np.sort(rng.choice(past, count, replace=False))
            row[-1] = blocks.of_query[i]
    return selected


CASES = SHARED_CASES | {
    "decoding": make_case([50, 3, 70], queries=[1] * 3, block_size=8, topk=3),
    "blocks of 1": make_case([24], block_size=1, topk=4, HK=2, D=5),
    "blocks of 3": make_case([20, 7], block_size=3, topk=4, HK=2, D=16),
    "blocks of 128": make_case([300], queries=[70], block_size=128, topk=2, D=64),
    "blocks of 256": make_case([530], queries=[70], block_size=256, topk=2, D=128),
    "blocks of 200": make_case([410], queries=[70], block_size=200, topk=2, D=24),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("n_blocks", [33, 100, 1000])
def test_many_blocks(n_blocks):
    block_size = 2 if n_blocks < 1000 else 1
    lengths = [n_blocks * block_size - block_size // 2]
    queries = [20]
    case = make_case(lengths, queries=queries, block_size=block_size, topk=5)
    check(case, selected=draw_choice(case))


@pytest.mark.parametrize("name", ["a pack", "blocks of 100", "blocks of 200"])
def test_parts_are_those_of_the_reference(name):
    case = rounded(CASES[name], torch.float32)
    *tensors, selected, blocks = tensors_of(case, torch.float32)
    out, lse, lists = attend_lists(*tensors, selected, blocks)
    ref = case.partition(REF)
    routing = REF.route(selected.cpu().numpy(), ref)
    wanted = REF.attend_past(case.q, case.k, case.v, routing, ref, SCALE)
    head = routing.entry // len(ref.start)
    pair = (routing.query * case.q.shape[1] + head) * lists.slots + routing.slot
    assert len(pair) == lists.cu_pairs[-1] > 30
    agree(out[pair], wanted[0], "out_past")
    agree(lse[pair], wanted[1], "lse_past")


def test_a_list_may_need_many_programs(monkeypatch):
    monkeypatch.setattr(tilings, "PAIRS", 32)
    case = make_case([120], block_size=16, topk=2, H=4, HK=2)
    selected = np.zeros((120, 4, 2), int)
    selected[..., 1] = np.arange(120)[:, None] // 16
    selected[:16, :, 0] = -1
    tiling = tilings.attend_tiling(torch.float32, 4, 16, "hopper")
    assert tiling.rows * tiling.tiles == 32 < 104
    check(case, selected=selected)


@pytest.mark.parametrize("name", ["a pack", "blocks of 100"])
def test_shares_of_the_queries(name):
    case = rounded(CASES[name], torch.float32)
    q, k, v, selected, blocks = tensors_of(case, torch.float32)
    wanted = case.run(REF, softmax_scale=SCALE)
    cuts = [0, 1, len(q) * 2 // 3, len(q)]
    for a, b in pairwise(cuts):
        these = blocks.of_queries(a, b)
        found = run(q[a:b], k, v, selected[a:b], these)
        for name, x, y in zip(("out", "lse"), found, wanted, strict=False):
            agree(x, y[a:b], name)


@pytest.mark.parametrize("name", ["a pack", "blocks of 200"])
def test_any_strides(name):
    case = rounded(CASES[name], torch.float16)
    q, k, v, selected, blocks = tensors_of(case, torch.float16)
    wanted = run(q, k, v, selected, blocks)

    def heads_first(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def apart(x):
        return x.repeat_interleave(2, dim=-1)[..., ::2]

    def among_others(x):
        wide = torch.full((len(x) + 2, 3 * x.shape[1], *x.shape[2:]), torch.nan)
        view = wide.to(x)[1:-1, x.shape[1] : 2 * x.shape[1]]
        return view.copy_(x)

    for change in (heads_first, apart, among_others):
        out, lse = change(torch.zeros_like(q)), heads_first(torch.zeros_like(wanted[1]))
        found = run(*map(change, (q, k, v)), selected, blocks, out, lse)
        assert found[0].stride() != q.stride()
        for x, y in zip(found, wanted, strict=True):
            assert torch.equal(x, y)
    chosen = selected.transpose(0, 2).contiguous().transpose(0, 2)
    for x, y in zip(run(q, k, v, chosen, blocks), wanted, strict=True):
        assert torch.equal(x, y)


def test_keys_that_all_heads_share_by_stride_0():
    case = rounded(make_case([280], block_size=136, topk=2, D=16), torch.float16)
    q, k, v, selected, blocks = tensors_of(case, torch.float16)
    wanted = run(q, k, v, selected, blocks)
    found = run(q, k.expand(-1, 2, -1), v.expand(-1, 2, -1), selected, blocks)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("D", [16, 24])
@pytest.mark.parametrize("block_size", [144, 192])
def test_descriptors_change_nothing(D, block_size, monkeypatch):
    case = make_case([2 * block_size + 9, 40], block_size=block_size, topk=2, H=1, D=D)
    tensors = tensors_of(rounded(case, torch.float16), torch.float16)
    used, describe = [], tiles.describe
    monkeypatch.setattr(attend, "describe", lambda *x: used.append(1) or describe(*x))
    described = run(*tensors)
    monkeypatch.setattr(attend, "describe", lambda *_: None)
    for x, y in zip(described, run(*tensors), strict=True):
        assert torch.equal(x, y)
    assert used or tilings.gpu_family() != "hopper"


def test_descriptors_need_aligned_rows():
    x = torch.zeros(50, 2, 64, dtype=torch.float16)
    assert tiles.describe(x, 32).strides == [128, 64, 1]
    for refused in (
        x.flatten()[1:-127].view(49, 2, 64),
        x[..., :63].contiguous(),
        x[..., ::2],
        x[:, :1].expand(-1, 3, -1),
        x[:0],
    ):
        assert tiles.describe(refused, 32) is None


def readers(case, selected, token):
    """Mark the (query, head) whose choice holds the block of a token."""
    block = case.partition(REF).of_token[token]
    return torch.as_tensor(selected.cpu() == int(block)).any(-1)


@pytest.mark.parametrize(
    ("block_size", "name", "value"),
    [
        (3, "v", torch.nan),
        (20, "k", torch.nan),
        (20, "v", torch.inf),
        (150, "v", torch.nan),
    ],
)
def test_what_is_not_finite_stays_where_it_is_read(block_size, name, value):
    lengths = [2 * block_size + 9, block_size + 5]
    case = make_case(lengths, block_size=block_size, topk=2, H=2, HK=2, D=16)
    q, k, v, selected, blocks = tensors_of(case, torch.float16)
    clean = run(q, k, v, selected, blocks)
    # Behind a past block, at the end of a sequence, and at the beginning of the next.
    for token in (block_size, lengths[0] - 1, lengths[0]):
        dirty = {"k": k.clone(), "v": v.clone()}
        dirty[name][token, 0, 3] = value
        found = run(q, **dirty, selected=selected, blocks=blocks)
        block = int(case.partition(REF).of_token[token])
        reads = (selected.cpu() == block).any(-1)
        reads[:, 1] = False
        for x, y in zip(found, clean, strict=True):
            assert torch.equal(x.cpu()[~reads], y.cpu()[~reads])
        # In its own block a value may reach the queries before it, too.
        reads[:token] = False
        out = found[0].cpu()[reads]
        assert len(out) > 0
        assert not out.isfinite().all(-1).any()


def test_a_query_that_is_not_finite_harms_no_other():
    case = make_case([60, 31], block_size=20, topk=3, H=2, HK=1, D=16)
    q, k, v, selected, blocks = tensors_of(case, torch.float16)
    clean = run(q, k, v, selected, blocks)
    q[25, 1] = torch.nan
    out, lse = run(q, k, v, selected, blocks)
    for x, y in zip((out, lse), clean, strict=True):
        bad = ~(x == y).view(*q.shape[:2], -1).all(-1)
        assert bad.nonzero().tolist() == [[25, 1]]
        assert x[25, 1].isnan().all()


@pytest.mark.parametrize("block_size", [16, 160])
def test_large_scores_do_not_overflow(block_size):
    case = make_case([3 * block_size], queries=[40], block_size=block_size, topk=2)
    check(case.replace(q=case.q * 1e4))


@pytest.mark.parametrize("block_size", [16, 272])
def test_scores_of_minus_infinity_weigh_nothing(block_size):
    case = make_case([2 * block_size], block_size=block_size, topk=2, D=16, H=1)
    q, k, v, selected, blocks = tensors_of(case, torch.float32)
    q = q.abs()
    # All of the first tiles of a past and of an own block, but not all keys.
    for first in (0, block_size):
        k[first : first + block_size * 3 // 4] = -torch.inf
    rows = torch.arange(2 * block_size, device=DEVICE) % block_size
    found = run(q, k, v, selected, blocks)[0][rows >= block_size * 3 // 4]
    plain = plain_attention(q.double(), k.double(), v.double(), selected, blocks, SCALE)
    wanted = plain[0][rows >= block_size * 3 // 4]
    agree(found, wanted, "out")


def test_no_tokens():
    for lengths in ([0], [0, 0]):
        case = make_case(lengths, block_size=4, topk=3)
        tensors = tensors_of(case, torch.float32, np.zeros((0, 2, 3)))
        out, lse = run(*tensors)
        assert out.shape == (0, 2, 4)
        assert lse.shape == (0, 2)


@pytest.mark.parametrize("choose", [tilings.attend_tiling, tilings.combine_tiling])
def test_every_tile_is_one_that_kernels_can_take(choose):
    sizes = [*range(1, 300), 512, 1000, 4096, 10**10]
    for family in tilings.FAMILIES:
        for dtype in (torch.bfloat16, torch.float32):
            for D in (1, 64, 80, 128, 192, 256):
                for block_size in sizes:
                    tiling = choose(dtype, D, block_size, family)
                    for n in (tiling.rows, tiling.keys):
                        assert n == tilings.padded(n)
                    if tiling.tiles > 1:
                        assert block_size <= tiling.keys
                        assert tiling.rows * tiling.tiles == tilings.PAIRS

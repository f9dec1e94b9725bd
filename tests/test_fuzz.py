"""Any shape, dtype, pack, choice and device: agreement with the reference, or an error.

Also what no search finds by chance: poisoned inputs, very many sequences, sizes beyond
2^31 and workspaces that are too small.
"""

import contextlib
import io
import re
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from impls import FAST, REF, Case, cases, make_case

import moba_fast
import moba_ref
from moba_fast import _flash, varlen, workspace
from moba_fast.attend import past_lists
from moba_fast.blocks import lay_out
from moba_fast.route import Routing, route
from moba_fast.varlen import Pack
from moba_lab.agree import EXEMPT_SHARE, MARGIN, agree, chosen_scores, plain_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda x: x,
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "dimensions first": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
}


def targets():
    """List (device, backend, kernel, dtypes) of everything that runs here."""
    found = [("cpu", "torch", name, DTYPES) for name in ("cpu", "plain")]
    found.append(("cpu", "torch:compiled", "cpu", [torch.float32]))
    if torch.cuda.is_available():
        found.append(("cuda", "torch", "plain", DTYPES))
    for name in _flash.GPU_KERNELS:
        if not _flash.why_not(name):
            found.append(("cuda", f"flash:{name}", name, DTYPES[2:]))
    return found


@dataclass(frozen=True)
class Call:
    """One call: inputs, and everything that may vary around them."""

    case: Case
    target: tuple
    dtype: torch.dtype
    layout: str
    given: bool
    workspace_bytes: int
    deterministic: bool
    softmax_scale: float | None
    loudness: float

    def tensors(self):
        """Return q, k, v in the call's dtype, layout and place."""
        loud = self.case.q * self.loudness, self.case.k, self.case.v
        device = self.target[0]
        return [
            LAYOUTS[self.layout](torch.tensor(x).to(self.dtype).to(device))
            for x in loud
        ]

    def run(self, leaves, dout, **options):
        """Return out, lse, selected and gradients with the kernel of the target."""
        _, backend, kernel, _ = self.target
        # The backward pass asks for its kernel, too.
        with mock.patch.object(_flash, "default_kernel", return_value=kernel):
            out, lse, selected = moba_fast.moba_attention(
                *leaves,
                **self.case.options,
                softmax_scale=self.softmax_scale,
                backend=backend,
                workspace_bytes=self.workspace_bytes,
                deterministic=self.deterministic,
                return_aux=True,
                **options,
            )
            return out, lse, selected, torch.autograd.grad(out, leaves, dout)


@st.composite
def calls(draw):
    """Draw a call; a small workspace cuts it into parts, a tiny one is refused."""
    target = draw(st.sampled_from(targets()))
    return Call(
        case=draw(cases()),
        target=target,
        dtype=draw(st.sampled_from(target[3])),
        layout=draw(st.sampled_from(list(LAYOUTS))),
        given=draw(st.booleans()),
        workspace_bytes=draw(st.sampled_from([2**31, 2**31, 2**15, 2**13, 2**10])),
        deterministic=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from([None, None, 0.3, 2.0])),
        loudness=draw(st.sampled_from([1.0, 1.0, 8.0, 0.0])),
    )


def check_choice(found, expected, case):
    """Assert that rows which differ are near ties; return how many, and of how many."""
    blocks = case.partition(REF)
    scores = REF.gate_scores(case.q, REF.pool_keys(case.k, blocks), blocks)
    differs = (found != expected).any(-1)
    gap = np.abs(chosen_scores(found, scores) - chosen_scores(expected, scores))
    size = np.where(np.isfinite(scores), np.abs(scores), 0.0).max(-1, initial=0)
    assert (gap.max(-1, initial=0) <= MARGIN * size)[differs].all()
    return differs.sum(), differs.size


def check_call(call):
    """Assert the whole contract for one call.

    Returns:
        rows that differ at near ties, rows: zeros where the call was refused.
    """
    tensors = call.tensors()
    exact = dict(zip("qkv", (x.cpu().double().numpy() for x in tensors), strict=True))
    case, scale = call.case.replace(**exact), call.softmax_scale
    _, _, chosen = case.run(REF, softmax_scale=scale)
    given = {"selected": torch.tensor(chosen, device=tensors[0].device)}
    leaves = [x.detach().requires_grad_() for x in tensors]
    dout = torch.cos(torch.arange(tensors[0].numel())).view(tensors[0].shape)
    dout = dout.to(tensors[0])
    try:
        given = given if call.given else {}
        out, lse, selected, grads = call.run(leaves, dout, **given)
    except ValueError as error:
        check_refusal(call, str(error))
        return 0, 0
    selected = selected.cpu().numpy()
    ties = (0, 0) if call.given else check_choice(selected, chosen, case)
    ref_out, ref_lse, _ = case.run(REF, selected=selected, softmax_scale=scale)
    factor = case.q.shape[2] ** -0.5 if scale is None else scale
    ref_grads = moba_ref.moba_attention_backward(
        *(dout.cpu().double().numpy(), case.q, case.k, case.v, ref_out, ref_lse),
        *(selected, case.partition(REF), factor),
    )
    plain = plain_results(case, leaves, selected, dout, factor)
    names = ("out", "lse", "dq", "dk", "dv")
    found, expected = (out, lse, *grads), (ref_out, ref_lse, *ref_grads)
    units = sizes_of_summands(case, dout, factor, call.dtype)
    with contextlib.redirect_stdout(io.StringIO()):
        for name, *values in zip(names, found, expected, plain, strict=True):
            a, b, p = (with_unit(x, units[name]) for x in values)
            agree(a, b, name, plain=p)
    return ties


def sizes_of_summands(case, dout, scale, dtype):
    """Return the size of what is summed up for each result.

    Rounding goes by the summands: where they cancel, as the gradients of a saturated
    softmax do, the result may be as small as its error. A weight is as inexact as the
    log-sum-exp in its exponent, which is float32 or better.
    """
    kv = np.arange(case.q.shape[1]) // (case.q.shape[1] // case.k.shape[1])
    k, v, dout = case.k[:, kv], case.v[:, kv], dout.cpu().double().numpy()
    sizes = [
        np.abs(x).max(initial=0.0)
        for x in (
            *(case.q, k, v, dout),
            scale * np.einsum("shd,thd->sht", case.q, k),
            scale * np.einsum("shd,thd->sht", dout, v),
        )
    ]
    q, k, v, dout, scores, dscores = sizes
    wide = torch.promote_types(dtype, torch.float32)
    weight = max(1.0, scores * torch.finfo(wide).eps / torch.finfo(dtype).eps)
    units = {"out": v, "dq": dscores * k, "dk": dscores * q, "dv": dout}
    return {"lse": scores, **{name: x * weight for name, x in units.items()}}


def with_unit(x, unit):
    """Append a value that is exact, so that `agree` measures in its unit."""
    x = torch.as_tensor(x).detach().cpu().flatten()
    return torch.cat([x, torch.tensor([unit]).to(x)])


def plain_results(case, leaves, selected, dout, scale):
    """Return out, lse, dq, dk, dv of plain PyTorch in the dtype of the call."""
    leaves = [x.detach().cpu().requires_grad_() for x in leaves]
    out, lse = plain_attention(*leaves, selected, case.partition(FAST), scale)
    return out, lse, *torch.autograd.grad(out, leaves, dout.cpu())


def check_refusal(call, message):
    """Assert that a call was refused for a reason that holds."""
    if "as many queries as keys" in message:
        assert call.target[2] == "cudnn"
        assert call.case.cu_seqlens != call.case.cu_seqlens_k
    else:
        limit, need = map(
            int, re.search(r"workspace_bytes=(\d+) .* needs (\d+)", message).groups()
        )
        assert call.workspace_bytes == limit < need


# The two settings of one property.
FEW = settings(max_examples=200)
MANY = settings(
    max_examples=2000, suppress_health_check=[HealthCheck.too_slow], deadline=None
)


@pytest.mark.parametrize(
    "effort", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_calls_agree_with_the_reference_or_say_why_not(effort):
    tally = np.zeros(2, int)

    @given(calls())
    @effort
    def check(call):
        nonlocal tally
        tally += check_call(call)

    check()
    ties, rows = tally
    assert rows > 1000
    assert ties <= EXEMPT_SHARE * rows


def blocks_read(selected, case):
    """Spread a choice over the tokens of its blocks, (S, H, SK) bool, not cut."""
    of_token = case.partition(REF).of_token
    return (selected[..., None] == of_token).any(2)


def blocks_in_sight(case):
    """Mark the tokens whose block a query can score or read, (S, H, SK) bool."""
    blocks = case.partition(REF)
    of_token = blocks.of_token
    sight = (of_token >= blocks.first_of_query[:, None]) & (
        of_token <= blocks.of_query[:, None]
    )
    return np.repeat(sight[:, None], case.q.shape[1], axis=1)


@st.composite
def poisons(draw):
    """Draw a case, where to poison it and with what: (case, name, place, value)."""
    case = draw(cases().filter(lambda case: len(case.q) > 0))
    name = draw(st.sampled_from("qkv"))
    place = tuple(draw(st.integers(0, n - 1)) for n in getattr(case, name).shape)
    value = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    return case, name, place, value


def reach(case, name, place, sight):
    """Say where a poisoned value may show.

    A value reaches the queries that read its block, not only those after it: a masked
    weight is 0, and 0 times NaN is NaN. From there it reaches the gradients of all keys
    and values in the blocks that such a query reads.

    Args:
        case: Case.
        name: "q", "k" or "v".
        place: (token, head, dimension) of the value.
        sight: (S, H, SK) bool, tokens whose block each query reads.

    Returns:
        rows (S, H) and tokens (SK, HK), bool.
    """
    token, head, _ = place
    heads, heads_k = case.q.shape[1], case.k.shape[1]
    kv = np.arange(heads) // (heads // heads_k)
    rows = np.zeros(case.q.shape[:2], bool)
    if name == "q":
        rows[token, head] = True
    else:
        rows = sight[:, :, token] & (kv == head)
    touched = (sight & rows[..., None]).any(0)
    tokens = np.stack([touched[kv == g].any(0) for g in range(heads_k)], axis=1)
    return rows, tokens


def run_with_gradients(case, kernel, selected=None):
    """Return NumPy out, dq, dk, dv in float32 and the choice of blocks."""
    leaves = [
        torch.tensor(x).float().requires_grad_() for x in (case.q, case.k, case.v)
    ]
    options = {**case.options, "selected": selected, "return_aux": True}
    if kernel == "compiled":
        kernel, options["backend"] = "cpu", "torch:compiled"
    with mock.patch.object(_flash, "default_kernel", return_value=kernel):
        out, _, chosen = moba_fast.moba_attention(*leaves, **options)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    return [x.detach().numpy() for x in (out, *grads)], chosen


@pytest.mark.parametrize("kernel", ["compiled", "cpu", "plain"])
@pytest.mark.parametrize("gate", [False, True], ids=["selected given", "gate"])
@given(poison=poisons())
def test_what_is_not_finite_stays_where_it_can_reach(kernel, gate, poison):
    case, name, place, value = poison
    dirty = getattr(case, name).copy()
    dirty[place] = value
    dirty = case.replace(**{name: dirty})
    clean, selected = run_with_gradients(case, kernel)
    found, chosen = run_with_gradients(dirty, kernel, None if gate else selected)
    sight = blocks_in_sight(case) if gate else blocks_read(selected.numpy(), case)
    rows, tokens = reach(case, name, place, sight)
    for a, b, reached in zip(found, clean, (rows, rows, tokens, tokens), strict=True):
        assert np.isfinite(b).all()
        assert np.allclose(a[~reached], b[~reached], rtol=1e-4, atol=1e-5)
    # Whatever the gate made of it is a choice that the call accepts.
    run_with_gradients(dirty, kernel, chosen)


@pytest.mark.parametrize("kernel", ["compiled", "cpu"])
@pytest.mark.parametrize("name", ["k", "v"])
def test_what_is_not_finite_does_show_where_it_is_read(name, kernel):
    case = make_case([24], block_size=4, topk=3)
    _, selected = run_with_gradients(case, kernel)
    dirty = getattr(case, name).copy()
    dirty[5, 0, 0] = np.nan
    found, _ = run_with_gradients(case.replace(**{name: dirty}), kernel, selected)
    reads = (blocks_read(selected.numpy(), case)[:, :, 5]).copy()
    reads[:5] = False
    assert reads.sum() > 10
    assert np.isnan(found[0][reads]).any(-1).all()


def pack_of(lengths):
    return make_case(lengths, block_size=4, topk=2, H=2, HK=1, D=4)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive_is_right_or_refused(scale):
    case = make_case([9], block_size=4, topk=2)
    expected = case.run(REF, softmax_scale=scale)[0]
    try:
        found = case.run(FAST, softmax_scale=scale)[0]
    except ValueError:
        return
    assert np.allclose(found, expected)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_one_sequence(length):
    case = pack_of([length])
    for a, b in zip(case.run(FAST), case.run(REF), strict=True):
        assert np.allclose(a, b, atol=1e-12)


def test_no_sequence_is_an_error_that_says_what_to_pass():
    empty = torch.zeros(0, 2, 4)
    with pytest.raises(ValueError, match=r"B \+ 1 >= 2 offsets"):
        moba_fast.moba_attention(
            *(empty, empty[:, :1], empty[:, :1]), block_size=4, topk=2, cu_seqlens=[0]
        )
    assert moba_fast.moba_attention(
        *(empty, empty, empty), block_size=4, topk=2, cu_seqlens=[0, 0]
    ).shape == (0, 2, 4)


@pytest.mark.parametrize("kernel", ["cpu", "plain"])
def test_65_537_sequences(kernel):
    rng = np.random.default_rng(0)
    lengths = np.zeros(65_537, int)
    # Most are empty or one token; a few are longer than a block.
    lengths[rng.choice(65_537, 30_000, replace=False)] = 1
    lengths[[0, 40_000, 65_536]] = 9, 14, 6
    case = pack_of(lengths.tolist())
    with mock.patch.object(_flash, "default_kernel", return_value=kernel):
        out, lse, selected = case.run(FAST)
    alone = np.repeat(lengths, lengths) == 1
    assert np.allclose(out[alone], np.repeat(case.v, 2, axis=1)[alone])
    for i in (0, 40_000, 65_536):
        a, b = case.cu_seqlens[i : i + 2]
        part = case.replace(
            **{n: getattr(case, n)[a:b] for n in "qkv"},
            cu_seqlens=[0, b - a],
            cu_seqlens_k=[0, b - a],
        )
        expected = part.run(REF)
        assert np.allclose(out[a:b], expected[0], atol=1e-12)
        assert np.allclose(lse[a:b], expected[1], atol=1e-12)
        first = case.partition(FAST).cu_blocks[i].item()
        shifted = np.where(expected[2] < 0, -1, expected[2] + first)
        assert np.array_equal(selected[a:b], shifted)


@pytest.mark.parametrize("count", [1, 65_535, 65_536, 65_537, 200_000])
def test_calls_of_gpu_kernels_have_at_most_65_535_sequences(count):
    lengths = torch.arange(count) % 3
    cu_q = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    cu_k = torch.nn.functional.pad((lengths + 1).cumsum(0), (1, 0)).int()
    # Seven queries and three keys are padding that no sequence holds.
    n_q, n_k = int(cu_q[-1]) + 7, int(cu_k[-1]) + 3
    q, k = torch.arange(n_q)[:, None], torch.arange(n_k)[:, None]
    seen_q, seen_k, next_q, next_k = [], [], 0, 0
    for a, b, c, d, part in varlen.split(Pack(cu_q, cu_k, 2, 3), "aten", q, k):
        assert len(part.cu_q) == len(part.cu_k) <= 65_535 + 1
        assert part.cu_q[0] == part.cu_k[0] == 0
        assert (a, c) == (next_q, next_k)
        next_q, next_k = b, d
        rest = (7, 3) if b == n_q else (0, 0)
        assert (part.cu_q[-1] + rest[0], part.cu_k[-1] + rest[1]) == (b - a, d - c)
        seen_q.append(part.cu_q.diff())
        seen_k.append(part.cu_k.diff())
    assert (next_q, next_k) == (n_q, n_k)
    assert torch.equal(torch.cat(seen_q), cu_q.diff())
    assert torch.equal(torch.cat(seen_k), cu_k.diff())


def sinks(case):
    """Let every query choose the first block of its sequence, so most get no query."""
    blocks = case.partition(FAST)
    first, current = blocks.first_of_query, blocks.of_query
    past = torch.where(first < current, first, -1)
    rows = torch.stack([past, torch.full_like(past, -1), current], dim=-1)
    return rows.int()[:, None].repeat(1, case.q.shape[1], 1)


@pytest.mark.parametrize("choose", [lambda case: None, sinks], ids=["gate", "sinks"])
def test_split_calls_give_what_one_call_gives(choose, monkeypatch):
    case = make_case([700, 3], block_size=2, topk=3, H=4, HK=2, D=8)
    selected = choose(case)
    expected = run_with_gradients(case, "plain", selected)[0]
    plain = _flash.KERNELS["plain"]
    like_aten = SimpleNamespace(
        forward=plain.forward, backward=plain.backward, head_multiple=8
    )
    monkeypatch.setitem(_flash.KERNELS, "aten", like_aten)
    monkeypatch.setattr(varlen, "MOST_SEQUENCES", 100)
    found = run_with_gradients(case, "aten", selected)[0]
    for a, b in zip(found, expected, strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_positions_beyond_2_31_are_int64():
    tokens = 2**33 + 5
    cu = torch.tensor([0, 7, tokens])
    blocks = lay_out(cu, cu, 2**20, torch.device("meta"))
    n_blocks = 1 + -(-(tokens - 7) // 2**20)
    assert blocks.start.shape == blocks.end.shape == (n_blocks,)
    assert blocks.of_token.shape == blocks.position.shape == (tokens,)
    fields = (
        *("cu_seqlens", "cu_blocks", "start", "end", "of_token", "position"),
        *("of_query", "first_of_query"),
    )
    for name in fields:
        assert getattr(blocks, name).dtype == torch.int64, name
    assert blocks.longest == 2**20


@pytest.mark.parametrize("ratio", [1, 2])
def test_rows_of_queries_beyond_2_31_are_exact(ratio):
    heads, first = 4, 2**31 + 11
    # Every head lists two queries of two blocks.
    query = torch.tensor([first, first + 2] * (2 * heads))
    cu_pairs = torch.arange(0, 4 * heads + 1, 2)
    routing = Routing(query, torch.zeros_like(query), cu_pairs, 1)
    blocks = SimpleNamespace(start=torch.tensor([0, 5]), longest=5)
    q = torch.empty(1, heads, 1, device="meta")
    k = torch.empty(9, heads // ratio, 1, device="meta")
    lists = past_lists(routing, blocks, q, k, "aten")
    expected = [
        (first + i) * heads + h + r
        for h in range(0, heads, ratio)
        for _ in range(2)
        for r in range(ratio)
        for i in (0, 2)
    ]
    assert lists.rows.dtype == torch.int64
    assert lists.rows.tolist() == expected
    assert lists.pack.cu_k.tolist() == [
        c for g in range(heads // ratio) for c in (9 * g, 9 * g + 5)
    ] + [9 * heads // ratio]


def test_pairs_are_addressed_by_int64():
    case = make_case([30], block_size=4, topk=3, H=4, HK=2)
    _, selected = run_with_gradients(case, "cpu")
    routing = route(selected, case.partition(FAST))
    assert routing.query.dtype == routing.slot.dtype == torch.int64
    assert routing.entry.dtype == torch.int64


@pytest.mark.parametrize("wanted", ["forward", "backward"])
def test_a_workspace_of_the_size_that_the_error_names_is_enough(wanted):
    case = make_case([600], block_size=16, topk=4, H=4, HK=2, D=8)
    leaves = [torch.tensor(x).requires_grad_() for x in (case.q, case.k, case.v)]

    def run(limit):
        out = moba_fast.moba_attention(*leaves, **case.options, workspace_bytes=limit)
        if wanted == "backward":
            return torch.autograd.grad(out.sum(), leaves)
        return (out,)

    limit = 1
    # Forward names its need first, then backward its own.
    for _ in range({"forward": 1, "backward": 2}[wanted]):
        with pytest.raises(ValueError, match=f"bytes={limit} is too small") as error:
            run(limit)
        limit = int(re.search(r"needs (\d+) bytes", str(error.value)).group(1))
    for a, b in zip(run(limit), run(2**31), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


HUGE = [
    # Tokens, H, HK, D, topk.
    (2**20, 32, 8, 128, 12),
    (10 * 2**20, 8, 8, 128, 3),
    (2**26, 64, 64, 64, 3),
    (2**31 + 9, 16, 1, 64, 8),
    # Three heads fit at a time, which does not divide five.
    (2**18, 5, 5, 64, 3),
]


@pytest.mark.parametrize(("S", "H", "HK", "D", "topk"), HUGE)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("limit", [2**31, 2**36])
def test_parts_of_huge_calls_fit_int32_offsets(S, H, HK, D, topk, backward, limit):
    q = torch.empty(S, H, D, dtype=torch.bfloat16, device="meta")
    k = torch.empty(S, HK, D, dtype=torch.bfloat16, device="meta")
    try:
        parts = workspace.parts(q, k, 512, topk, limit, backward)
    except ValueError as error:
        need = int(re.search(r"needs (\d+) bytes", str(error)).group(1))
        assert need > limit
        limit = 2 * need
        parts = workspace.parts(q, k, 512, topk, limit, backward)
    ratio, done = H // HK, []
    per_query, per_key = workspace.bytes_per_row(q, ratio, topk, backward)
    for part in parts:
        heads_k = part.heads_k.stop - part.heads_k.start
        assert part.heads == slice(
            part.heads_k.start * ratio, part.heads_k.stop * ratio
        )
        # Offsets of keys and lists are int32 in every kernel.
        assert heads_k == 1 or heads_k * S < 2**31
        rows = max(b - a for a, b in part.queries)
        assert heads_k * (per_key * S + per_query * rows) <= limit
        cuts = [a for a, _ in part.queries] + [part.queries[-1][1]]
        assert cuts[0] == 0
        assert cuts[-1] == S
        assert [b for _, b in part.queries] == cuts[1:]
        done.append(part.heads_k)
    assert [h for s in done for h in range(s.start, s.stop)] == list(range(HK))

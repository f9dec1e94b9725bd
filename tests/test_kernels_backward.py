"""attention_backward of the kernels: the reference's gradients, for any input."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from impls import REF, make_case
from kernel_cases import CASES as SHARED_CASES

import moba_fast
import moba_ref
from moba_lab.agree import agree, plain_attention

pytest.importorskip("triton", reason="triton is not here")

from moba_fast.kernels import backward, backward_tilings
from moba_fast.kernels.backward import attention_backward
from moba_fast.kernels.route import build_lists

# What is not finite is not finite on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HALF = [torch.float16, *([torch.bfloat16] if GPU else [])]
SCALE = 0.3
NAMES = ("dq", "dk", "dv")
# Ways to add up dq: rows in a fixed order, or atomic operations.
ORDERED = {"deterministic": True}
ATOMIC = {"deterministic": False, "atomic": True}


def inputs_of(case, dtype, selected=None):
    """Return dout, q, k, v, out, lse, selected and blocks for attention_backward."""
    rng = np.random.default_rng(1)
    arrays = rng.normal(size=case.q.shape), case.q, case.k, case.v
    tensors = [torch.tensor(x).to(DEVICE, dtype) for x in arrays]
    exact = [x.double().cpu().numpy() for x in tensors[1:]]
    options = {**case.options, "softmax_scale": SCALE, "selected": selected}
    out, lse, selected = moba_ref.moba_attention(*exact, **options, return_aux=True)
    out, lse = torch.tensor(out).to(DEVICE, dtype), torch.tensor(lse).to(DEVICE).float()
    selected = torch.tensor(selected, dtype=torch.int32, device=DEVICE)
    cu = [torch.tensor(x, device=DEVICE) for x in (case.cu_seqlens_k, case.cu_seqlens)]
    blocks = moba_fast.partition(cu[0], case.block_size, cu[1])
    return *tensors, out, lse, selected, blocks


def run(inputs, shares=1, start=0.0, **options):
    """Return dq, dk and dv over shares of the queries; dk and dv begin with `start`."""
    *rows, selected, blocks = inputs
    dout, q, k, v, out, lse = rows
    dq = torch.full_like(q, torch.nan)
    dk, dv = (torch.full(k.shape, start, device=q.device) for _ in "kv")
    cuts = np.linspace(0, len(q), shares + 1).astype(int).tolist()
    for a, b in pairwise(cuts):
        these = blocks.of_queries(a, b)
        lists = build_lists(selected[a:b], these, k.shape[1])
        some = dout[a:b], q[a:b], k, v, out[a:b], lse[a:b], selected[a:b]
        attention_backward(
            *(*some, lists, these, SCALE, dq[a:b], dk, dv), **(options or ORDERED)
        )
    return dq, dk, dv


def gradients_of_reference(case, inputs):
    exact = [x.double().cpu().numpy() for x in inputs[:4]]
    selected = inputs[6].cpu().numpy()
    options = {**case.options, "softmax_scale": SCALE, "selected": selected}
    out, lse, _ = moba_ref.moba_attention(*exact[1:], **options, return_aux=True)
    return moba_ref.moba_attention_backward(
        *(*exact, out, lse, selected, case.partition(REF), SCALE)
    )


def check(case, dtype=torch.float32, selected=None, **options):
    """Compare with the reference, by what plain attention gives in this dtype."""
    inputs = inputs_of(case, dtype, selected)
    found = run(inputs, **options)
    dout, *leaves = (x.detach() for x in inputs[:4])
    leaves = [x.requires_grad_() for x in leaves]
    out, _ = plain_attention(*leaves, inputs[6], inputs[7], SCALE)
    plain = torch.autograd.grad(out, leaves, dout)
    wanted = gradients_of_reference(case, inputs)
    for name, a, b, c in zip(NAMES, found, wanted, plain, strict=True):
        # Sums are kept in float32, and returned in the dtype of the inputs.
        agree(a.to(dtype), b, name, plain=c)


CASES = SHARED_CASES | {
    "blocks of 1": make_case([14], block_size=1, topk=4, HK=2, D=5),
    "blocks of 3": make_case([20, 7], block_size=3, topk=4, HK=2, D=1),
    "blocks of 128": make_case([300], queries=[50], block_size=128, topk=2, D=64),
    "blocks of 256": make_case([530], queries=[30], block_size=256, topk=2, D=64),
    "blocks of 200": make_case([410], queries=[30], block_size=200, topk=2, D=24),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name):
    check(CASES[name])


@pytest.mark.parametrize("name", ["one sequence", "a pack", "blocks of 256"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_agrees_with_the_reference(name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize(
    "name", ["a pack", "last queries of longer keys", "blocks of 200"]
)
def test_atomic_sums_agree_with_the_reference(name):
    check(CASES[name], **ATOMIC)


@pytest.mark.parametrize("n_blocks", [33, 100, 1000])
def test_many_blocks(n_blocks):
    size = 2 if n_blocks < 1000 else 1
    case = make_case([n_blocks * size], queries=[20], block_size=size, topk=5, H=1)
    check(case)


def sink(case, share=1.0):
    """Let queries choose the first block, and about `share` of them one more."""
    blocks, rng = case.partition(REF), np.random.default_rng(2)
    selected = np.full((*case.q.shape[:2], case.topk), -1)
    selected[:, :, -1] = blocks.of_query[:, None]
    own = blocks.of_query - blocks.first_of_query
    for i, h in np.argwhere(np.broadcast_to(own[:, None] > 0, case.q.shape[:2])):
        selected[i, h, 0] = blocks.first_of_query[i]
        if case.topk > 2 and own[i] > 1 and rng.random() < share:
            selected[i, h, 1] = blocks.first_of_query[i] + rng.integers(1, own[i])
    return selected


@pytest.mark.parametrize(
    ("block_size", "way"), [(16, ORDERED), (40, ORDERED), (40, ATOMIC)]
)
def test_a_block_that_all_choose_is_summed_in_parts(block_size, way, monkeypatch):
    monkeypatch.setattr(backward, "FEWEST_PART_ROWS", 24)
    monkeypatch.setattr(backward, "PART_ROWS_PER_KEY", 0)
    case = make_case([130, 50], block_size=block_size, topk=3, H=4, HK=2, D=8)
    selected = sink(case, share=0.3)
    lengths = build_lists(*inputs_of(case, torch.float32, selected)[6:], 2)
    lengths = lengths.cu_pairs.diff()
    # Lists of many parts, of one, and of none.
    assert lengths.max() > 6 * 24
    assert ((lengths > 0) & (lengths <= 24)).any()
    assert (lengths == 0).any()
    check(case, selected=selected, **way)


@pytest.fixture
def nan_in_new_memory():
    """Fill what is allocated and not written with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_list_may_fill_its_parts(nan_in_new_memory, monkeypatch):
    monkeypatch.setattr(backward, "FEWEST_PART_ROWS", 24)
    monkeypatch.setattr(backward, "PART_ROWS_PER_KEY", 0)
    # 24 queries of two heads choose the first block.
    case = make_case([40], block_size=16, topk=2, H=2, D=8)
    selected = sink(case)
    pairs = build_lists(*inputs_of(case, torch.float32, selected)[6:], 1).cu_pairs[1]
    assert pairs == 2 * 24
    check(case, selected=selected)


def test_parts_have_the_size_that_pays():
    """Nothing is patched: a list of 2,128 pairs has two parts."""
    case = make_case([108], block_size=32, topk=2, H=28, D=4)
    selected = sink(case)
    inputs = inputs_of(case, torch.float32, selected)
    pairs = build_lists(*inputs[6:], 1).cu_pairs[1]
    assert backward.FEWEST_PART_ROWS < pairs < 2 * backward.FEWEST_PART_ROWS
    check(case, selected=selected)


def test_every_run_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(backward, "FEWEST_PART_ROWS", 24)
    monkeypatch.setattr(backward, "PART_ROWS_PER_KEY", 0)
    case = make_case([90, 20], block_size=16, topk=3, H=4, HK=2, D=8)
    inputs = inputs_of(case, torch.float16, sink(case))
    for first, second in zip(run(inputs), run(inputs), strict=True):
        assert torch.equal(first, second)


def test_gradients_of_keys_are_added_to_what_is_there():
    case = make_case([60], block_size=16, topk=3, H=2, HK=1, D=8)
    inputs = inputs_of(case, torch.float32)
    for name, zero, more in zip(NAMES, run(inputs), run(inputs, start=2.0)):  # noqa: B905
        expected = zero if name == "dq" else zero + 2
        assert (more - expected).abs().max() < 1e-5


def test_keys_that_nobody_reads_keep_their_gradients():
    case = make_case([48, 20], queries=[4, 0], block_size=8, topk=2, H=2, HK=1, D=8)
    inputs = inputs_of(case, torch.float32)
    selected, blocks = inputs[6:]
    read = set(selected.flatten().tolist()) - {-1}
    unread = [i for i in range(len(blocks.start)) if i not in read]
    assert len(unread) >= 3
    _, dk, dv = run(inputs, start=7.25)
    for i in unread:
        tokens = slice(blocks.start[i], blocks.end[i])
        assert (dk[tokens] == 7.25).all()
        assert (dv[tokens] == 7.25).all()


@pytest.mark.parametrize(("shares", "way"), [(3, ORDERED), (2, ATOMIC)])
def test_shares_of_the_queries_add_up(shares, way):
    lengths, queries = [90, 20, 9, 16], [40, 20, 0, 1]
    case = make_case(lengths, queries=queries, block_size=16, topk=4, H=4, HK=2, D=8)
    inputs = inputs_of(case, torch.float32)
    for one, many in zip(
        run(inputs, **way), run(inputs, shares=shares, **way), strict=True
    ):
        assert (one - many).abs().max() < 1e-5


def heads_first(x):
    """Copy x (S, H, D), with the tokens of a head in a row and room between rows."""
    room = x.new_zeros(x.shape[1], x.shape[0], x.shape[2] + 3)
    room[..., : x.shape[2]] = x.transpose(0, 1)
    return room[..., : x.shape[2]].transpose(0, 1)


def test_any_strides():
    case = make_case([60], block_size=16, topk=3, H=4, HK=2, D=8)
    inputs = inputs_of(case, torch.float32)
    wanted = run(inputs)
    *rows, lse, selected, blocks = inputs
    dout, q, k, v, out = (heads_first(x) for x in rows)
    # The last axis apart: copied.
    dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    lse, selected = lse.T.contiguous().T, heads_first(selected)
    dq, dk, dv = (heads_first(torch.zeros_like(x)) for x in wanted)
    lists = build_lists(selected, blocks, 2)
    attention_backward(
        *(dout, q, k, v, out, lse, selected, lists, blocks, SCALE, dq, dk, dv),
        deterministic=True,
    )
    for a, b in zip((dq, dk, dv), wanted, strict=True):
        assert torch.equal(a, b)


def test_dq_of_another_dtype():
    case = make_case([40], block_size=8, topk=3)
    inputs = inputs_of(case, torch.float16)
    _, q, k, *_, selected, blocks = inputs
    wide = torch.empty(q.shape, device=DEVICE)
    sums = [torch.zeros(k.shape, device=DEVICE) for _ in "kv"]
    lists = build_lists(selected, blocks, 1)
    attention_backward(*inputs[:7], lists, blocks, SCALE, wide, *sums, True)
    assert torch.equal(wide.half(), run(inputs)[0])


def test_a_gradient_that_is_expanded():
    """What `out.sum().backward()` hands over has no memory of its own."""
    case = make_case([40], block_size=8, topk=3)
    inputs = inputs_of(case, torch.float32)
    ones = torch.ones_like(inputs[0])
    wanted = run((ones, *inputs[1:]))
    found = run((torch.ones((), device=DEVICE).expand(ones.shape), *inputs[1:]))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy")
@pytest.mark.parametrize("place", ["dout", "q", "k", "v"])
@pytest.mark.parametrize(("value", "way"), [(torch.nan, ORDERED), (torch.inf, ATOMIC)])
def test_what_is_not_finite_stays_where_it_can_reach(place, value, way, monkeypatch):
    """As in test_fuzz: it reaches the blocks that a query reads, and their queries."""
    monkeypatch.setattr(backward, "FEWEST_PART_ROWS", 16)
    monkeypatch.setattr(backward, "PART_ROWS_PER_KEY", 0)
    case = make_case([30, 9], block_size=6, topk=3, H=4, HK=2, D=4)
    *tensors, selected, blocks = inputs_of(case, torch.float32)
    clean = run((*tensors, selected, blocks), **way)
    token, head = 19, 1
    names = ["dout", "q", "k", "v"]
    i = names.index(place)
    tensors[i] = tensors[i].clone()
    tensors[i][token, head, 2] = value
    reads = (selected[..., None] == blocks.of_token).any(2).cpu()
    kv = torch.arange(4) // 2
    rows = torch.zeros(len(reads), 4, dtype=torch.bool)
    if place in ("dout", "q"):
        rows[token, head] = True
    else:
        rows = reads[:, :, token] & (kv == head)
    # Such rows have no finite output or lse either.
    out, lse = tensors[4].clone(), tensors[5].clone()
    if place != "dout":
        out[rows] = lse[rows] = value
    found = run((*tensors[:4], out, lse, selected, blocks), **way)
    touched = (reads & rows[..., None]).any(0)
    keys = torch.stack([touched[kv == g].any(0) for g in range(2)], 1)
    assert not rows.all()
    assert not keys.all()
    for name, a, b, reached in zip(NAMES, found, clean, (rows, keys, keys)):  # noqa: B905
        assert b.isfinite().all(), name
        assert torch.equal(a[~reached], b[~reached]), name
    assert not found[0][rows].isfinite().all()


def test_no_queries():
    case = make_case([20], queries=[0], block_size=8, topk=2)
    dq, dk, dv = run(inputs_of(case, torch.float32), start=1.0)
    assert dq.shape == (0, 2, 4)
    assert (dk == 1).all()
    assert (dv == 1).all()


def test_ordered_and_atomic_exclude_each_other():
    inputs = inputs_of(CASES["one sequence"], torch.float32)
    with pytest.raises(ValueError, match="deterministic=False"):
        run(inputs, deterministic=True, atomic=True)


@pytest.mark.parametrize("block_size", [64, 256])
def test_sums_are_atomic_by_default_where_that_is_fastest(block_size, monkeypatch):
    case = make_case([600], queries=[8], block_size=block_size, topk=3, D=4)
    inputs, modes = inputs_of(case, torch.float32), []
    whole = backward.differentiate_past
    monkeypatch.setattr(
        backward,
        "differentiate_past",
        lambda *args: modes.append(args[3]) or whole(*args),
    )
    run(inputs, deterministic=False)
    tiling = backward_tilings.backward_tiling(
        *(torch.float32, 4, block_size, "hopper")
    ).past
    assert modes == ["atomic" if block_size > tiling.keys else "partial"]

"""attend_current and attend_past against softmax attention written out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from impls import FAST, IMPLS, REF, cases, largest_error, make_case

from moba_fast import _batches, _flash, _packs
from moba_lab.agree import agree


def parts(impl, case, scale=0.7):
    """Return the outputs of attend_current and attend_past, and the routing."""
    blocks = case.partition(impl)
    q, k, v = (impl.array(x) for x in (case.q, case.k, case.v))
    routing = impl.route(impl.array(case.run(REF)[2]), blocks)
    current = impl.attend_current(q, k, v, blocks, scale)
    return current, impl.attend_past(q, k, v, routing, blocks, scale), routing


def softmax(q, k, v, scale):
    """Attend from one query, without any trick."""
    weights = np.exp(k @ q * scale)
    return weights @ v / weights.sum(), np.log(weights.sum())


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_current_reads_its_own_block_up_to_itself(impl):
    case = make_case([10, 5], block_size=4, topk=2, H=4, HK=2)
    (out, lse), _, _ = parts(impl, case)
    starts = [0] * 4 + [4] * 4 + [8] * 2 + [10] * 4 + [14]
    for i in range(15):
        for h in range(4):
            tokens = slice(starts[i], i + 1)
            keys, values = case.k[tokens, h // 2], case.v[tokens, h // 2]
            expected = softmax(case.q[i, h], keys, values, 0.7)
            assert largest_error(out[i, h], expected[0]) < 1e-13
            assert largest_error(lse[i, h], expected[1]) < 1e-13


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_past_reads_the_whole_chosen_block(impl):
    case = make_case([21], block_size=4, topk=3, H=4, HK=2)
    _, (out, lse), routing = parts(impl, case)
    assert len(out) > 50
    for pair, entry in enumerate(np.asarray(routing.entry)):
        h, n = divmod(int(entry), 6)
        tokens = slice(4 * n, 4 * n + 4)
        q = case.q[int(routing.query[pair]), h]
        expected = softmax(q, case.k[tokens, h // 2], case.v[tokens, h // 2], 0.7)
        assert largest_error(out[pair], expected[0]) < 1e-13
        assert largest_error(lse[pair], expected[1]) < 1e-13


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_large_scores_do_not_overflow(impl):
    case = make_case([12], block_size=4, topk=2)
    case = case.replace(q=case.q * 1e4)
    current, past, _ = parts(impl, case)
    assert all(np.isfinite(np.asarray(x)).all() for x in (*current, *past))


@given(cases())
def test_twins_agree(case):
    fast, ref = parts(FAST, case), parts(REF, case)
    for stage in (0, 1):
        for name, a, b in zip(("out", "lse"), fast[stage], ref[stage], strict=True):
            agree(a, b, name)


@given(cases())
def test_grouping_of_lists_does_not_matter(case):
    _, expected, _ = parts(REF, case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_packs, "ROWS_PER_BATCH", 3)
        _, past, _ = parts(FAST, case)
    assert largest_error(past[0], expected[0]) < 1e-12
    assert largest_error(past[1], expected[1]) < 1e-12


def test_runs_cover_all_lists_with_little_padding():
    lengths = sorted(np.random.default_rng(0).integers(1, 400, 300).tolist())[::-1]
    runs = _packs.similar_runs([(8, n) for n in lengths], exact=False)
    assert [i for a, b in runs for i in range(a, b)] == list(range(300))
    for a, b in runs:
        padded = lengths[a] * (b - a)
        assert padded - sum(lengths[a:b]) <= _packs.PADDED_SHARE * padded
        assert b - a == 1 or padded <= _packs.ROWS_PER_BATCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype):
    case = make_case([20], block_size=4, topk=3)
    blocks = case.partition(FAST)
    q, k, v = (torch.tensor(x).to(dtype) for x in (case.q, case.k, case.v))
    routing = FAST.route(torch.tensor(case.run(REF)[2]), blocks)
    for out, lse in (
        FAST.attend_current(q, k, v, blocks, 1.0),
        FAST.attend_past(q, k, v, routing, blocks, 1.0),
    ):
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [255, 256, 301, 512, 513])
def test_own_blocks_by_halves_are_what_plain_attention_makes_of_them(length, dtype):
    generator = torch.Generator().manual_seed(length)
    size = 2, 3, length, 16
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for _ in range(3))
    found = _flash.cpu_attention(q, k, v, True, 0.25)
    expected = _batches.plain_attention(q, k, v, True, 0.25)
    tight = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tight, atol=tight)

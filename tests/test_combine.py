"""merge and combine: parts of a softmax become the whole."""

from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from impls import FAST, IMPLS, REF, cases, largest_error, make_case
from test_attend import parts, softmax

from moba_lab.agree import agree


def split_softmax(impl, seed, scale=1.0):
    """Attend to 5 and 9 keys apart, merge, and return that beside the whole."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=3), rng.normal(size=(14, 3)), rng.normal(size=(14, 3))
    a, b = softmax(q, k[:5], v[:5], scale), softmax(q, k[5:], v[5:], scale)
    merged = impl.merge(*(impl.array(x) for x in (*a, *b)))
    return merged, softmax(q, k, v, scale)


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize("seed", range(5))
def test_merged_parts_equal_the_whole(impl, seed):
    merged, whole = split_softmax(impl, seed)
    assert largest_error(merged[0], whole[0]) < 1e-14
    assert largest_error(merged[1], whole[1]) < 1e-14


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize("offset", [-5000.0, 5000.0])
def test_merge_survives_large_lse(impl, offset):
    out = [impl.array([2.0]), impl.array([6.0])]
    lse = [impl.array(offset), impl.array(offset + np.log(3.0))]
    merged, total = impl.merge(out[0], lse[0], out[1], lse[1])
    assert abs(float(merged[0]) - 5.0) < 1e-11
    assert abs(float(total) - (offset + np.log(4.0))) < 1e-11


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_an_empty_part_changes_nothing(impl):
    out, lse = np.array([0.1, 0.7]), np.array(3.3)
    empty = impl.array(np.zeros(2)), impl.array(np.array(-np.inf))
    merged = impl.merge(impl.array(out), impl.array(lse), *empty)
    assert np.asarray(merged[0]).tolist() == out.tolist()
    assert float(merged[1]) == float(lse)


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_combine_survives_large_scores(impl):
    case = make_case([20], block_size=4, topk=3)
    case = case.replace(q=case.q * 1e4)
    out, lse, _ = case.run(impl)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_a_query_without_a_past_keeps_its_result_exactly(impl):
    case = make_case([14, 3], block_size=4, topk=3)
    current, past, routing = parts(impl, case)
    out, lse = impl.combine(*current, *past, routing)
    alone = [0, 1, 2, 3, 14, 15, 16]
    assert np.array_equal(np.asarray(out)[alone], np.asarray(current[0])[alone])
    assert np.array_equal(np.asarray(lse)[alone], np.asarray(current[1])[alone])
    assert not np.array_equal(np.asarray(out)[4], np.asarray(current[0])[4])


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_combine_leaves_its_inputs_alone(impl):
    case = make_case([14], block_size=4, topk=3)
    current, past, routing = parts(impl, case)
    before = [np.asarray(x).copy() for x in (*current, *past)]
    impl.combine(*current, *past, routing)
    for x, y in zip((*current, *past), before, strict=True):
        assert np.array_equal(np.asarray(x), y)


@given(cases())
def test_twins_agree(case):
    fast, ref = (
        impl.combine(*current, *past, routing)
        for impl in (FAST, REF)
        for current, past, routing in [parts(impl, case)]
    )
    for name, a, b in zip(("out", "lse"), fast, ref, strict=True):
        agree(a, b, name)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_slots_one_by_one_give_what_one_pass_gives(scale, monkeypatch):
    # On a GPU, and where values have fewer bits than sums, slots are merged in turn.
    case = make_case([20, 9], block_size=4, topk=4)
    case = case.replace(q=case.q * scale)
    expected = case.run(FAST)
    monkeypatch.setattr(
        import_module("moba_fast.combine"), "adds_in_one_pass", lambda *_: False
    )
    found = case.run(FAST)
    for name, one, other in zip(("out", "lse"), expected, found, strict=False):
        assert np.isfinite(other).all(), name
        assert largest_error(one, other) < 1e-11 * max(1, np.abs(one).max()), name


def test_one_pass_takes_results_at_any_distance():
    case = make_case([20], block_size=4, topk=3)
    current, past, routing = parts(FAST, case)
    expected = FAST.combine(*current, *past, routing)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in current]
    assert not apart[1].is_contiguous()
    for one, other in zip(expected, FAST.combine(*apart, *past, routing), strict=True):
        assert one.equal(other)

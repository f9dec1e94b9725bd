"""route: every choice of a past block appears once, in its list, in order."""

import numpy as np
import pytest
from hypothesis import given
from impls import FAST, IMPLS, REF, cases, make_case

from moba_lab.agree import agree


def routing_of(impl, case):
    _, _, selected = case.run(REF)
    return selected, impl.route(impl.array(selected), case.partition(impl))


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_lists_hold_exactly_the_choices(impl):
    case = make_case([30, 0, 11], block_size=4, topk=3, H=4, HK=2)
    selected, routing = routing_of(impl, case)
    n_blocks = len(case.partition(REF).start)
    for entry in range(4 * n_blocks):
        h, n = divmod(entry, n_blocks)
        pairs = slice(int(routing.cu_pairs[entry]), int(routing.cu_pairs[entry + 1]))
        chose = np.argwhere(selected[:, h, :-1] == n)
        assert np.stack([routing.query[pairs], routing.slot[pairs]], 1).tolist() == (
            chose.tolist()
        )
    assert len(routing.query) == (selected[..., :-1] >= 0).sum()


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_no_past_gives_empty_lists(impl):
    case = make_case([9], block_size=4, topk=1)
    _, routing = routing_of(impl, case)
    assert len(routing.query) == 0
    assert routing.cu_pairs.tolist() == [0] * 7


@given(cases())
def test_twins_agree(case):
    _, ref = routing_of(REF, case)
    _, fast = routing_of(FAST, case)
    for field in ("query", "slot", "cu_pairs", "entry"):
        agree(getattr(fast, field), getattr(ref, field), field)

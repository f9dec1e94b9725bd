"""The running example holds a pattern, and the gate finds it."""

import numpy as np
import pytest

import moba_ref
from moba_lab.example import running_example


@pytest.mark.parametrize("packed", [False, True])
def test_the_gate_finds_what_was_planted(packed):
    example = running_example(packed)
    blocks = moba_ref.partition(example.cu_seqlens, example.block_size)
    k_mean = moba_ref.pool_keys(example.k, blocks)
    selected = moba_ref.select_blocks(example.q, k_mean, blocks, example.topk)
    planted = np.argwhere(example.planted >= 0)
    assert len(planted) > 30
    for i, h in planted:
        assert example.planted[i, h] in selected[i, h, :-1]


def test_it_is_the_same_every_time_and_differs_by_seed():
    assert np.array_equal(running_example().q, running_example().q)
    assert not np.array_equal(running_example().q, running_example(seed=1).q)
    assert running_example(packed=True).cu_seqlens == [0, 13, 16, 32]

"""The counts of loop orders, checked against choices that are counted by hand."""

import numpy as np
import pytest

from moba_lab.schedules import (
    Schedule,
    blocks_outer,
    draw_choice,
    union_of_blocks,
    walk_of_blocks,
)

# Eight queries in blocks of 2, one past block each; block 0 has 4 readers.
CHOSEN = np.array([-1, -1, 0, 0, 0, 1, 2, 0])[:, None]
D = 16


def test_the_union_reads_a_block_once_per_tile_for_all_rows():
    # Tiles of 4: the first reads block 0, the second blocks 0, 1 and 2.
    found = union_of_blocks(CHOSEN, block_size=2, rows=4, D=D)
    assert found == Schedule(scores=4 * 8, keys=8, bytes=8 * D * 2 * 2 + 8 * D * 2 * 2)


def test_the_walk_reads_a_block_once_per_step_and_carries_sums():
    # In tiles of 4, with steps of 2: block 0 has 2 and 2 readers, blocks 1 and 2 one.
    found = walk_of_blocks(CHOSEN, block_size=2, rows=4, step=2, D=D)
    keys, pairs = 4 * 2, 6
    moved = keys * D * 2 * 2 + pairs * D * (2 + 4 + 4)
    assert found == Schedule(scores=keys * 2, keys=keys, bytes=moved)


def test_the_walk_takes_several_steps_where_a_tile_has_many_readers():
    found = walk_of_blocks(CHOSEN, block_size=2, rows=8, step=3, D=D)
    # Block 0 has 4 readers: two steps of 3.
    assert (found.scores, found.keys) == (4 * 3 * 2, 4 * 2)


def test_blocks_outer_reads_a_block_once_per_program():
    found = blocks_outer(CHOSEN, block_size=2, pairs=3, step=3, D=D)
    # Programs for 3 and 1 readers of block 0, and for those of blocks 1 and 2.
    keys, pairs = 4 * 2, 6
    moved = keys * D * 2 * 2 + pairs * (D * (2 + 2 + 2) + 4 + 4)
    assert found == Schedule(scores=4 * 3 * 2, keys=keys, bytes=moved)


def test_a_program_may_take_several_steps_for_one_read():
    found = blocks_outer(CHOSEN, block_size=2, pairs=4, step=2, D=D)
    assert (found.scores, found.keys) == (4 * 2 * 2, 3 * 2)


def test_the_ceiling_that_takes_longer_counts():
    schedule = Schedule(scores=100, keys=10, bytes=4000)
    assert schedule.seconds(matmul=4 * 16 * 100, copy=1e9, D=16) == 1
    assert schedule.seconds(matmul=1e9, copy=2000, D=16) == 2


@pytest.mark.parametrize("alike", [1, 4])
def test_a_draw_names_different_past_blocks(alike):
    chosen = draw_choice(256, block_size=4, slots=3, alike=alike)
    current = np.arange(256) // 4
    assert (chosen[current < 3] == -1).all()
    some, last = chosen[current >= 3], current[current >= 3]
    assert (np.diff(some, axis=1) > 0).all()
    assert (some >= 0).all()
    assert (some[:, -1] < last).all()
    groups = chosen.reshape(-1, alike, 3)
    assert (groups == groups[:, :1]).all()
    assert len(np.unique(groups[:, 0], axis=0)) > 0.9 * (len(groups) - 12 / alike)


def test_key_blocks_outer_do_not_care_how_neighbours_choose():
    scattered = draw_choice(2**14, block_size=64, slots=3)
    alike = draw_choice(2**14, block_size=64, slots=3, alike=64)
    union = [union_of_blocks(c, 64).scores for c in (scattered, alike)]
    outer = [blocks_outer(c, 64).scores for c in (scattered, alike)]
    assert union[0] > 20 * union[1]
    assert outer[0] < 1.5 * outer[1]

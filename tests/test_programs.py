"""The maps of programs show what the programs of the kernels really read and write."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moba_fast
from moba_lab import programs
from moba_lab.example import running_example

pytest.importorskip("triton", reason="triton is not here")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("only the interpreter can be watched", allow_module_level=True)

from traced import programs_of_rows, watched

from moba_fast.kernels import attend, backward, combine, gate, route

SCALE = 0.3


def small(packed, heads_k):
    """Return q, k, v, blocks and topk of the running example."""
    example = running_example(packed=packed)
    q, k, v = (torch.tensor(x).float() for x in (example.q, example.k, example.v))
    blocks = moba_fast.partition(example.cu_seqlens, example.block_size)
    k, v = (x[:, :heads_k].contiguous() for x in (k, v))
    return q, k, v, blocks, example.topk


def step(q, k, v, blocks, topk):
    """Run the kernels of both directions under watch and keep all they read."""
    k_mean, heads_k = moba_fast.pool_keys(k, blocks), k.shape[1]
    s = SimpleNamespace(q=q, k=k, v=v, blocks=blocks, heads_k=heads_k)
    s.out, s.dq = torch.empty_like(q), torch.empty_like(q)
    s.lse = torch.empty(q.shape[:2])
    s.dk, s.dv = torch.zeros_like(k), torch.zeros_like(v)
    with watched() as s.seen:
        s.selected = gate.select_blocks(q, k_mean, blocks, topk)
        s.lists = route.build_lists(s.selected, blocks, heads_k)
        s.past, lse = attend.attend_past(q, k, v, s.lists, blocks, SCALE)
        combine.attend_current(
            *(q, k, v, s.past, lse, s.selected, blocks, SCALE, s.out, s.lse)
        )
        backward.attention_backward(
            *(torch.ones_like(q), q, k, v, s.out, s.lse, s.selected, s.lists, blocks),
            *(SCALE, s.dq, s.dk, s.dv, True),
        )
    return s


@pytest.fixture(
    scope="module",
    params=[(False, 2), (True, 2), (False, 1)],
    ids=["plain", "packed", "grouped"],
)
def traced(request):
    return step(*small(*request.param))


def of_queries(cells):
    """Return the programs of every query and head: (S, H) sets."""
    found = np.empty(cells.shape[:2], dtype=object)
    for at in np.ndindex(found.shape):
        found[at] = set(cells[at][cells[at] >= 0].tolist())
    return found


def of_keys(cells, s):
    """Return the programs of every key and key head: (SK, HK) sets."""
    found = np.empty(s.k.shape[:2], dtype=object)
    ratio = s.q.shape[1] // s.heads_k
    for token, head in np.ndindex(found.shape):
        mine = cells[:, head * ratio : (head + 1) * ratio, s.blocks.of_token[token]]
        found[token, head] = set(mine[mine >= 0].tolist())
    return found


def by_slot(s):
    """Return the partial results as (S, H, slots, D)."""
    return s.past.view(*s.selected.shape[:2], -1, s.q.shape[2])


def meet(s, kernel, kind, x):
    return programs_of_rows(s.seen[kernel, kind], x)


def test_the_gate_reads_the_queries_of_its_map(traced):
    s = traced
    heads = s.q.shape[1]
    cells = programs.gate_programs(s.blocks, heads, s.heads_k, rows=16)
    read = meet(s, "choose_best", "load", s.q)
    wrote = meet(s, "choose_best", "store", s.selected)
    assert (read == wrote).all()
    mapped = of_queries(cells)
    has_past = np.vectorize(bool)(mapped)
    assert has_past.sum() >= s.q.shape[1] * 18
    assert (mapped == read)[has_past].all()


def test_lists_read_keys_and_write_the_rows_of_their_map(traced):
    s = traced
    arguments = s.lists.pairs, s.lists.cu_pairs, s.selected, s.blocks
    cells = programs.list_programs(*arguments, rows=1024)
    assert (meet(s, "attend_resident", "load", s.q) == of_queries(cells)).all()
    assert (meet(s, "attend_resident", "load", s.k) == of_keys(cells, s)).all()
    wrote = meet(s, "attend_resident", "store", by_slot(s))
    chosen = s.selected[..., :-1]
    for at in np.argwhere(chosen.numpy() >= 0):
        query, head, slot = at.tolist()
        assert wrote[query, head, slot] == {cells[query, head, chosen[tuple(at)]]}


def test_lists_of_several_programs_are_cut_like_the_tile_map(traced):
    s = traced
    arguments = s.lists.pairs, s.lists.cu_pairs, s.selected, s.blocks
    cells = programs.list_programs(*arguments, rows=4)
    list_of_tile, _ = route.tile_map(s.lists, 4)
    used = np.unique(cells[cells >= 0])
    assert used.tolist() == np.flatnonzero(list_of_tile.numpy() >= 0).tolist()
    assert len(used) > len(np.unique(list_of_tile[list_of_tile >= 0]))


def test_combine_reads_and_writes_the_queries_of_its_map(traced):
    s = traced
    cells = programs.query_programs(s.selected, s.blocks, rows=16)
    assert (meet(s, "combine_tile", "store", s.out) == of_queries(cells)).all()
    own = np.where(owned(s), cells, -1)
    assert (meet(s, "combine_tile", "load", s.k) == of_keys(own, s)).all()
    parts = meet(s, "combine_tile", "load", by_slot(s))
    for at in np.argwhere(s.selected[..., :-1].numpy() >= 0):
        query, head, _ = at
        assert parts[tuple(at)] == of_queries(cells)[query, head]


def owned(s):
    """Mark the own block of every query, (S, H, N)."""
    own = s.blocks.of_query[:, None] == torch.arange(len(s.blocks.start))
    return own[:, None].expand(-1, s.q.shape[1], -1).numpy()


def test_one_program_writes_the_gradients_of_a_key_in_every_kernel(traced):
    s = traced
    arguments = s.lists.pairs, s.lists.cu_pairs, s.selected, s.blocks
    past = programs.list_programs(*arguments, rows=2048)
    own = programs.own_programs(s.blocks, s.q.shape[1], s.heads_k)
    for gradient in (s.dk, s.dv):
        for kernel, cells in (("past_kernel", past), ("current_kernel", own)):
            wrote = meet(s, kernel, "store", gradient)
            assert (wrote == of_keys(cells, s)).all()
            assert max(map(len, wrote.flat)) == 1


def test_one_program_writes_the_gradient_of_a_query(traced):
    s = traced
    cells = programs.gradient_programs(s.selected, s.blocks, rows=16)
    wrote = meet(s, "queries_kernel", "store", s.dq)
    assert (wrote == of_queries(cells)).all()
    assert set(map(len, wrote.flat)) == {1}


def test_a_block_may_have_several_tiles_of_queries():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 90, 2, 8)
    s = step(q, k, v, moba_fast.partition([0, 90], block_size=40), topk=2)
    cells = programs.gradient_programs(s.selected, s.blocks, rows=32)
    assert (meet(s, "queries_kernel", "store", s.dq) == of_queries(cells)).all()
    own = np.where(owned(s), cells, -1)
    assert max(map(len, of_keys(own, s).flat)) == 2


def test_lists_of_other_blocks_are_refused(traced):
    s = traced
    n = len(s.blocks.start)
    with pytest.raises(ValueError, match=f"each of {n} blocks, got {n + 1}"):
        programs.list_programs([], [0] * (n + 2), s.selected, s.blocks, rows=16)

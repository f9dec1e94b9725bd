"""build_lists and tile_map: every pair once, in the list of its block, in order."""

import numpy as np
import pytest
import torch
from impls import REF, make_case

import moba_fast
from moba_fast.attend import past_lists
from moba_lab.agree import agree

route = pytest.importorskip("moba_fast.kernels.route", reason="triton is not here")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def routed(case, **fields):
    """Return selected of the reference and the blocks, as tensors."""
    case = case.replace(**fields)
    blocks = case.partition(REF)
    k_mean = REF.pool_keys(case.k, blocks)
    selected = torch.as_tensor(REF.select_blocks(case.q, k_mean, blocks, case.topk))
    cu_q, cu_k = (torch.tensor(cu) for cu in (case.cu_seqlens, case.cu_seqlens_k))
    blocks = moba_fast.partition(cu_k.to(DEVICE), case.block_size, cu_q.to(DEVICE))
    return selected.to(DEVICE), blocks


def expected_lists(selected, heads_k, n_blocks):
    """Walk all pairs in the order that a list has; return pairs and cu_pairs."""
    n_queries, heads, topk = selected.shape
    lists = [[] for _ in range(heads_k * n_blocks)]
    ratio, chosen = heads // heads_k, selected.cpu().numpy()
    for head in range(heads):
        for query in range(n_queries):
            for slot, block in enumerate(chosen[query, head, :-1]):
                if block >= 0:
                    pair = (query * heads + head) * (topk - 1) + slot
                    lists[head // ratio * n_blocks + block].append(pair)
    pairs = [pair for members in lists for pair in members]
    return np.array(pairs, int), np.cumsum([0, *map(len, lists)])


def check(selected, blocks, heads_k):
    lists = route.build_lists(selected, blocks, heads_k)
    pairs, cu_pairs = expected_lists(selected, heads_k, len(blocks.start))
    assert lists.pairs.dtype == lists.cu_pairs.dtype == torch.int32
    assert len(lists.pairs) == selected[..., :-1].numel()
    assert lists.slots == selected.shape[2] - 1
    agree(lists.cu_pairs, cu_pairs, "cu_pairs")
    agree(lists.pairs[: cu_pairs[-1]], pairs, "pairs")
    return lists


@pytest.fixture
def small_tiles(monkeypatch):
    """Take tiles so small that every program needs several."""
    monkeypatch.setattr(route, "COUNT_TILE", 8)
    monkeypatch.setattr(route, "RANK_TILE", 4)
    monkeypatch.setattr(route, "FEWEST_QUERIES", 16)


CASES = {
    "one sequence": make_case([60], block_size=4, topk=4),
    "a pack": make_case([17, 0, 1, 30, 0], block_size=3, topk=5, H=4, HK=2),
    "three heads in a group": make_case([40], block_size=4, topk=3, H=6, HK=2),
    "last queries of longer keys": make_case(
        [50, 9, 20], queries=[3, 0, 20], block_size=4, topk=4, H=2, HK=2
    ),
    "single-token blocks": make_case([40], block_size=1, topk=4),
    "nothing but current blocks": make_case([3, 2], block_size=4, topk=3),
    "more slots than blocks": make_case([20], block_size=5, topk=9),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tiles", ["small tiles", "tiles of use"])
def test_every_pair_is_in_the_list_of_its_block(case, tiles, request):
    if tiles == "small tiles":
        request.getfixturevalue("small_tiles")
    selected, blocks = routed(case)
    check(selected, blocks, case.k.shape[1])


@pytest.mark.parametrize("n_blocks", [33, 100, 1000])
def test_many_blocks(n_blocks):
    case = make_case([n_blocks], block_size=1, topk=4, H=2, HK=1)
    selected, blocks = routed(case, q=case.q[-30:], cu_seqlens=[0, 30])
    check(selected, blocks, 1)


def test_a_block_that_everybody_chose(small_tiles):
    selected, blocks = routed(make_case([64], block_size=4, topk=3, H=2, HK=1))
    selected[4:, :, 0], selected[4:, :, 1] = 0, -1
    check(selected, blocks, 1)


def test_few_counters_give_fewer_chunks(small_tiles, monkeypatch):
    selected, blocks = routed(make_case([60], block_size=4, topk=4, H=2, HK=1))
    assert route.query_chunks(60, 2, len(blocks.start)) == 4
    monkeypatch.setattr(route, "MOST_COUNTERS", 60)
    assert route.query_chunks(60, 2, len(blocks.start)) == 2
    check(selected, blocks, 1)


def test_the_lists_are_those_of_the_torch_path():
    case = make_case([40, 25], block_size=4, topk=4, H=6, HK=2)
    selected, blocks = routed(case)
    routing = moba_fast.route(selected, blocks)
    k = torch.empty(65, 2, 1, device="meta")
    other = past_lists(routing, blocks, selected, k, "aten")
    lists = check(selected, blocks, 2)
    agree(lists.cu_pairs, other.pack.cu_q, "cu_pairs")
    pairs = routing.place[other.pairs]
    agree(lists.pairs[: len(pairs)], pairs, "pairs")


def test_shares_of_queries_and_heads():
    case = make_case([30, 25], block_size=4, topk=4, H=4, HK=2)
    selected, blocks = routed(case)
    check(selected[20:41, 2:], blocks.of_queries(20, 41), 1)
    # Every other row of a wider tensor: no axis is dense.
    wide = torch.full((110, 4, 8), -1, dtype=torch.int32, device=DEVICE)
    wide[::2, :, ::2] = selected
    check(wide[::2, :, ::2], blocks, 2)


def test_nothing_to_list():
    case = make_case([9], block_size=4, topk=1)
    selected, blocks = routed(case)
    lists = check(selected, blocks, 1)
    list_of_tile, first_tile = route.tile_map(lists, 16)
    assert (list_of_tile == -1).all()
    assert len(first_tile) == 4
    empty = moba_fast.partition(torch.tensor([0, 0], device=DEVICE), 4)
    lists = check(selected[:0], empty, 1)
    assert [x.tolist() for x in route.tile_map(lists, 16)] == [[], [0]]
    # Keys without queries.
    lists = check(selected.new_empty(0, 2, 3), blocks.of_queries(0, 0), 1)
    assert lists.cu_pairs.tolist() == [0, 0, 0, 0]


def test_too_many_blocks_are_refused(monkeypatch):
    selected, blocks = routed(make_case([9], block_size=2, topk=2))
    monkeypatch.setattr(route, "MOST_BLOCKS", 4)
    with pytest.raises(
        ValueError, match="expected at most 4 blocks, got 5; take a lar"
    ):
        route.build_lists(selected, blocks, 1)


@pytest.mark.parametrize("rows", [1, 4, 16, 1000])
@pytest.mark.parametrize("lengths", [[60], [17, 0, 1, 30]])
def test_tiles_cover_every_list_once(lengths, rows, monkeypatch):
    monkeypatch.setattr(route, "MAP_TILE", 16)
    selected, blocks = routed(make_case(lengths, block_size=4, topk=4, H=4, HK=2))
    lists = check(selected, blocks, 2)
    list_of_tile, first_tile = (x.tolist() for x in route.tile_map(lists, rows))
    n_lists, cu_pairs = len(lists.cu_pairs) - 1, lists.cu_pairs.tolist()
    assert len(list_of_tile) == -(-len(lists.pairs) // rows) + n_lists
    assert len(first_tile) == n_lists + 1
    covered = []
    for t, i in enumerate(list_of_tile):
        if i >= 0:
            begin = cu_pairs[i] + (t - first_tile[i]) * rows
            assert cu_pairs[i] <= begin < cu_pairs[i + 1]
            covered += range(begin, min(begin + rows, cu_pairs[i + 1]))
    assert covered == list(range(cu_pairs[-1]))

"""List the queries of every block, by counting instead of sorting."""

import torch
import triton
import triton.language as tl

from moba_fast.kernels.tilings import cdiv
from moba_fast.route import Lists

# Counters of build_lists, 32 MiB of int32, unless there are more lists than that.
MOST_COUNTERS = 2**23
# Programs that keep every multiprocessor of a large GPU busy.
ENOUGH_PROGRAMS = 4096
FEWEST_QUERIES = 64
# Pairs that a program counts, and ranks among each other, at a time.
COUNT_TILE, RANK_TILE = 1024, 128
# Blocks times RANK_TILE are told apart in 32 bits.
MOST_BLOCKS = 2**32 // RANK_TILE
MAP_TILE = 256


def build_lists(selected, blocks, heads_k, most_counters=MOST_COUNTERS):
    """List, for every key/value head and block, the pairs that read it.

    A counting sort: every program counts the blocks that its share of the queries
    chose, a scan over all counts says where each share writes into each list, and every
    program writes. Atomic operations do nothing but count, so the result is the same on
    every run. Nothing waits for the device.

    Args:
        selected: (S, H, topk) int32 from `moba_fast.kernels.gate.select_blocks`.
        blocks: moba_fast.Blocks of these queries.
        heads_k: HK, divides H.
        most_counters: limit on the counters, 8 bytes each, where that leaves one for
            every query head and block.

    Returns:
        Lists.

    Raises:
        ValueError: if there are more than 2^25 blocks.
    """
    if blocks.start.shape[0] > MOST_BLOCKS:
        raise ValueError(
            f"expected at most {MOST_BLOCKS} blocks, got {blocks.start.shape[0]}; "
            f"take a larger block_size than {blocks.block_size}"
        )
    n_queries, heads, topk = selected.shape
    slots, n_lists = topk - 1, heads_k * blocks.start.shape[0]
    pairs = selected.new_empty(n_queries * heads * slots)
    if pairs.shape[0] == 0 or n_lists == 0:
        return Lists(pairs, selected.new_zeros(n_lists + 1), slots)
    if selected.stride(2) != 1:
        selected = selected.contiguous()
    ratio, n_blocks = heads // heads_k, blocks.start.shape[0]
    chunks = query_chunks(n_queries, heads, n_blocks, most_counters)
    chunk_queries = cdiv(n_queries, chunks)
    counts = selected.new_zeros(heads * n_blocks * chunks + 1)
    sizes = (n_queries, heads, slots, n_blocks, ratio, chunks, chunk_queries)
    strides, grid = selected.stride()[:2], (chunks * heads,)
    count_pairs[grid](selected, counts, *strides, *sizes, COUNT_TILE, num_warps=4)
    places = torch.cumsum(counts, 0, dtype=torch.int32)
    cu_pairs = selected.new_empty(n_lists + 1)
    place_pairs[grid](
        *(selected, places, pairs, cu_pairs, *strides, *sizes, RANK_TILE, MAP_TILE),
        num_warps=4,
        num_stages=1,
    )
    return Lists(pairs, cu_pairs, slots)


def query_chunks(n_queries, heads, n_blocks, most_counters=MOST_COUNTERS):
    """Return into how many chunks build_lists divides the queries of every head.

    Example: enough to do for all programs, unless counters become too many.
        >>> query_chunks(2**20, heads=16, n_blocks=256)
        256
        >>> query_chunks(2**20, heads=16, n_blocks=8192)
        64
        >>> query_chunks(100, heads=16, n_blocks=8192)
        2
    """
    most = max(1, min(most_counters, MOST_COUNTERS) // (heads * n_blocks))
    wanted = cdiv(ENOUGH_PROGRAMS, heads)
    return min(most, wanted, cdiv(n_queries, FEWEST_QUERIES))


@triton.jit
def chunk_of_program(heads, ratio, n_queries, chunks, chunk_queries, n_blocks):
    """Return head, first query and queries of a program, and its first counter."""
    head, chunk = tl.program_id(0) % heads, tl.program_id(0) // heads
    first = chunk * chunk_queries
    kv_head, member = head // ratio, head % ratio
    counter = (kv_head * n_blocks * ratio + member) * chunks + chunk
    return head, first, tl.minimum(chunk_queries, n_queries - first), counter


@triton.jit
def load_blocks(selected, stride_query, stride_head, head, first, pair, n_pairs, slots):
    """Load the block of some pairs of a chunk, -1 where there is none."""
    query = (first + pair // slots).to(tl.int64)
    row = selected + query * stride_query + head.to(tl.int64) * stride_head
    return tl.load(row + pair % slots, mask=pair < n_pairs, other=-1)


@triton.jit
def count_pairs(
    selected,
    counts,
    stride_query,
    stride_head,
    n_queries,
    heads,
    slots,
    n_blocks,
    ratio,
    chunks,
    chunk_queries,
    TILE: tl.constexpr,
):
    """Count the pairs of every list in a chunk of the queries of a head.

    counts is 0, then (HK, N, ratio, chunks): the scan over it is the first place of
    each, and behind them the number of all pairs.
    """
    head, first, queries, counter = chunk_of_program(
        heads, ratio, n_queries, chunks, chunk_queries, n_blocks
    )
    n_pairs = queries * slots
    for start in range(0, n_pairs, TILE):
        pair = start + tl.arange(0, TILE)
        block = load_blocks(
            selected, stride_query, stride_head, head, first, pair, n_pairs, slots
        )
        place = counts + 1 + counter + block * (ratio * chunks)
        tl.atomic_add(place, 1, mask=block >= 0, sem="relaxed")


@triton.jit
def place_pairs(
    selected,
    places,
    pairs,
    cu_pairs,
    stride_query,
    stride_head,
    n_queries,
    heads,
    slots,
    n_blocks,
    ratio,
    chunks,
    chunk_queries,
    TILE: tl.constexpr,
    COPY_TILE: tl.constexpr,
):
    """Write the pairs of a chunk of the queries of a head into their lists, in order.

    places is (HK, N, ratio, chunks), the next free place of every list for a chunk, and
    the number of all pairs. Only this program reads and moves those of its chunk.
    """
    head, first, queries, counter = chunk_of_program(
        heads, ratio, n_queries, chunks, chunk_queries, n_blocks
    )
    if (first == 0) & (head % ratio == 0):
        copy_first_places(
            places, cu_pairs, head // ratio, heads, n_blocks, ratio, chunks, COPY_TILE
        )
    n_pairs = queries * slots
    i = tl.arange(0, TILE)
    block = load_blocks(
        selected, stride_query, stride_head, head, first, i, n_pairs, slots
    )
    for start in range(0, n_pairs, TILE):
        pair = start + i
        following = load_blocks(
            selected,
            stride_query,
            stride_head,
            head,
            first,
            pair + TILE,
            n_pairs,
            slots,
        )
        place = places + counter + block * (ratio * chunks)
        free = tl.load(place, mask=block >= 0, other=0)
        # Pairs of one block that come earlier: one comparison says both.
        key = block * TILE
        ahead = (key + i)[:, None] - key[None, :]
        earlier = ahead.to(tl.uint32, bitcast=True) < i.to(tl.uint32)[None, :]
        rank = tl.sum(earlier.to(tl.int32), 0)
        row = (first + pair // slots) * heads + head
        tl.store(pairs + free + rank, row * slots + pair % slots, mask=block >= 0)
        # All loads of the places come before they move, all moves before the next tile.
        tl.debug_barrier()
        tl.atomic_add(place, 1, mask=block >= 0, sem="relaxed")
        tl.debug_barrier()
        block = following


@triton.jit
def copy_first_places(
    places, cu_pairs, kv_head, heads, n_blocks, ratio, chunks, TILE: tl.constexpr
):
    """Write where the lists of a key/value head begin, before its places move.

    The program of the last one also writes where its last list ends.
    """
    begin = kv_head * n_blocks
    end = begin + n_blocks
    end += (end * ratio == heads * n_blocks).to(tl.int32)
    for start in range(begin, end, TILE):
        i = start + tl.arange(0, TILE)
        place = tl.load(places + i * (ratio * chunks), mask=i < end, other=0)
        tl.store(cu_pairs + i, place, mask=i < end)
    # Nobody else moves what is read here.
    tl.debug_barrier()


def tile_map(lists, rows):
    """Cut every list into tiles of `rows` pairs, for kernels that work tile by tile.

    List i has room for its tiles from `first_tile[i] = cu_pairs[i] // rows + i` on,
    which needs no scan. So tiles without pairs lie between those of two lists.

    Args:
        lists: Lists.
        rows: pairs per tile.

    Returns:
        list_of_tile: (cdiv(S * H * slots, rows) + HK * N,) int32; -1 for tiles without
            pairs, which may stand anywhere.
        first_tile: (HK * N + 1,) int32. Tile t of list i is its pairs from
            `(t - first_tile[i]) * rows` on.
    """
    n_lists = lists.cu_pairs.shape[0] - 1
    if n_lists == 0:
        return lists.cu_pairs.new_empty(0), lists.cu_pairs.new_zeros(1)
    tiles = cdiv(lists.pairs.shape[0], rows) + n_lists
    list_of_tile = lists.cu_pairs.new_empty(tiles)
    first_tile = lists.cu_pairs.new_empty(n_lists + 1)
    grid = (cdiv(max(tiles, n_lists + 1), MAP_TILE),)
    map_tiles[grid](
        lists.cu_pairs, list_of_tile, first_tile, tiles, n_lists, rows, MAP_TILE
    )
    return list_of_tile, first_tile


@triton.jit
def map_tiles(
    cu_pairs, list_of_tile, first_tile, tiles, n_lists, rows, TILE: tl.constexpr
):
    """Write the first tile of some lists, and find the list of some tiles."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    pairs = tl.load(cu_pairs + i, mask=i <= n_lists, other=0)
    tl.store(first_tile + i, pairs // rows + i, mask=i <= n_lists)
    # The last list that does not begin after tile i, by bisection.
    low, high = tl.zeros_like(i), tl.zeros_like(i) + n_lists
    steps = n_lists
    while steps > 0:
        middle = (low + high) // 2
        begin = tl.load(cu_pairs + middle) // rows + middle
        low, high = (
            tl.where(begin <= i, middle, low),
            tl.where(begin <= i, high, middle),
        )
        steps //= 2
    begin, end = tl.load(cu_pairs + low), tl.load(cu_pairs + low + 1)
    filled = i - begin // rows - low < tl.cdiv(end - begin, rows)
    tl.store(list_of_tile + i, tl.where(filled, low, -1), mask=i < tiles)

"""Attend to one block at a time, many blocks per call, and keep the log-sum-exp."""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from moba_fast._flash import default_kernel, takes_batches
from moba_fast._packs import Pack, even_batches
from moba_fast.device import capturing
from moba_fast.varlen import attention


@dataclass(frozen=True)
class PastLists:
    """Hold the lists of a routing in the order in which a kernel takes them.

    Lists of query heads that share a key head are merged. Kernels that want batches get
    lists of about the same length one after the other, padded to one length.

    Attributes:
        rows: (T,) which row of (S * H, D) every place in the lists has.
        pairs: (T,) the pair at every place; None: place i holds pair i.
        valid: (T,) bool, False where a place is padding; None: none is.
        keys: (TK,) which row of (HK * SK, D) the lists read; None: all, in order.
        pack: Pack over the lists and the blocks that they read.
    """

    rows: torch.Tensor
    pairs: torch.Tensor | None
    valid: torch.Tensor | None
    keys: torch.Tensor | None
    pack: Pack

    def place_of_pairs(self):
        """Return the place of every pair, (P,); None: pair i is at place i."""
        if self.pairs is None:
            return None
        place = torch.arange(len(self.pairs), device=self.pairs.device)
        pairs = self.pairs
        if self.valid is not None:
            place, pairs = place[self.valid], pairs[self.valid]
        places = torch.empty_like(place)
        places[pairs] = place
        return places


def attend_current(q, k, v, blocks, softmax_scale, kernel=None, first=0):
    """Attend from every query to the keys of its own block up to its own position.

    Same contract as moba_ref.attend_current, with out in q's dtype, and the kernel that
    attends (see `moba_fast.varlen.attention`). Where q is a share of the queries,
    `first` is the one that it begins with.

    Example: the first token of a block reads only itself.
        >>> from moba_fast.blocks import partition
        >>> v = torch.tensor([[[1.0]], [[3.0]], [[5.0]]])
        >>> q = k = torch.zeros(3, 1, 1)
        >>> attend_current(q, k, v, partition([0, 3], block_size=2), 1.0)[0].ravel()
        tensor([1., 2., 5.])
    """
    keys, pack = current_pack(blocks, first, first + len(q))
    return attention(q, k[keys], v[keys], pack, True, softmax_scale, kernel)


def attend_past(q, k, v, routing, blocks, softmax_scale, kernel=None):
    """Attend from the queries of every list to all keys of the list's block.

    Same contract as moba_ref.attend_past, with out in q's dtype, and the kernel that
    attends (see `moba_fast.varlen.attention`).

    Example: query 2 chose block 0 and gets the mean of its values.
        >>> from moba_fast.blocks import partition
        >>> from moba_fast.route import route
        >>> blocks = partition([0, 3], block_size=2)
        >>> routing = route(torch.tensor([[[-1, 0]], [[-1, 0]], [[0, 1]]]), blocks)
        >>> q, v = torch.zeros(3, 1, 1), torch.tensor([[[1.0]], [[3.0]], [[5.0]]])
        >>> attend_past(q, q, v, routing, blocks, 1.0)
        (tensor([[2.]]), tensor([0.6931]))
    """
    lists = past_lists(routing, blocks, q, k, kernel)
    out, lse = attend_lists(q, k, v, lists, softmax_scale, kernel)
    places = lists.place_of_pairs()
    return (out, lse) if places is None else (out[places], lse[places])


def attend_lists(q, k, v, lists, softmax_scale, kernel):
    """Attend as `attend_past` does, with results in the order of the lists.

    Returns:
        out: (T, D) in q's dtype.
        lse: (T,) float32 or better.
    """
    pack = lists.pack
    if takes_batches(kernel or default_kernel(q)):
        # A batch is gathered when it is its turn, and is still in the cache then.
        pack = replace(pack, rows_q=lists.rows, rows_k=lists.keys)
        operands = q.flatten(0, 1)[:, None], rows_of(k), rows_of(v)
    else:
        operands = gather_rows(q, lists), gather_keys(k, lists), gather_keys(v, lists)
    out, lse = attention(*operands, pack, False, softmax_scale, kernel)
    return out[:, 0], lse[:, 0]


def current_pack(blocks, first, last):
    """Take the blocks in which queries stand as sequences of these queries and keys.

    Args:
        blocks: Blocks.
        first: the first query.
        last: one past the last query.

    Returns:
        keys: slice, all keys that these queries read in the blocks where they stand.
        pack: Pack for these queries and keys; the last block ends where the last
            query stands.

    Example: queries 5 to 7 of 10 tokens stand in blocks 1 and 2 of 3 tokens.
        >>> from moba_fast.blocks import partition
        >>> keys, pack = current_pack(partition([0, 10], block_size=3), 5, 8)
        >>> keys, pack.cu_q.tolist(), pack.cu_k.tolist()
        (slice(3, 8, None), [0, 1, 3], [0, 3, 5])
    """
    if first == last:
        none = blocks.start.new_zeros(1, dtype=torch.int32)
        return slice(0, 0), Pack(none, none, 0, 0)
    (block, low, _), (last_block, _, position) = map(blocks.locate, (first, last - 1))
    starts = blocks.start[block : last_block + 1]
    ends = pad(starts, (0, 1), value=position + 1)
    cu_q = torch.searchsorted(blocks.position[first:last], ends)
    pack = Pack(cu_q.int(), (ends - low).int(), blocks.longest, blocks.longest)
    return slice(low, position + 1), pack


def past_lists(routing, blocks, q, k, kernel=None):
    """Take every list as a sequence of its queries and of the keys of its block.

    Query heads that share a key head and chose one block read the same keys, so their
    lists become one.

    Args:
        routing: Routing.
        blocks: Blocks.
        q: (S, H, D).
        k: (SK, HK, D).
        kernel: the kernel that attends.
    """
    heads, heads_k, n_blocks = q.shape[1], k.shape[1], len(blocks.start)
    rows, pairs, cu_q = routing.rows(heads), None, routing.cu_pairs
    if heads > heads_k:
        pairs, cu_q = merged_order(routing, (heads_k, heads // heads_k, n_blocks))
        rows = rows[pairs]
    first = torch.arange(heads_k, device=cu_q.device)[:, None] * len(k)
    cu_k = pad((first + blocks.start).flatten(), (0, 1), value=heads_k * len(k))
    if takes_batches(kernel or default_kernel(q)):
        return evened(rows, pairs, Pack(cu_q, cu_k, 0, blocks.longest))
    if capturing(cu_q):
        longest = len(rows)
    else:
        longest = int(cu_q.diff().max()) if n_blocks else 0
    pack = Pack(cu_q.int(), cu_k.int(), longest, blocks.longest)
    return PastLists(rows, pairs, None, None, pack)


def evened(rows, pairs, pack):
    """Bring lists into the order and to the lengths that batches want."""
    queries, valid, keys, pack = even_batches(pack)
    pairs = queries if pairs is None else pairs[queries]
    return PastLists(rows[queries], pairs, valid, keys, pack)


def merged_order(routing, shape):
    """Sort the pairs by key head and block, then by query head and query.

    Args:
        routing: Routing.
        shape: (HK, H / HK, N).

    Returns:
        pairs: (P,) int64.
        cu_q: (HK * N + 1,) first place of every merged list, then P.
    """
    counts = routing.cu_pairs.diff().view(shape).transpose(1, 2)
    first = routing.cu_pairs[:-1].view(shape).transpose(1, 2).flatten()
    places = pad(counts.flatten().cumsum(0), (1, 0))
    place = torch.arange(len(routing.query), device=places.device)
    part = torch.searchsorted(places[1:], place, right=True)
    part = part.clamp(max=max(len(first) - 1, 0))
    # Padding behind the lists stays where it is.
    pairs = torch.where(place < places[-1], first[part] + place - places[part], place)
    return pairs, places[:: shape[1]]


def gather_rows(x, lists):
    """Bring the rows of x (S, H, D) into the order of the lists, (T, 1, D)."""
    return x.flatten(0, 1).index_select(0, lists.rows)[:, None]


def gather_keys(x, lists):
    """Bring the rows of x (SK, HK, D) into the order of the lists, (TK, 1, D)."""
    rows = rows_of(x)
    return rows if lists.keys is None else rows.index_select(0, lists.keys)


def rows_of(x):
    """List the rows of x (S, H, D) head by head, (H * S, 1, D)."""
    return x.transpose(0, 1).flatten(0, 1)[:, None]

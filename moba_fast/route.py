"""Turn the choice around: from the blocks of a query to the queries of a block."""

from dataclasses import dataclass

import torch

from moba_fast.device import capturing


@dataclass(frozen=True)
class Routing:
    """List, for every head and block, the queries that chose it as a past block.

    Same contract as moba_ref.Routing, as int64 tensors. While a CUDA graph is captured
    P is an upper bound: pairs from cu_pairs[-1] on are padding that no list holds.

    Attributes:
        slots: columns of `selected` that name past blocks; None: those in use.
        place: (P,) where in `selected`, without its last column and flattened, each
            pair is named; None: not kept.
    """

    query: torch.Tensor
    slot: torch.Tensor
    cu_pairs: torch.Tensor
    slots: int | None = None
    place: torch.Tensor | None = None

    @property
    def entry(self):
        """The list of every pair, (P,): head * N + block."""
        pair = torch.arange(len(self.query), device=self.query.device)
        entry = torch.searchsorted(self.cu_pairs[1:], pair, right=True)
        return entry.clamp(max=len(self.cu_pairs) - 2)

    def rows(self, heads):
        """Return the row of every pair among all (query, head), (P,)."""
        if self.place is not None:
            return self.place // max(self.slots, 1)
        n_blocks = (len(self.cu_pairs) - 1) // heads
        return self.query * heads + self.entry // max(n_blocks, 1)


@dataclass(frozen=True)
class Lists:
    """Hold the pairs of every list, a key/value head and a block of it.

    A pair is a query, a query head and a slot that names a past block. Its id is
    `(query * H + head) * slots + slot`. List `kv_head * N + block` holds the pairs that
    read this block: `pairs[cu_pairs[list] : cu_pairs[list + 1]]`, by query head of the
    group, then by query, both ascending.

    Attributes:
        pairs: (S * H * slots,) int32 pair ids; undefined from cu_pairs[-1] on.
        cu_pairs: (HK * N + 1,) int32 first place of every list, then all pairs.
        slots: columns of `selected` that name past blocks.
    """

    pairs: torch.Tensor
    cu_pairs: torch.Tensor
    slots: int


def route(selected, blocks):
    """Sort the routed pairs by head, block and query.

    Same contract as moba_ref.route. The sort is stable, so the result is the same on
    every run and device.

    Example: block 0 was chosen by queries 2, 4 and 5, block 1 by query 5.
        >>> from moba_fast.blocks import partition
        >>> rows = [[-1, -1, 0], [-1, -1, 0], [0, -1, 1], [-1, -1, 1]]
        >>> rows += [[0, -1, 2], [0, 1, 2]]
        >>> blocks = partition([0, 6], block_size=2)
        >>> routing = route(torch.tensor(rows)[:, None], blocks)
        >>> routing.query.tolist(), routing.cu_pairs.tolist()
        ([2, 4, 5, 5], [0, 3, 4, 4])
    """
    past = selected[..., :-1].int()
    _, heads, slots = past.shape
    n_lists = heads * len(blocks.start)
    head = torch.arange(heads, dtype=torch.int32, device=past.device)[:, None]
    # Padding sorts after all lists.
    entry = (head * len(blocks.start) + past).masked_fill(past < 0, n_lists)
    entry, order = entry.flatten().sort(stable=True)
    lists = torch.arange(n_lists + 1, dtype=torch.int32, device=past.device)
    cu_pairs = torch.searchsorted(entry, lists)
    if not capturing(past):
        order = order[: cu_pairs[-1].item()]
    query, slot = order // max(heads * slots, 1), order % max(slots, 1)
    return Routing(query, slot, cu_pairs, slots, order)

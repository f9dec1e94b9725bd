"""Turn the choice around: from the blocks of a query to the queries of a block."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from moba_fast.blocks import expand_runs


@dataclass(frozen=True)
class Routing:
    """List, for every head and block, the queries that chose it as a past block.

    Same contract as moba_ref.Routing, as int64 tensors.
    """

    query: torch.Tensor
    slot: torch.Tensor
    cu_pairs: torch.Tensor

    @property
    def entry(self):
        """The list of every pair, (P,): head * N + block."""
        return expand_runs(self.cu_pairs.diff())


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
    past, n_blocks = selected[..., :-1], len(blocks.start)
    query, head, slot = (past >= 0).nonzero(as_tuple=True)
    entry = head * n_blocks + past[query, head, slot]
    order = entry.argsort(stable=True)
    counts = torch.bincount(entry, minlength=selected.shape[1] * n_blocks)
    return Routing(query[order], slot[order], pad(counts.cumsum(0), (1, 0)))

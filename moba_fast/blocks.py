"""Cut packed sequences into blocks."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch.nn.functional import pad

from moba_fast.device import expand_runs, upload


@dataclass(frozen=True)
class Blocks:
    """Hold where every block begins and ends and where every query stands.

    Same contract as moba_ref.Blocks, as int64 tensors on one device, with what the host
    knows of them.

    Attributes:
        longest: tokens of the longest block, 0 where there is no block.
        offsets: cu_k and cu_q, each (B+1,) int64 on the CPU.
    """

    block_size: int
    cu_seqlens: torch.Tensor
    cu_blocks: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    of_token: torch.Tensor
    position: torch.Tensor
    of_query: torch.Tensor
    first_of_query: torch.Tensor
    longest: int
    offsets: tuple

    @cached_property
    def cu_queries(self):
        """First query of every block, then their number: (N + 1,) int64.

        Example: queries 0 and 1 stand in blocks 1 and 2.
            >>> partition([0, 5], block_size=2, cu_seqlens_q=[0, 2]).cu_queries
            tensor([0, 0, 1, 2])
        """
        ends = pad(self.start, (0, 1), value=int(self.offsets[0][-1]))
        return torch.searchsorted(self.position, ends)

    def of_queries(self, first, last):
        """Return the same blocks, for the queries first to last - 1 only."""
        if first == 0 and last == self.position.shape[0]:
            return self
        return self.of_some(slice(first, last))

    def of_some(self, queries):
        """Return the same blocks, for some queries only.

        Args:
            queries: slice, or (n,) int64 in ascending order.
        """
        names = ("position", "of_query", "first_of_query")
        return replace(self, **{n: getattr(self, n)[queries] for n in names})

    def locate(self, query):
        """Say where a query stands, without waiting for the device.

        Returns:
            block: its current block.
            start: first key of that block.
            position: its own key.

        Example: query 2 of a pack is the last of the second sequence's 4 keys.
            >>> partition([0, 5, 9], block_size=3, cu_seqlens_q=[0, 2, 3]).locate(2)
            (3, 8, 8)
        """
        cu_k, cu_q = self.offsets
        sequence = int(torch.searchsorted(cu_q, query, right=True)) - 1
        begin, end = cu_k[sequence : sequence + 2].tolist()
        local = query + end - begin - int(cu_q[sequence + 1])
        before = (cu_k[: sequence + 1].diff() + self.block_size - 1) // self.block_size
        block = local // self.block_size
        start = begin + block * self.block_size
        return int(before.sum()) + block, start, begin + local


def partition(cu_seqlens, block_size, cu_seqlens_q=None):
    """Cut every sequence of a pack into blocks of block_size tokens.

    Same contract as moba_ref.partition. Offsets may be tensors on any device, which
    decides the device of the result; they are checked by `moba_attention`, not here.

    Note that `cu_seqlens` are the offsets of the keys here, while `moba_attention`
    names the offsets of the queries so.

    Example: sequences of 9, 6 and 10 tokens.
        >>> blocks = partition([0, 9, 15, 25], block_size=4)
        >>> blocks.start
        tensor([ 0,  4,  8,  9, 13, 15, 19, 23])
        >>> blocks.end - blocks.start
        tensor([4, 4, 1, 4, 2, 4, 4, 2])
        >>> blocks.of_query[20].item(), blocks.first_of_query[20].item()
        (6, 5)
    """
    cu_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    device = torch.as_tensor(cu_seqlens).device
    host = [torch.as_tensor(cu).cpu().long() for cu in (cu_seqlens, cu_q)]
    return lay_out(*host, block_size, device)


def lay_out_once(cu_k, cu_q, block_size, device):
    """Return what `lay_out` returns, the same object if the last call asked for it.

    Layers of a model ask for the same blocks one after the other, and on a GPU it takes
    longer to launch the work than short inputs take for all the rest. The last result
    stays in memory, 32 bytes for every token. The offsets are tuples of integers here,
    so that asking makes no tensor.
    """
    stream = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            # What a graph reads must be as old as the graph.
            return lay_out_on.__wrapped__(None, cu_k, cu_q, block_size, device)
        stream = torch.cuda.current_stream(device).cuda_stream
    return lay_out_on(stream, cu_k, cu_q, block_size, device)


@lru_cache(maxsize=1)
def lay_out_on(stream, cu_k, cu_q, block_size, device):
    """Build `Blocks` in a stream; another one would have to wait for it."""
    cu_k, cu_q = (torch.tensor(x, dtype=torch.int64) for x in (cu_k, cu_q))
    return lay_out(cu_k, cu_q, block_size, device)


def lay_out(cu_k, cu_q, block_size, device):
    """Build `Blocks` on a device from offsets on the host, without waiting for it.

    Args:
        cu_k: (B+1,) int64 on the CPU, offsets of the keys.
        cu_q: (B+1,) int64 on the CPU, offsets of the queries.
        block_size: tokens per block.
        device: where the result goes.
    """
    if len(cu_k) == 2:
        return lay_out_one(cu_k, cu_q, block_size, device)
    lengths = cu_k.diff()
    per_sequence = (lengths + block_size - 1) // block_size
    cu_blocks = pad(per_sequence.cumsum(0), (1, 0))
    longest, offsets = min(block_size, int(lengths.max())), (cu_k, cu_q)
    n_blocks, n_keys, n_queries = (int(x[-1]) for x in (cu_blocks, cu_k, cu_q))
    cu_k, cu_q, cu_blocks = (upload(x, device) for x in (cu_k, cu_q, cu_blocks))

    sequence = expand_runs(cu_blocks.diff(), n_blocks)
    local = torch.arange(n_blocks, device=device) - cu_blocks[sequence]
    start = cu_k[sequence] + local * block_size
    end = torch.minimum(start + block_size, cu_k[sequence + 1])
    of_token = expand_runs(end - start, n_keys)
    sequence_of_query = expand_runs(cu_q.diff(), n_queries)
    skipped = (cu_k - cu_q)[1:][sequence_of_query]
    position = torch.arange(n_queries, device=device) + skipped
    return Blocks(
        block_size=block_size,
        cu_seqlens=cu_k,
        cu_blocks=cu_blocks,
        start=start,
        end=end,
        of_token=of_token,
        position=position,
        of_query=of_token[position],
        first_of_query=cu_blocks[sequence_of_query],
        longest=longest,
        offsets=offsets,
    )


def lay_out_one(cu_k, cu_q, block_size, device):
    """Build `Blocks` of one sequence, with a third of the work to launch."""
    n_keys, n_queries = int(cu_k[1]), int(cu_q[1])
    token = torch.arange(n_keys, device=device)
    of_token = token // block_size
    start = torch.arange(0, n_keys, block_size, device=device)
    cu_blocks = torch.tensor([0, len(start)])
    return Blocks(
        block_size=block_size,
        cu_seqlens=upload(cu_k, device),
        cu_blocks=upload(cu_blocks, device),
        start=start,
        end=(start + block_size).clamp(max=n_keys),
        of_token=of_token,
        position=token[n_keys - n_queries :],
        of_query=of_token[n_keys - n_queries :],
        first_of_query=torch.zeros(n_queries, dtype=torch.int64, device=device),
        longest=min(block_size, n_keys),
        offsets=(cu_k, cu_q),
    )

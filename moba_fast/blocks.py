"""Cut packed sequences into blocks."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class Blocks:
    """Hold where every block begins and ends and where every query stands.

    Same contract as moba_ref.Blocks, as int64 tensors on one device.
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


def partition(cu_seqlens, block_size, cu_seqlens_q=None):
    """Cut every sequence of a pack into blocks of block_size tokens.

    Same contract as moba_ref.partition. Offsets may be tensors on any device, which
    decides the device of the result; they are checked by `moba_attention`, not here.

    Example: sequences of 9, 6 and 10 tokens.
        >>> blocks = partition([0, 9, 15, 25], block_size=4)
        >>> blocks.start
        tensor([ 0,  4,  8,  9, 13, 15, 19, 23])
        >>> blocks.end - blocks.start
        tensor([4, 4, 1, 4, 2, 4, 4, 2])
        >>> blocks.of_query[20].item(), blocks.first_of_query[20].item()
        (6, 5)
    """
    cu_k = torch.as_tensor(cu_seqlens).long()
    cu_q = cu_k if cu_seqlens_q is None else torch.as_tensor(cu_seqlens_q).long()
    n_of_sequence = (cu_k.diff() + block_size - 1) // block_size
    cu_blocks = pad(n_of_sequence.cumsum(0), (1, 0))
    sequence = expand_runs(n_of_sequence)
    local = torch.arange(len(sequence), device=cu_k.device) - cu_blocks[sequence]
    start = cu_k[sequence] + local * block_size
    end = torch.minimum(start + block_size, cu_k[sequence + 1])
    of_token = expand_runs(end - start)
    sequence_of_query = expand_runs(cu_q.diff())
    skipped = (cu_k - cu_q)[1:][sequence_of_query]
    position = torch.arange(len(skipped), device=cu_k.device) + skipped
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
    )


def expand_runs(lengths):
    """Repeat every index as often as its length says.

    Example:
        >>> expand_runs(torch.tensor([2, 0, 3]))
        tensor([0, 0, 2, 2, 2])
    """
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

"""Read `Blocks` and arrays of either package, and say what is wrong with them."""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Hold `Blocks` as NumPy arrays, whichever package made them.

    The fields are those of `moba_ref.blocks.Blocks`; S, SK and N are their lengths.
    """

    block_size: int
    start: np.ndarray
    end: np.ndarray
    of_token: np.ndarray
    of_query: np.ndarray
    position: np.ndarray
    first_of_query: np.ndarray
    cu_blocks: np.ndarray
    cu_seqlens: np.ndarray
    S: int
    SK: int
    N: int

    @property
    def packed(self):
        """Return whether more than one sequence has tokens."""
        return np.count_nonzero(np.diff(self.cu_seqlens)) > 1


def array(values):
    """Return an array, a list or a tensor (any device, any dtype) as NumPy."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.double()
    return np.asarray(values)


def layout(blocks):
    """Return the fields of blocks as NumPy arrays.

    Raises:
        TypeError: if an attribute of `Blocks` is missing.
    """
    names = [field.name for field in fields(Layout) if field.type is np.ndarray]
    missing = [name for name in names if not hasattr(blocks, name)]
    if missing:
        raise TypeError(
            f"expected the Blocks that partition() returns, got "
            f"{type(blocks).__name__} without {', '.join(missing)}"
        )
    arrays = {name: array(getattr(blocks, name)) for name in names}
    return Layout(
        block_size=int(blocks.block_size),
        S=len(arrays["of_query"]),
        SK=len(arrays["of_token"]),
        N=len(arrays["start"]),
        **arrays,
    )


def check_selected(selected, grid):
    """Return selected as an integer array (S, H, topk) or say what is wrong with it."""
    selected = array(selected)
    if selected.ndim != 3 or len(selected) != grid.S:
        raise ValueError(
            f"selected must be (S, H, topk) with S={grid.S} queries, "
            f"got shape {selected.shape}"
        )
    if selected.dtype.kind not in "iu":
        raise TypeError(
            f"selected must hold block ids as integers, got {selected.dtype}"
        )
    if selected.size and not -1 <= selected.min() <= selected.max() < grid.N:
        raise ValueError(
            f"block ids must be -1 (none) to {grid.N - 1}, got "
            f"{selected.min()} to {selected.max()}; were selected and blocks made "
            f"from the same cu_seqlens and block_size?"
        )
    return selected


def check_index(index, count, name):
    """Return index as an int or raise IndexError unless it is in range(count)."""
    if not 0 <= int(index) < count:
        raise IndexError(f"{name} must be 0 to {count - 1}, got {index}")
    return int(index)

"""Check the pages, page table and lengths that somebody hands over to a cache."""

import torch

from moba_fast.cache_checks import check_numbers
from moba_fast.checks import DTYPES
from moba_fast.gate import gate_dtype


def check_pages(k_pages, v_pages, k_mean):
    """Raise unless the tensors of a pool fit together.

    Raises:
        TypeError: if one is no tensor, or a dtype is wrong.
        ValueError: if a shape or device is wrong.
    """
    given = {"k_pages": k_pages, "v_pages": v_pages}
    if k_mean is not None:
        given["k_mean"] = k_mean
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape or 0 in k_pages.shape[1:]:
        raise ValueError(
            f"k_pages and v_pages must be (pages, block_size, HK, D) with one shape; "
            f"got {tuple(k_pages.shape)} and {tuple(v_pages.shape)}"
        )
    expected = {"k_pages": k_pages.dtype, "v_pages": k_pages.dtype}
    if k_pages.dtype in DTYPES:
        expected["k_mean"] = gate_dtype(k_pages)
    dtypes = {name: x.dtype for name, x in given.items()}
    if k_pages.dtype not in DTYPES or any(
        expected[name] != dtype for name, dtype in dtypes.items()
    ):
        raise TypeError(
            f"k_pages and v_pages must both be float64, float32, bfloat16 or float16, "
            f"and k_mean float32, or float64 with them; got {dtypes}"
        )
    if len({x.device for x in given.values()}) > 1:
        devices = {name: str(x.device) for name, x in given.items()}
        raise ValueError(f"all tensors must be on one device, got {devices}")
    shape = (len(k_pages), *k_pages.shape[2:])
    if k_mean is not None and k_mean.shape != shape:
        raise ValueError(
            f"k_mean must be (pages, HK, D) = {shape}, got {tuple(k_mean.shape)}"
        )


def check_table(page_table, pages):
    """Return a page table as int64 on the host, or say what is wrong with it.

    Args:
        page_table: (B, M) integers, tensor or nested list; -1 where there is no page.
        pages: pages of the pool.

    Raises:
        TypeError: if it does not hold integers.
        ValueError: if it is not two-dimensional, names a page that there is not, has
            a page after a -1, or has a page twice in one row.
    """
    table = torch.as_tensor(page_table).to("cpu")
    if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
        raise TypeError(f"page_table must hold integers, got {table.dtype}")
    if table.ndim != 2:
        raise ValueError(
            f"page_table must be (sequences, pages of each), with -1 after the last "
            f"page of a sequence; got shape {tuple(table.shape)}"
        )
    table = table.long()
    wrong = (table < -1) | (table >= pages)
    wrong[:, 1:] |= (table[:, 1:] >= 0) & (table[:, :-1] < 0)
    ordered = table.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    wrong_rows = (wrong.any(1) | twice.any(1)).nonzero()
    if len(wrong_rows):
        b = wrong_rows[0].item()
        raise ValueError(
            f"a row of page_table must name different pages from 0 to {pages - 1}, "
            f"then -1; row {b} is {table[b].tolist()[:16]}"
        )
    return table


def check_hand_over(k_pages, page_table, lengths, free_pages):
    """Return page table, lengths and free pages on the host, or say what is wrong.

    Returns:
        table: (B, M) int64.
        lengths: (B,) int64.
        free: list of pages, the next one last.

    Raises:
        TypeError: if one does not hold integers.
        ValueError: if a page is named that there is not or that cannot be at its
            place, or a sequence is longer than its pages.
    """
    table, size = check_table(page_table, len(k_pages)), k_pages.shape[1]
    room = (table >= 0).sum(1) * size
    lengths = check_numbers(lengths, "lengths", room, "lengths that fit into the pages")
    free = check_numbers(free_pages, "free_pages", len(k_pages) - 1, "pages")
    column = torch.arange(table.shape[1])
    in_use = (table >= 0) & (column < -(-lengths // size)[:, None])
    spare = table[(table >= 0) & ~in_use]
    once = torch.cat([spare, free])
    if len(once.unique()) < len(once) or torch.isin(once, table[in_use]).any():
        raise ValueError(
            f"a page for tokens to come, in free_pages or after a sequence's length, "
            f"must be named once and hold no other token; got free_pages "
            f"{free.tolist()[:16]} and {spare.tolist()[:16]} after the lengths"
        )
    return table, lengths, free.tolist()[::-1]

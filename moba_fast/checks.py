"""Check the arguments of the public call, once."""

import operator
from itertools import pairwise

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensors(q, k, v):
    """Raise unless q is (S, H, D) and k, v (SK, HK, D), of one dtype and device.

    Raises:
        TypeError: if one is not a tensor, or dtypes differ or are not supported.
        ValueError: if ranks or shapes do not fit, or devices differ.
    """
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 3:
            raise ValueError(
                f"{name} must be (tokens, heads, head dimension), got shape "
                f"{tuple(x.shape)}; pack a batch with cu_seqlens"
            )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        dtypes = {n: str(x.dtype).removeprefix("torch.") for n, x in named.items()}
        raise TypeError(
            f"q, k and v must share one dtype, float64, float32, bfloat16 or float16; "
            f"got {dtypes}; cast them to one of these"
        )
    if not q.device == k.device == v.device:
        devices = {name: str(x.device) for name, x in named.items()}
        raise ValueError(f"q, k and v must be on one device, got {devices}")
    check_shapes(q, k, v)


def check_shapes(q, k, v):
    """Raise ValueError unless the head counts and dimensions fit together."""
    if k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[2] == 0:
        raise ValueError(
            f"k and v must have one shape and q the same head dimension, at least 1; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the key/value heads must divide the query heads, got HK={k.shape[1]} "
            f"and H={q.shape[1]}"
        )


def check_integer(value, name):
    """Return value, which may be any kind of integer, as an int of at least 1.

    Raises:
        TypeError: if it is no integer; True and False are none.
        ValueError: if it is less than 1.

    Example:
        >>> check_integer(torch.tensor(2), "topk")
        2
    """
    try:
        # Both would pass as the integers 0 and 1.
        if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if number < 1:
        hint = "; topk=1 reads the current block only" if name == "topk" else ""
        raise ValueError(f"{name} must be at least 1, got {number}{hint}")
    return number


def as_offsets(cu_seqlens, name):
    """Return offsets as a tensor, or say why they cannot be offsets.

    Args:
        cu_seqlens: (B+1,) integers, tensor or list; None stays None. Integers keep
            their width, so that one that is too large is seen with its values.
        name: what to call it in an error.

    Raises:
        TypeError: if the offsets are not integers.
        ValueError: if they are not one-dimensional with at least two of them.
    """
    if cu_seqlens is None:
        return None
    try:
        offsets = torch.as_tensor(cu_seqlens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor or list of integers, got {cu_seqlens!r}"
        ) from error
    kind = offsets.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise TypeError(f"{name} must hold integers, got {kind}")
    if offsets.ndim != 1 or len(offsets) < 2:
        raise ValueError(
            f"{name} must be one-dimensional with B + 1 >= 2 offsets, such as "
            f"[0, 13, 32] for sequences of 13 and 19; got shape {tuple(offsets.shape)}"
        )
    return offsets


def check_offsets(offsets, name, total):
    """Return offsets as int64 on the CPU, or say what is wrong with their values.

    Args:
        offsets: (B+1,) integers; None means one sequence.
        name: what to call it in an error.
        total: tokens that the offsets must cover.

    Raises:
        ValueError: if they do not start at 0, decrease, or do not end at total.
    """
    if offsets is None:
        return torch.tensor([0, total])
    offsets = offsets.cpu().long()
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != total:
        raise ValueError(
            f"{name} must start at 0 and end at the number of tokens, {total}; got "
            f"{values[0]} and {values[-1]}. They are offsets, not lengths: sequences "
            f"of 13 and 19 tokens have [0, 13, 32]"
        )
    for b, (first, last) in enumerate(pairwise(values)):
        if last < first:
            raise ValueError(
                f"{name} must never decrease, but goes from {first} to {last} at "
                f"sequence {b}"
            )
    return offsets


def check_key_offsets(cu_seqlens_k, cu_q, total):
    """Return the offsets of the keys as int64 on the CPU, or say what is wrong.

    Args:
        cu_seqlens_k: (B+1,) integers; None: those of the queries.
        cu_q: (B+1,) int64 on the CPU, offsets of the queries.
        total: tokens of k.

    Raises:
        ValueError: if they do not start at 0, decrease, or do not end at total.
    """
    if cu_seqlens_k is not None:
        return check_offsets(cu_seqlens_k, "cu_seqlens_k", total)
    if cu_q[-1] != total:
        more = "give cu_seqlens_k where sequences have more keys than queries"
        axes = "the axes must be (tokens, heads, head dimension)"
        raise ValueError(
            f"cu_seqlens_k is None, so keys have the offsets of the queries, which end "
            f"at {cu_q[-1]}, but k has {total} tokens; "
            f"{more if cu_q[-1] < total else axes}"
        )
    return cu_q


def check_queries_fit(cu_q, cu_k):
    """Raise ValueError unless every sequence has at most as many queries as keys."""
    if len(cu_q) != len(cu_k):
        raise ValueError(
            f"cu_seqlens and cu_seqlens_k must name the same sequences, got "
            f"{len(cu_q) - 1} and {len(cu_k) - 1}"
        )
    too_long = (cu_q.diff() > cu_k.diff()).nonzero()
    if len(too_long):
        b = too_long[0].item()
        raise ValueError(
            f"queries are the last tokens of their sequence, so there cannot be more "
            f"of them than keys: sequence {b} has {cu_q.diff()[b]} queries and "
            f"{cu_k.diff()[b]} keys"
        )


def check_selected_shape(selected, q, topk):
    """Raise unless selected has the type, shape and device of a choice.

    Raises:
        TypeError: if it is no integer tensor.
        ValueError: if its shape or device is wrong.
    """
    if not isinstance(selected, torch.Tensor) or selected.is_floating_point():
        raise TypeError("selected must be an integer tensor (S, H, topk)")
    if selected.shape != (*q.shape[:2], topk) or selected.device != q.device:
        raise ValueError(
            f"selected must be (S, H, topk) = {(*q.shape[:2], topk)} on {q.device}, "
            f"got {tuple(selected.shape)} on {selected.device}"
        )


def check_selected(selected, blocks):
    """Raise unless selected could have come from `select_blocks`.

    Raises:
        ValueError: if a last column is not the current block, or if the others are not
            past blocks of the same sequence, ascending, and then -1.
    """
    past, current = selected[..., :-1], blocks.of_query[:, None]
    first = blocks.first_of_query[:, None, None]
    wrong = (past != -1) & ((past < first) | (past >= current[..., None]))
    before, after = past[..., :-1], past[..., 1:]
    wrong[..., 1:] |= (after != -1) & ((after <= before) | (before == -1))
    wrong_rows = wrong.any(-1) | (selected[..., -1] != current)
    if wrong_rows.any():
        i, h = wrong_rows.nonzero()[0].tolist()
        readable = range(int(blocks.first_of_query[i]), int(blocks.of_query[i]))
        raise ValueError(
            f"selected must hold past blocks of the query's own sequence in ascending "
            f"order, then -1, and the current block in its last column; query {i}, "
            f"head {h} stands in block {readable.stop}, may read the past blocks "
            f"{list(readable)[:9]}, and has {selected[i, h].tolist()}"
        )

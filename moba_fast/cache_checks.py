"""Check the arguments of the key/value cache."""

import torch

from moba_fast.checks import (
    DTYPES,
    as_offsets,
    check_integer,
    check_offsets,
    check_selected,
    check_selected_shape,
)
from moba_fast.last_tokens import blocks_of


def check_sizes(sequences, pages, block_size, kv_heads, head_dim, dtype):
    """Return the sizes of a cache as ints, or say what is wrong; pages may be None.

    Returns:
        sequences, pages, block_size, kv_heads, head_dim.

    Raises:
        TypeError: if a size is no int, or the dtype is not supported.
        ValueError: if a size is less than 1.
    """
    if dtype not in DTYPES:
        raise TypeError(
            f"dtype must be float64, float32, bfloat16 or float16, got {dtype}"
        )
    return (
        check_integer(sequences, "sequences"),
        None if pages is None else check_integer(pages, "pages"),
        check_integer(block_size, "block_size"),
        check_integer(kv_heads, "kv_heads"),
        check_integer(head_dim, "head_dim"),
    )


def check_append(cache, k, v, cu_seqlens):
    """Return how many tokens every sequence is to get, or say what is wrong.

    Raises what `PagedKVCache.append` names, except that it does not count pages.
    """
    for name, x in (("k", k), ("v", v)):
        check_tokens(x, name, cache.pool.k.shape[2:], cache.pool.k)
    if len(k) != len(v):
        raise ValueError(f"k and v must have as many tokens, got {len(k)} and {len(v)}")
    return check_counts(cu_seqlens, len(k), len(cache.lengths))


def check_attend(cache, q, topk, cu_seqlens, selected):
    """Return how many queries every sequence has and topk, or say what is wrong.

    Raises what `PagedKVCache.attend` names.
    """
    check_tokens(q, "q", ("H", cache.pool.k.shape[3]), cache.pool.k)
    heads, kv_heads = q.shape[1], cache.pool.k.shape[2]
    if heads == 0 or heads % kv_heads:
        raise ValueError(
            f"the key/value heads must divide the query heads, got HK={kv_heads} and "
            f"H={heads}"
        )
    count = check_queries(cache, cu_seqlens, len(q))
    if topk is not None:
        topk = check_integer(topk, "topk")
    elif selected is not None:
        raise ValueError("topk=None reads every block: give topk or no selected")
    if selected is not None:
        check_selected_shape(selected, q, topk)
        check_selected(selected, blocks_of(cache, count))
    return count, topk


def check_tokens(x, name, shape, like):
    """Raise unless x is (tokens, *shape) of like's dtype and device, without gradient.

    Args:
        x: what was given.
        name: what to call it in an error.
        shape: heads and head dimension; heads may be a text such as "H".
        like: tensor of the cache.

    Raises:
        TypeError: if x is no tensor or has another dtype.
        ValueError: if its rank, shape or device is wrong, or it requires a gradient.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    expected = [n for n in shape if isinstance(n, int)]
    if x.ndim != 3 or list(x.shape[3 - len(expected) :]) != expected:
        raise ValueError(
            f"{name} must be (tokens, {shape[0]}, {shape[1]}), all sequences packed; "
            f"got shape {tuple(x.shape)}"
        )
    if x.dtype != like.dtype:
        raise TypeError(
            f"{name} must be {like.dtype} as the cache, got {x.dtype}; cast it, or "
            f"make the cache with its dtype"
        )
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")
    if x.requires_grad:
        raise ValueError(
            f"the cache keeps no gradients, but {name} requires one; call the model "
            f"under torch.no_grad(), or detach {name}"
        )


def check_counts(cu_seqlens, tokens, sequences):
    """Return how many of the packed tokens every sequence has, (B,) int64.

    Args:
        cu_seqlens: (B+1,) integers, tensor or list; None: every sequence has as many.
        tokens: tokens in the pack.
        sequences: sequences in the cache.

    Raises:
        TypeError: if the offsets are not integers.
        ValueError: if they are not B + 1 rising numbers from 0 to the number of
            tokens, or if they are None and tokens is no multiple of sequences.
    """
    if cu_seqlens is None:
        if tokens % max(1, sequences) or (tokens and not sequences):
            raise ValueError(
                f"without cu_seqlens every sequence gets as many tokens, but {tokens} "
                f"tokens are not a multiple of {sequences} sequences; give cu_seqlens"
            )
        return torch.full((sequences,), tokens // max(1, sequences))
    offsets = check_offsets(as_offsets(cu_seqlens, "cu_seqlens"), "cu_seqlens", tokens)
    if len(offsets) != sequences + 1:
        raise ValueError(
            f"cu_seqlens must have an offset more than the cache has sequences, "
            f"{sequences + 1}; got {len(offsets)}"
        )
    return offsets.diff()


def check_numbers(numbers, name, most, what):
    """Return integers from 0 to most as an int64 tensor on the host.

    Args:
        numbers: one-dimensional tensor or list.
        name: what to call it in an error.
        most: largest number allowed, an int or an (n,) tensor of one for each.
        what: what the numbers are, for an error.

    Raises:
        TypeError: if they are not integers.
        ValueError: if they are not one-dimensional, are too many or too few for most,
            or are out of range.
    """
    numbers = torch.as_tensor(numbers)
    # An empty list is a tensor of floats.
    numbers = numbers if numbers.numel() else numbers.long()
    kind = numbers.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise TypeError(f"{name} must hold integers, got {kind}")
    per_number = isinstance(most, torch.Tensor)
    if numbers.ndim != 1 or (per_number and len(numbers) != len(most)):
        one_for_each = f", {len(most)} of them" if per_number else ""
        raise ValueError(
            f"{name} must be a list of {what}{one_for_each}; got shape "
            f"{tuple(numbers.shape)}"
        )
    # The cache keeps them, and the caller may write into theirs.
    numbers = numbers.to("cpu", torch.int64, copy=True)
    wrong = ((numbers < 0) | (numbers > most)).nonzero()
    if len(wrong):
        i = wrong[0].item()
        largest = int(most[i]) if per_number else most
        raise ValueError(
            f"{name} must be {what}, here from 0 to {largest}; got {numbers[i]} at "
            f"place {i}"
        )
    return numbers


def check_queries(cache, cu_seqlens, queries=None):
    """Return how many queries every sequence has, no more than tokens.

    queries=None takes the offsets' word for how many there are.
    """
    if queries is None:
        queries = int(cu_seqlens[-1]) if len(cu_seqlens) else 0
    count = check_counts(cu_seqlens, queries, len(cache.lengths))
    too_many = (count > cache.lengths).nonzero()
    if len(too_many):
        b = too_many[0].item()
        raise ValueError(
            f"queries stand at the last tokens of their sequence, but sequence {b} has "
            f"{count[b]} queries and {cache.lengths[b]} tokens; append the keys first"
        )
    return count

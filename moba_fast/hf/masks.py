"""Say for every slot of the keys what stands there, instead of an S x S mask."""

import torch
from torch.nn.functional import pad
from transformers.masking_utils import causal_mask_function

from moba_fast.hf.settings import check_settings

# Bits of a slot. A padded query has the second only, an unwritten slot none.
REAL, QUERY = 1, 2
# Functions of transformers.masking_utils of which a plain or a packed mask is made.
CAUSAL = {
    "causal_mask_function",
    "and_masks",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
}
WINDOW = {"sliding_window_causal_mask_function", "sliding_window_overlay"}


def moba_mask(
    *,
    kv_length,
    batch_size=1,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    local_size=None,
    config=None,
    **others,
):
    """Return the roles of the key slots: the mask function of attention "moba".

    The library calls it once per forward pass. What it returns has the four axes of a
    finished mask, so that the library passes it on as it is, and one byte per slot.

    Args:
        kv_length: S, slots of the keys, those of a static cache that are not written
            yet included.
        batch_size: B, rows.
        kv_offset: slot of the first key.
        mask_function: what else the library wants of the mask.
        attention_mask: (B, tokens) bool, False for padding.
        local_size: window of layers with a sliding window, whose caches begin later.
        config: configuration of the model.
        others: where the queries are, and what other mask functions need.

    Returns:
        (B, 1, 1, S) int8, sums of REAL and QUERY; None where every slot is real and the
        queries are the last ones.

    Raises:
        ValueError: if the mask is to be no causal one, attention_mask is too short, or
            the settings do not fit the model.
    """
    if config is not None and not torch.compiler.is_compiling():
        check_settings(config)
    first, count = queries_of(kv_offset + kv_length, **others)
    last = first + count
    if mask_function is not causal_mask_function:
        if others.get("use_vmap"):
            raise ValueError("MoBA reads the past only, and takes no mask functions")
        if torch.compiler.is_compiling():
            device = device_of(first, attention_mask, **others)
            forbid_future(mask_function, batch_size, first, count, device)
        else:
            check_causal(mask_function, local_size is not None)
    if isinstance(first, int):
        if attention_mask is not None:
            check_length(attention_mask, last)
        if last == kv_offset + kv_length and has_no_padding(attention_mask, kv_offset):
            return None
    device = device_of(first, attention_mask, **others)
    slot = torch.arange(kv_length, device=device) + kv_offset
    real = written = (slot < last).expand(batch_size, -1)
    if attention_mask is not None:
        missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
        given = pad(attention_mask.to(slot.device), (0, missing))
        real = written & given[:, kv_offset : kv_offset + kv_length].bool()
    query = written & (slot >= first)
    return (real * REAL + query * QUERY).to(torch.int8)[:, None, None]


def queries_of(end, q_length=None, q_offset=0, cache_position=None, **_):
    """Return the slot of the first query and how many there are.

    Args:
        end: slot after the last key.
        q_length: queries of every row.
        q_offset: slot of the first one; a tensor with a static cache.
        cache_position: (Sq,) their slots, which older versions of the library give.
    """
    if cache_position is None:
        return q_offset, q_length
    first, count = cache_position[0], cache_position.shape[0]
    if torch.compiler.is_compiling():
        return first, count
    # After a prefill in chunks they count one too many.
    return min(int(first), end - count), count


def device_of(first, attention_mask, cache_position=None, device=None, **_):
    """Return the device of the mask; versions differ in what they tell of it."""
    for x in (attention_mask, first, cache_position):
        if isinstance(x, torch.Tensor):
            return x.device
    return device


def has_no_padding(attention_mask, kv_offset):
    """Say whether all slots from kv_offset on are real; no trace can know."""
    if attention_mask is None:
        return True
    return not torch.compiler.is_compiling() and bool(
        attention_mask[:, kv_offset:].all()
    )


def check_length(attention_mask, tokens):
    """Raise ValueError unless a mask covers all tokens, those in the cache included."""
    if attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask must cover every token up to the last query, {tokens}, "
            f"those in the cache included; got {attention_mask.shape[1]}"
        )


def check_causal(mask_function, window=False):
    """Raise ValueError unless a mask function asks for nothing but causality and packs.

    Args:
        mask_function: of the library.
        window: whether it may ask for a sliding window, too.

    Example:
        >>> from transformers.masking_utils import bidirectional_mask_function
        >>> check_causal(bidirectional_mask_function)
        Traceback (most recent call last):
        ValueError: MoBA reads the past only, but the model asks for a mask made of
        bidirectional_mask_function
    """
    found = parts_of(mask_function)
    if other := sorted(found - CAUSAL - (WINDOW if window else set())):
        raise ValueError(
            f"MoBA reads the past only, but the model asks for a mask made of\n"
            f"{', '.join(other)}"
        )


def forbid_future(mask_function, batch_size, first, count, device):
    """Let a compiled model fail where a query would read the token after its own.

    Its trace cannot see what a mask function is made of.
    """
    row = torch.arange(batch_size, device=device)[:, None]
    query = first + torch.arange(count - 1, device=device)[None]
    reads_next = mask_function(row, row * 0, query, query + 1)
    torch._assert_async(
        ~reads_next.any(),
        "MoBA reads the past only, but this mask lets tokens see more",
    )


def parts_of(mask_function):
    """Name the functions of which a mask function is made, as a set."""
    found = {mask_function.__qualname__.split(".")[0]}
    for cell in mask_function.__closure__ or ():
        inner = cell.cell_contents
        for x in inner if isinstance(inner, tuple) else (inner,):
            if callable(x) and not isinstance(x, torch.Tensor):
                found |= parts_of(x)
    return found

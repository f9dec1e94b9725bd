"""Decide whether a fast result agrees with the reference: the one policy, in one place.

- Integers are equal.
- `selected` is equal except at near ties: a row may differ where the blocks it chose
  score the same to within MARGIN of the row's largest score, in at most EXEMPT_SHARE
  of all rows.
- Floats: the largest error against the float64 reference is at most TWICE the error
  that plain PyTorch makes in the same dtype, plus PARTS roundings of the largest
  value in that dtype (of the lse, the weights, a part and the merge, which plain
  attention does not round), plus SUMS roundings in float64 for the reference's own
  sums. Where no plain result is given, SUMS roundings in fast's dtype.
- NaN never passes.
"""

import numpy as np
import torch

MARGIN = 1e-4
EXEMPT_SHARE = 1e-3
TWICE = 2
PARTS = 4
SUMS = 64


def agree(fast, ref, name, *, plain=None, scores=None):
    """Assert that a fast result agrees with the reference, and print by how much.

    Args:
        fast: tensor or array to check.
        ref: array or tensor of the same shape, usually from `moba_ref` in float64.
        name: what to call it in the printed line.
        plain: the same result from plain PyTorch in fast's dtype, which sets the
            bound for floats; see `plain_attention`.
        scores: (S, H, N) scores of the reference, for `selected` and its near ties.

    Raises:
        AssertionError: if shapes differ or the policy above is not met; the message
            names the worst token and head.

    Example:
        >>> agree(torch.tensor([1, 2]), np.array([1, 2]), "query")
        query         agrees: 2 integers, all equal
    """
    fast = torch.as_tensor(fast)
    rounding = torch.finfo(fast.dtype).eps if fast.is_floating_point() else None
    fast, ref = to_numpy(fast), to_numpy(ref)
    if fast.shape != ref.shape:
        raise AssertionError(f"{name}: expected shape {ref.shape}, got {fast.shape}")
    if scores is not None:
        line = compare_selected(fast, ref, to_numpy(scores), name)
    elif rounding is None:
        line = compare_integers(fast, ref, name)
    else:
        plain = None if plain is None else to_numpy(plain)
        line = compare_floats(fast, ref, name, plain, rounding)
    print(f"{name:<13} agrees: {line}")


def compare_integers(fast, ref, name):
    """Raise unless all integers are equal; return the line to print."""
    wrong = np.argwhere(fast != ref)
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name}: {len(wrong)} of {ref.size} integers differ, first at {at}: "
            f"expected {ref[at]}, got {fast[at]}"
        )
    return f"{ref.size} integers, all equal"


def compare_selected(fast, ref, scores, name):
    """Raise unless both chose the same blocks up to near ties; return the line."""
    differs = (fast != ref).any(-1)
    gap = np.abs(chosen_scores(fast, scores) - chosen_scores(ref, scores))
    past = np.where(np.isfinite(scores), np.abs(scores), 0.0)
    beyond = differs & ~(gap <= MARGIN * past.max(-1, keepdims=True, initial=0)).all(-1)
    if beyond.any():
        i, h = np.argwhere(beyond)[0]
        raise AssertionError(
            f"{name}: {beyond.sum()} of {beyond.size} rows chose blocks that are no "
            f"near ties, first at token {i}, head {h}: expected {ref[i, h].tolist()}, "
            f"got {fast[i, h].tolist()}"
        )
    if differs.sum() > EXEMPT_SHARE * differs.size:
        raise AssertionError(
            f"{name}: {differs.sum()} of {differs.size} rows differ at near ties, "
            f"more than {EXEMPT_SHARE:.1%}"
        )
    return f"{differs.size} rows, {differs.sum()} exempt as near ties"


def chosen_scores(selected, scores):
    """Sort the scores of the chosen blocks, 0 for the current block and padding."""
    padded = np.concatenate([scores, np.zeros((*scores.shape[:2], 1))], axis=-1)
    chosen = np.take_along_axis(padded, selected.astype(int), axis=-1)
    return np.sort(np.where(np.isposinf(chosen), 0.0, chosen), axis=-1)


def compare_floats(fast, ref, name, plain, rounding):
    """Raise unless the error is within the bound; return the line to print."""
    if np.isnan(fast).any():
        at = tuple(np.argwhere(np.isnan(fast))[0].tolist())
        raise AssertionError(
            f"{name}: NaN at {place(at)}, {np.isnan(fast).sum()} in all"
        )
    error, bound = absolute_error(fast, ref), allowed_error(ref, plain, rounding)
    worst = error.max(initial=0.0)
    rms = np.sqrt(np.mean(error**2)) if error.size else 0.0
    sizes = f"max {worst:.1e}, rms {rms:.1e}, allowed {bound:.1e}"
    if not worst <= bound:
        at = np.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"{name}: {sizes}; worst at {place(at)}: expected {ref[at]:.6g}, "
            f"got {fast[at]:.6g}"
        )
    return sizes


def allowed_error(ref, plain, rounding):
    """Return the largest error that the policy allows.

    Args:
        ref: float64 array, the reference's result.
        plain: float64 array, plain PyTorch's result; None: there is none.
        rounding: of the dtype of the result to check, relative.
    """
    finite = np.abs(ref[np.isfinite(ref)])
    step = rounding * finite.max(initial=0.0)
    if plain is None:
        return SUMS * step
    own = SUMS * np.finfo(ref.dtype).eps * finite.max(initial=0.0)
    return TWICE * absolute_error(plain, ref).max(initial=0.0) + PARTS * step + own


def absolute_error(value, ref):
    """Subtract where values are finite; equal infinities have error 0."""
    with np.errstate(invalid="ignore"):
        return np.where(value == ref, 0.0, np.abs(value - ref))


def place(at):
    """Name an index by its axes: token, head, then the rest."""
    names = ("token", "head", "dimension")
    return ", ".join(f"{n} {i}" for n, i in zip(names, at, strict=False))


def plain_attention(q, k, v, selected, blocks, softmax_scale=None):
    """Attend densely in q's dtype with nothing but plain PyTorch, differentiably.

    The yardstick of the policy: what error does the dtype alone make?

    Args:
        q: (S, H, D) tensor.
        k: (SK, HK, D) tensor.
        v: (SK, HK, D) tensor.
        selected: (S, H, topk) block ids, usually the reference's.
        blocks: moba_fast.Blocks.
        softmax_scale: factor on the scores. None: D ** -0.5.

    Returns:
        out: (S, H, D) in q's dtype.
        lse: (S, H) in q's dtype.
    """
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(ratio, dim=1) for x in (k, v))
    scores = torch.einsum("shd,thd->sht", q, k) * scale
    scores = scores.masked_fill(~selected_tokens(selected, blocks), -torch.inf)
    return torch.einsum("sht,thd->shd", scores.softmax(-1), v), scores.logsumexp(-1)


def selected_tokens(selected, blocks):
    """Spread chosen blocks over their tokens, cut at the query: (S, H, SK) bool."""
    chosen = torch.as_tensor(selected, device=blocks.of_token.device).long()
    readable = torch.zeros(
        *chosen.shape[:2], len(blocks.start) + 1, dtype=torch.bool, device=chosen.device
    )
    # The extra column takes the padding -1 and is never looked up.
    readable.scatter_(2, chosen % readable.shape[2], True)
    token = torch.arange(len(blocks.of_token), device=chosen.device)
    causal = token <= blocks.position[:, None]
    return readable[:, :, blocks.of_token] & causal[:, None]


def to_numpy(x):
    """Return x as a NumPy array, floats as float64."""
    x = torch.as_tensor(x).detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()

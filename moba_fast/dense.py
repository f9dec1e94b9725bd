"""Run dense causal attention, the peer that a sparse one has to beat."""

import warnings
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from moba_fast import _flash
from moba_fast.peers import first_line
from moba_fast.timing import attempt
from moba_fast.varlen import Pack, attention, attention_backward

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# Slower than these two, and asked only where neither takes the inputs.
LAST_RESORT = {"efficient": SDPBackend.EFFICIENT_ATTENTION}
# Dense attention by itself where installed, besides what PyTorch has.
PACKAGES = ("flash-attn-4", "flash-attn")
# Tokens of the call that asks whether a kernel takes such inputs.
TRIAL = 64


def dense_candidates(leaves, dout, batch=1):
    """List the dense attentions that take these inputs: PyTorch's and packages'.

    Args:
        leaves: q (T, H, D), k and v (T, HK, D).
        dout: (T, H, D) gradient of the output, for leaves that need a gradient.
        batch: sequences of equal length among the T tokens.

    Returns:
        candidates: dict from name to a function of no arguments that attends.
        missing: dict from name to the reason why a kernel does not run; a package that
            is not installed is not named.

    Example:
        >>> x = torch.zeros(4, 2, 8)
        >>> candidates, missing = dense_candidates([x, x, x], x)
        >>> list(candidates), candidates["flash"]().shape, missing
        (['flash'], torch.Size([1, 4, 2, 8]), {})
    """
    names = ["flash", "cudnn"] if dout.is_cuda else ["flash"]
    kernels = {n: KERNELS[n] for n in names}
    candidates, missing = try_out(kernels, leaves, dout, batch)
    if not candidates and dout.is_cuda:
        candidates, more = try_out(LAST_RESORT, leaves, dout, batch)
        missing |= more
    short = [x[:TRIAL] for x in leaves], dout[:TRIAL]
    for name in installed(dout):
        error = attempt(partial(attend_packed, *short, name))
        if isinstance(error, Exception):
            missing[name] = first_line(error)
        else:
            candidates[name] = partial(attend_packed, leaves, dout, name, batch)
    return candidates, missing


def installed(dout):
    """List the packages of flash attention that run where a tensor is."""
    return [name for name in PACKAGES if dout.is_cuda and not _flash.why_not(name)]


def try_out(kernels, leaves, dout, batch=1):
    """Ask every kernel for a short call; see `dense_candidates`."""
    candidates, missing = {}, {}
    for name, kernel in kernels.items():
        for repeated in (False, True):
            try:
                tensors = one_head_each(leaves) if repeated else leaves
                trial = [x.detach()[:TRIAL] for x in tensors]
                trial = [x.requires_grad_(leaves[0].requires_grad) for x in trial]
                attend(trial, dout[:TRIAL], kernel)
            except RuntimeError as error:
                missing[name] = str(error).splitlines()[0]
            else:
                candidates[name] = partial(attend, tensors, dout, kernel, batch)
                missing.pop(name, None)
                break
    return candidates, missing


def one_head_each(leaves):
    """Repeat keys and values for kernels that want one head for every query head."""
    q, k, v = leaves
    if q.shape[1] == k.shape[1]:
        return leaves
    k, v = (x.detach().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return q, *(x.requires_grad_(q.requires_grad) for x in (k, v))


def attend(leaves, dout, kernel, batch=1):
    """Attend causally to all tokens with one kernel, and differentiate if wanted.

    Returns:
        out: (batch, T / batch, H, D).
    """
    q, k, v, dout = (
        x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (*leaves, dout)
    )
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(kernel), warnings.catch_warnings():
        # A kernel that does not take the inputs warns why, then raises.
        warnings.simplefilter("ignore")
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return with_gradients(out, leaves, dout).transpose(1, 2)


def attend_packed(leaves, dout, kernel, batch=1):
    """Attend as `attend`, with a kernel of backend "flash" over the whole past."""
    q, k, v = (x.detach() for x in leaves)
    length = len(q) // batch
    offsets = torch.arange(0, len(q) + 1, length, dtype=torch.int32, device=q.device)
    options = Pack(offsets, offsets, length, length), True, q.shape[-1] ** -0.5
    out, lse = attention(q, k, v, *options, kernel)
    if leaves[0].requires_grad:
        attention_backward(dout, q, k, v, out, lse, *options, False, kernel)
    return out.unflatten(0, (batch, -1))


def with_gradients(out, leaves, dout):
    """Compute the gradients of an output that has some, and return the output."""
    if out.requires_grad:
        torch.autograd.grad(out, leaves, dout)
    return out

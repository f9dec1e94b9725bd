"""Run PyTorch's dense causal attention, the peer that a sparse one has to beat."""

import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# Slower than these two, and asked only where neither takes the inputs.
LAST_RESORT = {"efficient": SDPBackend.EFFICIENT_ATTENTION}
# Tokens of the call that asks whether a kernel takes such inputs.
TRIAL = 64


def dense_candidates(leaves, dout):
    """List PyTorch's dense attentions that take these inputs.

    Args:
        leaves: q (S, H, D), k and v (S, HK, D).
        dout: (S, H, D) gradient of the output, for leaves that need a gradient.

    Returns:
        candidates: dict from name to a function of no arguments that attends.
        missing: dict from name to the reason why a kernel does not run.

    Example:
        >>> x = torch.zeros(4, 2, 8)
        >>> candidates, missing = dense_candidates([x, x, x], x)
        >>> list(candidates), candidates["flash"]().shape, missing
        (['flash'], torch.Size([4, 2, 8]), {})
    """
    names = ["flash", "cudnn"] if dout.is_cuda else ["flash"]
    candidates, missing = try_out({n: KERNELS[n] for n in names}, leaves, dout)
    if not candidates and dout.is_cuda:
        candidates, more = try_out(LAST_RESORT, leaves, dout)
        missing |= more
    return candidates, missing


def try_out(kernels, leaves, dout):
    """Ask every kernel for a short call; see `dense_candidates`."""
    candidates, missing = {}, {}
    for name, kernel in kernels.items():
        for tensors in (leaves, one_head_each(leaves)):
            try:
                trial = [x.detach()[:TRIAL] for x in tensors]
                trial = [x.requires_grad_(leaves[0].requires_grad) for x in trial]
                attend(trial, dout[:TRIAL], kernel)
            except RuntimeError as error:
                missing[name] = str(error).splitlines()[0]
            else:
                candidates[name] = later(tensors, dout, kernel)
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


def later(*arguments):
    """Bind the arguments of `attend`."""
    return lambda: attend(*arguments)


def attend(leaves, dout, kernel):
    """Attend causally to all tokens with one kernel, and differentiate if wanted."""
    q, k, v = (x.transpose(0, 1)[None] for x in leaves)
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(kernel), warnings.catch_warnings():
        # A kernel that does not take the inputs warns why, then raises.
        warnings.simplefilter("ignore")
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return with_gradients(out[0].transpose(0, 1), leaves, dout)


def with_gradients(out, leaves, dout):
    """Compute the gradients of an output that has some, and return the output."""
    if out.requires_grad:
        torch.autograd.grad(out, leaves, dout)
    return out

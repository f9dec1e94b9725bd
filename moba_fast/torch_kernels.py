"""Say which kernel backend "torch" runs."""

import torch

from moba_fast import _flash
from moba_fast.cpp import build

# The kernel in C++.
COMPILED = "compiled"
# What there is on each type of device.
KERNELS = {"cpu": (COMPILED, "cpu", "plain"), "cuda": ("plain",)}
# Queries times heads from which on it is worth to have C++ compiled.
LARGE_CALL = 2**14


def kernel_of_torch(q):
    """Return the kernel that backend "torch" takes: for large calls a compiled one."""
    if q.shape[0] * q.shape[1] >= LARGE_CALL and not why_not_compiled(q):
        return COMPILED
    return _flash.default_kernel(q)


def named_kernel(kernel, q):
    """Return a kernel of backend "torch" that was asked for by name.

    Raises:
        ValueError: if it does not run here or not with such tensors.

    Example:
        >>> named_kernel("gpu", torch.zeros(1, 1, 8))
        Traceback (most recent call last):
        ValueError: backend 'torch' has no kernel 'gpu' on cpu: choose one of ...
    """
    known = KERNELS.get(q.device.type, ())
    if kernel not in known:
        raise ValueError(
            f"backend 'torch' has no kernel {kernel!r} on {q.device.type}: choose one "
            f"of {', '.join(map(repr, known))}"
        )
    if kernel == COMPILED and (reason := why_not_compiled(q)):
        raise ValueError(
            f"backend 'torch:{COMPILED}' {reason}; backend='torch' takes one that fits"
        )
    return kernel


def why_not_compiled(q):
    """Say why the C++ kernels do not take q, or "" if they do.

    Example:
        >>> why_not_compiled(torch.zeros(1, 1, 8).half())
        'needs float32 on a CPU, got torch.float16 on cpu'
    """
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return f"needs float32 on a CPU, got {q.dtype} on {q.device}"
    if q.shape[2] > build.MOST_D:
        return f"needs D of at most {build.MOST_D}, got {q.shape[2]}"
    loaded, reason = build.look_for_library()
    return "" if loaded else f"does not run here: {reason}"

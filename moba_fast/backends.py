"""Say which backends run here, and for the others why not."""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from moba_fast import _flash


@dataclass(frozen=True)
class Backend:
    """Describe one backend on this machine.

    Attributes:
        name: value of the argument `backend`.
        available: whether it runs here.
        reason: what it runs on, or why it does not run.
    """

    name: str
    available: bool
    reason: str


def backends():
    """Report every backend: whether it runs here and on what, or why not.

    Returns:
        dict from name to Backend, fastest first.

    Example:
        >>> backends()["torch"].available
        True
    """
    return {backend.name: backend for backend in look_around()}


@cache
def look_around():
    """Look for devices and packages, once: every attention call asks for a backend."""
    cuda = "" if torch.cuda.is_available() else ", and no CUDA device was found"
    compiler = "" if find_spec("triton") else ", triton is not installed"
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    try:
        kernel, reason = _flash.choose()
        flash = f"{kernel} on {here}: {reason}" if kernel else reason
    except ValueError as error:
        kernel, flash = None, str(error)
    return (
        Backend("triton", False, f"not in this version of moba_fast{compiler}{cuda}"),
        Backend("flash", kernel is not None, flash),
        Backend("torch", True, f"PyTorch {torch.__version__} on {here}"),
    )


def kernel_of(backend, q):
    """Return the kernel that a call runs.

    Args:
        backend: "auto", or a name from `backends()`, or "flash:" and a kernel's name.
        q: (S, H, D) queries, whose device and dtype decide what runs.

    Raises:
        ValueError: if there is no such backend, or it does not run here or not with
            such tensors.
    """
    known = backends()
    name, _, kernel = backend.partition(":")
    if name == "auto":
        fits = known["flash"].available and not why_not_flash(q)
        return _flash.choose()[0] if fits else _flash.default_kernel(q)
    if name not in known or (kernel and name != "flash"):
        names = ", ".join(map(repr, ["auto", *known, "flash:aten"]))
        raise ValueError(f"unknown backend {backend!r}: choose one of {names}")
    if name == "torch":
        return _flash.default_kernel(q)
    forced = _flash.choose(kernel)[0] if kernel else None
    if not (forced or known[name].available):
        raise ValueError(
            f"backend {name!r} does not run here: {known[name].reason}; "
            f"backend='auto' takes one that does"
        )
    if why_not_flash(q):
        raise ValueError(
            f"backend 'flash' {why_not_flash(q)}; backend='auto' takes one that fits"
        )
    return forced or _flash.choose()[0]


def why_not_flash(q):
    """Say why backend "flash" does not take q, or "" if it does."""
    if q.device.type != "cuda":
        return f"needs tensors on a CUDA device, got {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {q.dtype}"
    if q.shape[2] > _flash.LARGEST_HEAD:
        return f"needs D of at most {_flash.LARGEST_HEAD}, got {q.shape[2]}"
    return ""

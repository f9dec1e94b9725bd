"""Say which backends run here, and for the others why not."""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch


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
    package = "" if find_spec("flash_attn") else ", flash-attn is not installed"
    compiler = "" if find_spec("triton") else ", triton is not installed"
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return (
        Backend("triton", False, f"not in this version of moba_fast{compiler}{cuda}"),
        Backend("flash", False, f"not in this version of moba_fast{package}{cuda}"),
        Backend("torch", True, f"PyTorch {torch.__version__} on {here}"),
    )


def choose_backend(name):
    """Return the backend to run, the fastest available one for "auto".

    Raises:
        ValueError: if there is no such backend, or it does not run here.
    """
    known = backends()
    if name == "auto":
        return next(b.name for b in known.values() if b.available)
    if name not in known:
        names = ", ".join(map(repr, ["auto", *known]))
        raise ValueError(f"unknown backend {name!r}: choose one of {names}")
    if not known[name].available:
        raise ValueError(
            f"backend {name!r} does not run here: {known[name].reason}; "
            f"backend='auto' takes one that does"
        )
    return name

"""Say what every backend takes, which of them run here, and for the others why not."""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from moba_fast import _flash
from moba_fast.checks import DTYPES
from moba_fast.machine import version_of
from moba_fast.torch_kernels import kernel_of_torch, named_kernel


@dataclass(frozen=True)
class Support:
    """Describe what a backend takes on one kind of device, on any machine.

    Attributes:
        device: type of the tensors' device, as PyTorch names it.
        needs: what must be there.
        dtypes: tuple of the dtypes of q, k and v.
        largest_head: largest D; None: any.
        backward: whether q, k and v get gradients.
        deterministic: when gradients have the same bits on every run.
        decoding: which queries of a `PagedKVCache` it attends from.
        attends: what computes the attention.
    """

    device: str
    needs: str
    dtypes: tuple
    largest_head: int | None
    backward: bool
    deterministic: str
    decoding: str
    attends: str


# The kernel of backend "triton".
FUSED = "triton"
# What each backend takes, fastest first.
SUPPORT = {
    "triton": (
        Support(
            device="cuda",
            needs="NVIDIA GPU, Ampere or newer, and Triton 3.6 or newer",
            dtypes=(torch.bfloat16, torch.float16, torch.float32),
            largest_head=256,
            backward=True,
            deterministic="always",
            decoding="chunks",
            attends="Triton kernels for all four steps",
        ),
        Support(
            device="cpu",
            needs="Triton, and TRITON_INTERPRET=1 in the environment",
            dtypes=(torch.float32, torch.float16),
            largest_head=256,
            backward=True,
            deterministic="always",
            decoding="no",
            attends="the same kernels in Triton's interpreter, to look at, not to use",
        ),
    ),
    "flash": (
        Support(
            device="cuda",
            needs="NVIDIA GPU, Ampere or newer",
            dtypes=(torch.bfloat16, torch.float16),
            largest_head=_flash.LARGEST_HEAD,
            backward=True,
            deterministic="with `deterministic=True`",
            decoding="chunks",
            attends="the FlashAttention in PyTorch, or flash-attn 2.6 to 2.8 or 4 "
            "where installed",
        ),
    ),
    "torch": (
        Support(
            device="cpu",
            needs="CPU",
            dtypes=DTYPES,
            largest_head=None,
            backward=True,
            deterministic="always",
            decoding="chunks and single tokens",
            attends="C++ kernels for large float32 calls, forward, where there is a "
            "compiler; otherwise PyTorch's flash operator for CPUs",
        ),
        Support(
            device="cuda",
            needs="any NVIDIA GPU",
            dtypes=DTYPES,
            largest_head=None,
            backward=True,
            deterministic="always",
            decoding="chunks and single tokens",
            attends="plain matrix products: correct, not fast",
        ),
    ),
}


# The fastest backend on a GPU by dtype, from so many queries on, as measured on an H100
# (moba_lab/results/bench_h100.csv; a test compares) in bfloat16; float16 runs the same
# kernels. For other dtypes the first other one that fits is taken.
FASTEST = {
    torch.bfloat16: ((0, "triton"),),
    torch.float16: ((0, "triton"),),
}


@dataclass(frozen=True)
class Backend:
    """Describe one backend: whether it runs on this machine, and what it takes.

    Attributes:
        name: value of the argument `backend`.
        available: whether it runs here.
        reason: what it runs on, or why it does not run.
        support: tuple of Support, one for each kind of device, on any machine.
    """

    name: str
    available: bool
    reason: str
    support: tuple


def backends():
    """Report every backend: whether it runs here and on what, or why not.

    Returns:
        dict from name to Backend, fastest first.

    Example:
        >>> backends()["torch"].available
        True
        >>> backends()["flash"].support[0].dtypes
        (torch.bfloat16, torch.float16)
    """
    return {backend.name: backend for backend in look_around()}


@cache
def look_around():
    """Look for devices and packages, once: every attention call asks for a backend."""
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    try:
        kernel, reason = _flash.choose()
        flash = f"{kernel} on {here}: {reason}" if kernel else reason
    except ValueError as error:
        kernel, flash = None, str(error)
    found = {
        "triton": look_for_triton(here),
        "flash": (kernel is not None, flash),
        "torch": (True, f"PyTorch {torch.__version__} on {here}"),
    }
    return tuple(Backend(name, *found[name], SUPPORT[name]) for name in SUPPORT)


def look_for_triton(here):
    """Say whether the Triton kernels run, and on what or why not."""
    if not find_spec("triton"):
        return False, "triton is not installed"
    if interpreting():
        return True, "Triton's interpreter on CPU: to look at kernels, not to be fast"
    if not torch.cuda.is_available():
        return False, "no CUDA device was found, and TRITON_INTERPRET=1 was not set"
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return False, f"{here} is older than Ampere"
    return True, f"Triton {version_of('triton')} on {here}"


def interpreting():
    """Say whether Triton was asked to interpret kernels on the CPU.

    It reads the variable once, when it is imported.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernel_of(backend, q):
    """Return the kernel that a call runs.

    Args:
        backend: "auto", or a name from `backends()`, for "flash" and "torch" perhaps
            with ":" and a kernel's name.
        q: (S, H, D) queries, whose device and dtype decide what runs.

    Raises:
        ValueError: if there is no such backend, or it does not run here or not with
            such tensors.
    """
    known = backends()
    name, _, kernel = backend.partition(":")
    if name == "auto":
        return fastest_kernel(q)
    if name not in known or (kernel and name == "triton"):
        names = ", ".join(map(repr, ["auto", *known, "flash:aten", "torch:cpu"]))
        raise ValueError(f"unknown backend {backend!r}: choose one of {names}")
    if name == "torch":
        return named_kernel(kernel, q) if kernel else kernel_of_torch(q)
    forced = _flash.choose(kernel)[0] if kernel else None
    if not (forced or known[name].available):
        raise ValueError(
            f"backend {name!r} does not run here: {known[name].reason}; "
            f"backend='auto' takes one that does"
        )
    if reason := why_not(name, q):
        raise ValueError(
            f"backend {name!r} {reason}; backend='auto' takes one that fits"
        )
    return FUSED if name == "triton" else forced or _flash.choose()[0]


def fastest_kernel(q):
    """Return the kernel that "auto" takes: the fastest one measured for such tensors.

    The environment variable MOBA_FAST_KERNEL wins over what was measured.
    """
    fastest = ()
    if q.device.type == "cuda" and _flash.VARIABLE not in os.environ:
        known = FASTEST.get(q.dtype, ())
        fastest = [name for first, name in known if q.shape[0] >= first][-1:]
    for name in (*fastest, "flash"):
        if backends()[name].available and not why_not(name, q):
            return FUSED if name == "triton" else _flash.choose()[0]
    return kernel_of_torch(q)


def why_not(name, q):
    """Say why a backend does not take q, or "" if it does.

    Example:
        >>> why_not("flash", torch.zeros(1, 1, 8))
        'needs tensors on a CUDA device, got cpu'
    """
    found = {support.device: support for support in SUPPORT[name]}
    if name == "triton":
        found.pop("cuda" if interpreting() else "cpu")
    support = found.get(q.device.type)
    if support is None:
        devices = " or ".join(found).upper()
        return f"needs tensors on a {devices} device, got {q.device}"
    if q.dtype not in support.dtypes:
        dtypes = " or ".join(dtype_names(support))
        return f"needs {dtypes}, got {q.dtype}"
    if support.largest_head and q.shape[2] > support.largest_head:
        return f"needs D of at most {support.largest_head}, got {q.shape[2]}"
    return ""


def dtype_names(support):
    """List the names of the dtypes that a Support takes.

    Example:
        >>> dtype_names(SUPPORT["flash"][0])
        ['bfloat16', 'float16']
    """
    return [str(dtype).removeprefix("torch.") for dtype in support.dtypes]

"""Run cases through every kernel of `moba_fast` and measure them by the policy."""

import contextlib
import io
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import moba_fast
import moba_ref
from moba_fast import _flash
from moba_fast.backends import SUPPORT, dtype_names
from moba_fast.torch_kernels import COMPILED, why_not_compiled
from moba_lab.agree import (
    absolute_error,
    agree,
    allowed_error,
    plain_attention,
    to_numpy,
)

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """Describe the inputs of a check.

    Attributes:
        name: what is special about them.
        lengths: keys of every sequence.
        queries: queries of every sequence, its last tokens; None: as `lengths`.
    """

    name: str
    lengths: tuple
    block_size: int
    topk: int
    H: int = 4
    HK: int = 4
    D: int = 64
    queries: tuple | None = None

    @property
    def offsets(self):
        """Offsets of the queries and of the keys."""
        both = self.queries or self.lengths, self.lengths
        return [np.cumsum([0, *lengths]).tolist() for lengths in both]

    @property
    def options(self):
        """Arguments of moba_attention besides tensors."""
        cu_q, cu_k = self.offsets
        sizes = {"block_size": self.block_size, "topk": self.topk}
        return {**sizes, "cu_seqlens": cu_q, "cu_seqlens_k": cu_k}


CASES = [
    Case("one sequence", (384,), 32, 4),
    Case("grouped heads", (384,), 32, 4, H=8, HK=2),
    Case("one key head", (200,), 16, 3, H=6, HK=1),
    Case("pack with empty sequences", (150, 0, 3, 96, 0), 16, 3, HK=2),
    Case("last queries", (200, 77, 16), 16, 4, HK=2, queries=(13, 77, 1)),
    Case("topk of 1", (230,), 100, 1),
    Case("topk above the blocks", (230, 40), 100, 9),
    Case("blocks of 1", (160,), 1, 5, HK=2),
    Case("blocks of 100", (650,), 100, 3, H=2, HK=1),
    Case("blocks of 512", (1200,), 512, 2, H=2, HK=1),
    *(Case(f"D of {D}", (150, 70), 16, 4, HK=2, D=D) for D in (20, 40, 96, 128, 256)),
]


@dataclass(frozen=True)
class Target:
    """Name a kernel on a device, how to ask for it and the dtypes that it takes."""

    device: str
    kernel: str
    backend: str
    dtypes: tuple

    def attend(self, q, k, v, **options):
        """Call moba_attention with this kernel, within `forced`."""
        options = {"backend": self.backend, **options}
        return moba_fast.moba_attention(q, k, v, **options)

    def forced(self):
        """Let backend "torch" run this kernel while the result is entered."""
        if self.backend != "torch":
            return contextlib.nullcontext()
        name = self.kernel
        return mock.patch.object(_flash, "default_kernel", return_value=name)

    def __str__(self):
        return f"{self.kernel} on {self.device}"


def targets():
    """List every kernel that runs here; "plain" on a CPU, too, where nobody asks."""
    on_cpu, on_gpu = (tuple(dtype_names(support)) for support in SUPPORT["torch"])
    found = [Target("cpu", name, "torch", on_cpu) for name in ("cpu", "plain")]
    if not why_not_compiled(torch.empty(1, 1, 1)):
        found.append(Target("cpu", COMPILED, f"torch:{COMPILED}", ("float32",)))
    if torch.cuda.is_available():
        found.append(Target("cuda", "plain", "torch", on_gpu))
    [flash] = (tuple(dtype_names(support)) for support in SUPPORT["flash"])
    for name in _flash.GPU_KERNELS:
        if not _flash.why_not(name):
            found.append(Target("cuda", name, f"flash:{name}", flash))
    triton, _ = (tuple(dtype_names(support)) for support in SUPPORT["triton"])
    if torch.cuda.is_available() and moba_fast.backends()["triton"].available:
        found.append(Target("cuda", "triton", "triton", triton))
    return found


@dataclass(frozen=True)
class Check:
    """Hold the result of one check.

    Attributes:
        what: case and quantity.
        kernel: kernel and device.
        dtype: of the inputs.
        error: largest error, or what else was measured.
        allowed: what it may be.
        ok: whether the check passed.
        message: what went wrong, or why there was nothing to check.
    """

    what: str
    kernel: str
    dtype: str
    error: float
    allowed: float
    ok: bool
    message: str = ""


@cache
def expected(case, dtype):
    """Draw the inputs of a case and compute the reference's results, once.

    Returns:
        namespace with tensors q, k, v, dout on the CPU, arrays out, lse, dq, dk, dv,
        selected, scores, and plain, the same five of plain PyTorch in dtype.
    """
    generator = torch.Generator().manual_seed(0)
    cu_q, cu_k = case.offsets
    shapes = [(cu_q[-1], case.H), (cu_k[-1], case.HK), (cu_k[-1], case.HK)]
    drawn = [
        torch.randn(*shape, case.D, generator=generator).to(getattr(torch, dtype))
        for shape in (*shapes, shapes[0])
    ]
    q, k, v, dout = (x.double().numpy() for x in drawn)
    blocks = moba_ref.partition(cu_k, case.block_size, cu_q)
    scores = moba_ref.gate_scores(q, moba_ref.pool_keys(k, blocks), blocks)
    out, lse, selected = moba_ref.moba_attention(
        q, k, v, **case.options, return_aux=True
    )
    merged = dout, q, k, v, out, lse
    grads = moba_ref.moba_attention_backward(*merged, selected, blocks, case.D**-0.5)
    leaves = [x.clone().requires_grad_() for x in drawn[:3]]
    fast_blocks = moba_fast.partition(cu_k, case.block_size, cu_q)
    plain = plain_attention(*leaves, selected, fast_blocks)
    plain = *plain, *torch.autograd.grad(plain[0], leaves, drawn[3])
    return SimpleNamespace(
        tensors=drawn,
        selected=selected,
        scores=scores,
        results=dict(zip(NAMES, (out, lse, *grads), strict=True)),
        plain={n: to_numpy(x) for n, x in zip(NAMES, plain, strict=True)},
    )


def run(target, case, dtype, *, inject=True, **options):
    """Run a case forward and backward; return its five results and `selected`."""
    known = expected(case, dtype)
    *leaves, dout = (x.to(target.device) for x in known.tensors)
    leaves = [x.requires_grad_() for x in leaves]
    if inject:
        options["selected"] = torch.tensor(known.selected, device=target.device)
    out, lse, selected = target.attend(
        *leaves, **case.options, return_aux=True, **options
    )
    grads = torch.autograd.grad(out, leaves, dout)
    return dict(zip(NAMES, (out, lse, *grads), strict=True)), selected


def compare(what, target, dtype, case, results):
    """Turn results into one check: the one that comes nearest to its bound."""
    known, worst = expected(case, dtype), None
    for name, found in results.items():
        ref, plain = known.results[name], known.plain[name]
        error = absolute_error(to_numpy(found), ref).max(initial=0.0)
        allowed = allowed_error(ref, plain, torch.finfo(found.dtype).eps)
        message = disagreement(found, ref, name, plain=plain)
        check = Check(what, str(target), dtype, error, allowed, not message, message)
        if worst is None or nearness(check) > nearness(worst):
            worst = check
    return worst


def nearness(check):
    """Order checks: failed ones first, then by the share of their bound."""
    return not check.ok, check.error / max(check.allowed, 1e-300)


def disagreement(found, ref, name, **options):
    """Return what `agree` objects to, or ""."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            agree(found, ref, name, **options)
    except AssertionError as error:
        return str(error)
    return ""


def check_case(target, case, dtype):
    """Check the choice, the forward and the backward pass of one case."""
    results, _ = run(target, case, dtype)
    _, selected = run(target, case, dtype, inject=False)
    known = expected(case, dtype)
    message = disagreement(selected, known.selected, "selected", scores=known.scores)
    differ = int((to_numpy(selected) != known.selected).any(-1).sum())
    name, place = case.name, (str(target), dtype)
    forward = {n: results.pop(n) for n in ("out", "lse")}
    return [
        Check(f"{name}: choice, rows", *place, differ, 0, not message, message),
        compare(f"{name}: forward", target, dtype, case, forward),
        compare(f"{name}: backward", target, dtype, case, results),
    ]

"""Check what one call against the reference does not show: the promises around it."""

import importlib
from importlib.util import find_spec

import numpy as np
import torch

from moba_fast.torch_kernels import COMPILED
from moba_fast.workspace import fused_parts, parts
from moba_lab.check_cases import NAMES, Case, Check, compare, expected, run

CASE = Case("grouped heads", (600,), 32, 4, H=4, HK=2)
# More sequences than a launch grid takes, for the current blocks and for the lists.
MANY = 66_000
LONG, LIMIT = 2**16, 2**28


def special_checks(targets):
    """List (function, (target, dtype)) for all targets that can do each check."""
    planned = []
    for target in targets:
        dtype = "bfloat16" if "float32" not in target.dtypes else "float32"
        functions = [check_repeated_runs, check_small_workspace, check_compile]
        functions.append(check_many_lists)
        if target.kernel != COMPILED:
            # It takes float32 only, and autocast leaves none.
            functions.append(check_autocast)
        if target.device == "cuda" and target.kernel != "plain":
            functions += [check_cuda_graph, check_peak_memory]
        planned += [(function, (target, dtype)) for function in functions]
        # A cache takes the kernel of its device, so one target stands for all.
        default = {"cpu": "cpu", "cuda": "plain"}[target.device]
        if find_spec("moba_fast.cache") and target.kernel == default:
            planned += [(check_decoding, (target, each)) for each in target.dtypes]
    return planned


def equal(what, target, dtype, found, wanted):
    """Check that results are bit for bit what they should be."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        worst = max(worst, (a - b).abs().max().item()) if a.shape == b.shape else np.inf
    return [Check(what, str(target), dtype, worst, 0.0, worst == 0.0)]


def check_repeated_runs(target, dtype):
    """Run twice with deterministic=True: all bits must be equal."""
    first, second = (
        run(target, CASE, dtype, inject=False, deterministic=True)[0].values()
        for _ in range(2)
    )
    return equal("deterministic: two runs", target, dtype, first, second)


def check_small_workspace(target, dtype):
    """Run in the smallest workspace there is: many parts, the same results."""
    q, k, _, _ = (x.to(target.device) for x in expected(CASE, dtype).tensors)
    divide = fused_parts if target.kernel == "triton" else parts
    limit = smallest_workspace(q, k, divide)
    results, _ = run(target, CASE, dtype, workspace_bytes=limit)
    count = sum(len(p.queries) for p in divide(q, k, CASE.block_size, CASE.topk, limit))
    what = f"workspace of {limit / 2**20:.2f} MiB"
    if count < 2:
        message = "the call was not divided"
        return [Check(what, str(target), dtype, count, 2, False, message)]
    return [compare(what, target, dtype, CASE, results)]


def smallest_workspace(q, k, divide):
    """Find the smallest workspace in which both directions run, to 10 %."""
    limit = 2**31
    while True:
        try:
            smaller = int(0.9 * limit)
            for backward in (False, True):
                divide(q, k, CASE.block_size, CASE.topk, smaller, backward)
        except ValueError:
            return limit
        limit = smaller


def check_compile(target, dtype):
    """Compile a call whole; on a CPU without generating code, which takes minutes."""
    *leaves, dout = (x.to(target.device) for x in expected(CASE, dtype).tensors)
    leaves = [x.requires_grad_() for x in leaves]
    sizes = {"block_size": CASE.block_size, "topk": CASE.topk}

    def attend(q, k, v):
        return 2 * target.attend(q, k, v, **sizes, deterministic=True)

    torch.compiler.reset()
    backend = "inductor" if target.device == "cuda" else "aot_eager"
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    eager, other = (
        (out := function(*leaves), *torch.autograd.grad(out, leaves, dout))
        for function in (attend, compiled)
    )
    return equal(f"torch.compile, {backend}", target, dtype, other, eager)


def check_autocast(target, dtype):
    """Pass float32 under autocast: the result of bfloat16 inputs."""
    halves = [x.to(target.device) for x in expected(CASE, "bfloat16").tensors[:3]]
    sizes = {"block_size": CASE.block_size, "topk": CASE.topk}
    with torch.autocast(target.device, dtype=torch.bfloat16):
        found = target.attend(*(x.float() for x in halves), **sizes)
    wanted = target.attend(*halves, **sizes)
    if found.dtype != torch.bfloat16:
        message = f"expected bfloat16, got {found.dtype}"
        return [Check("autocast", str(target), dtype, np.nan, 0.0, False, message)]
    return equal("autocast", target, "bfloat16", [found], [wanted])


def check_many_lists(target, dtype):
    """Read the token before, in blocks of 1, over more lists than a grid takes.

    Two keys have a softmax in closed form, so that no reference need be slow.
    """
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    q, k, v = (
        torch.randn(MANY, h, 16, generator=generator).to(kind) for h in (2, 1, 1)
    )
    current = torch.arange(MANY, dtype=torch.int32)
    selected = torch.stack([current - 1, current], dim=1)[:, None].expand(-1, 2, -1)
    on_device = [x.to(target.device) for x in (q, k, v)]
    found = target.attend(
        *on_device, block_size=1, topk=2, selected=selected.to(target.device)
    )
    wanted, plain = (
        two_keys(*(x.to(t) for x in (q, k, v))) for t in (torch.float64, kind)
    )
    error = (found.cpu().double() - wanted).abs().max().item()
    allowed = 2 * (plain.double() - wanted).abs().max().item()
    allowed += 4 * torch.finfo(kind).eps * wanted.abs().max().item()
    what = f"{MANY:,} lists in one call"
    return [Check(what, str(target), dtype, error, allowed, error <= allowed)]


def two_keys(q, k, v):
    """Attend from every token to the one before and to itself, in q's dtype."""
    own = (q * k).sum(-1, keepdim=True) * q.shape[2] ** -0.5
    before = (q[1:] * k[:-1]).sum(-1, keepdim=True) * q.shape[2] ** -0.5
    weight = torch.sigmoid(before - own[1:])
    rest = weight * v[:-1] + (1 - weight) * v[1:]
    return torch.cat([v[:1].expand(-1, q.shape[1], -1), rest])


def check_cuda_graph(target, dtype):
    """Capture a call into a CUDA graph and replay it on other inputs."""
    known = expected(CASE, dtype)
    inputs = [torch.zeros_like(x, device="cuda") for x in known.tensors[:3]]
    inputs = [
        x.normal_(generator=torch.Generator("cuda").manual_seed(1)) for x in inputs
    ]
    sizes = {"block_size": CASE.block_size, "topk": CASE.topk, "return_aux": True}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        target.attend(*inputs, **sizes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse, selected = target.attend(*inputs, **sizes)
    for x, value in zip(inputs, known.tensors, strict=False):
        x.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    eager = target.attend(*inputs, **sizes)
    choice = equal("CUDA graph: choice", target, dtype, [selected], [eager[2]])
    results = dict(zip(NAMES, (out, lse), strict=False))
    return [*choice, compare("CUDA graph: forward", target, dtype, CASE, results)]


def check_peak_memory(target, dtype):
    """Measure what a long call takes beyond its outputs, against workspace_bytes."""
    kind = getattr(torch, dtype)
    q, k, v = (torch.randn(LONG, h, 128, dtype=kind, device="cuda") for h in (8, 2, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"block_size": 512, "topk": 6, "workspace_bytes": LIMIT}
    forward, out = temporary_bytes(lambda: [target.attend(*leaves, **options)])
    dout = torch.ones_like(out[0])
    backward, _ = temporary_bytes(lambda: torch.autograd.grad(out, leaves, [dout]))
    place = str(target), dtype
    return [
        Check("peak memory: forward, bytes", *place, forward, LIMIT, forward <= LIMIT),
        Check(
            "peak memory: backward, bytes", *place, backward, LIMIT, backward <= LIMIT
        ),
    ]


def temporary_bytes(function):
    """Return the most that a call held at once beyond what it left, and its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated(), result


def check_decoding(target, dtype):
    """Prefill a cache in pieces, then decode: one-shot results for the last tokens."""
    module = importlib.import_module("moba_fast.cache")
    known = expected(CASE, dtype)
    q, k, v, _ = (x.detach().to(target.device) for x in known.tensors)
    tail = 40
    cache = module.PagedKVCache(
        *(CASE.block_size, CASE.HK, CASE.D), dtype=q.dtype, device=target.device
    )
    done, rows = 0, []
    for piece in (301, 100, len(q) - tail - 401, *[1] * tail):
        a, done = done, done + piece
        cache.append(k[a:done], v[a:done])
        if piece == 1:
            rows.append(cache.attend(q[a:done], topk=CASE.topk, return_aux=True))
    out, lse, selected = (torch.cat(x) for x in zip(*rows, strict=True))
    wanted = torch.tensor(known.selected[-tail:], device=selected.device)
    choice = equal("decoding: choice", target, dtype, [selected], [wanted])
    padded = {
        name: torch.cat([torch.tensor(known.results[name][:-tail]).to(x), x.cpu()])
        for name, x in (("out", out.cpu()), ("lse", lse.cpu()))
    }
    return [*choice, compare("decoding", target, dtype, CASE, padded)]

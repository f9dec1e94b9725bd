"""Every flash kernel is called as its own signature says, and chosen as asked.

The packages need a GPU, so their signatures were read from their sources and recorded
in `flash_signatures.json`. A stand-in binds the arguments of a call to the recorded
names and computes what those names mean: an argument in a wrong place changes numbers.
"""

import inspect
import json
from pathlib import Path

import pytest
import torch

import moba_fast
from moba_fast import _flash, varlen
from moba_fast.backends import kernel_of
from moba_fast.varlen import Pack

RECORDS = json.loads((Path(__file__).parent / "flash_signatures.json").read_text())
PACKAGES = [pytest.param(r, id=f"{r['kernel']} {r['version']}") for r in RECORDS]
PLAIN, SCALE = _flash.KERNELS["plain"], 0.3
SIZES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def signature_of(record):
    """Build the recorded signature of a function."""
    parameters = []
    for name, *default in record["parameters"]:
        default = default[0] if default else inspect.Parameter.empty
        default = tuple(default) if isinstance(default, list) else default
        parameters.append(inspect.Parameter(name, 1, default=default))
    return inspect.Signature(parameters)


class StandIn:
    """A function of a package: the recorded signature over plain attention."""

    def __init__(self, record, compute):
        self.signature, self.returns = signature_of(record), record["returns"]
        # A custom operator hides its arguments from inspect.
        if not record["custom_op"]:
            self.__signature__ = self.signature
        self.compute, self.calls = compute, []

    def __call__(self, *arguments, **options):
        bound = self.signature.bind(*arguments, **options)
        bound.apply_defaults()
        named = bound.arguments
        self.calls.append(named)
        results = self.compute(named)
        # What nobody should take is a marker.
        found = tuple(results.get(name, f"not {name}") for name in self.returns)
        return found[0] if len(found) == 1 else found


def meaning(named):
    """Read the options of a call that plain attention has, and check the others."""
    assert named.get("dropout_p", 0.0) == 0.0
    assert not named.get("softcap")
    for name in ("window_size", "window_size_left", "window_size_right"):
        assert named.get(name, -1) in [-1, None, (-1, -1), (None, None)]
    unset = ("alibi_slopes", "block_table", "page_table", "score_mod", "learnable_sink")
    assert not any(torch.is_tensor(named.get(name)) for name in unset)
    return Pack(*(named[n] for n in SIZES)), named["causal"], named["softmax_scale"]


def compute_forward(named):
    out, lse = PLAIN.forward(named["q"], named["k"], named["v"], *meaning(named))
    return {"out": out, "softmax_lse": lse.T, "lse": lse.T}


def compute_backward(named):
    lse = named["softmax_lse"] if "softmax_lse" in named else named["lse"]
    assert lse.is_contiguous()
    merged = (named[n] for n in ("dout", "q", "k", "v", "out"))
    grads = PLAIN.backward(*merged, lse.T, *meaning(named), named["deterministic"])
    grads = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    for name, grad in grads.items():
        if named.get(name) is not None:
            named[name].copy_(grad)
    return grads


@pytest.fixture(params=PACKAGES)
def package(request, monkeypatch):
    """Put stand-ins of one version in the place of its package."""
    record, module = request.param, type("Module", (), {})
    for name, function in request.param["functions"].items():
        computes_gradients = "backward" in name or "bwd" in name
        compute = compute_backward if computes_gradients else compute_forward
        setattr(module, name, StandIn(function, compute))

    def import_package(kernel):
        assert kernel == record["kernel"]
        return module

    monkeypatch.setattr(_flash, "package", import_package)
    return _flash.KERNELS[record["kernel"]], module


def inputs(causal):
    """Draw a pack with grouped heads; without a mask it has more keys than queries."""
    g = torch.Generator().manual_seed(0)
    cu_q = torch.tensor([0, 4, 9], dtype=torch.int32)
    cu_k = cu_q if causal else torch.tensor([0, 7, 13], dtype=torch.int32)
    q, dout = (torch.randn(9, 4, 8, generator=g) for _ in range(2))
    k, v = (torch.randn(int(cu_k[-1]), 2, 8, generator=g) for _ in range(2))
    longest_k = int(cu_k.diff().max())
    return dout, q, k, v, (Pack(cu_q, cu_k, 5, longest_k), causal, SCALE)


@pytest.mark.parametrize("causal", [True, False])
def test_the_forward_call_binds_and_its_results_are_found(package, causal):
    kernel, _ = package
    _, q, k, v, options = inputs(causal)
    found = kernel.forward(q, k, v, *options)
    for a, b in zip(found, PLAIN.forward(q, k, v, *options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_backward_call_binds_and_its_results_are_found(
    package, causal, deterministic
):
    kernel, module = package
    dout, q, k, v, options = inputs(causal)
    out, lse = PLAIN.forward(q, k, v, *options)
    arguments = dout, q, k, v, out, lse + 0.1, *options, deterministic
    found = kernel.backward(*arguments)
    for a, b in zip(found, PLAIN.backward(*arguments), strict=True):
        assert torch.equal(a, b)
    calls = [f.calls for f in vars(module).values() if isinstance(f, StandIn)]
    [named] = [call for one in calls for call in one]
    assert named["deterministic"] is deterministic


def test_rows_are_as_wide_as_a_kernel_takes_them_right(package):
    """The backward of flash-attn 4 needs a multiple of 32 and says nothing of it."""
    kernel, module = package
    [name] = [name for name, known in _flash.KERNELS.items() if known is kernel]
    dout, q, k, v, options = inputs(causal=True)
    out, lse = varlen.attention(q, k, v, *options, name)
    torch.testing.assert_close((out, lse), PLAIN.forward(q, k, v, *options))
    arguments = dout, q, k, v, out, lse, *options, True
    found = varlen.attention_backward(*arguments, name)
    torch.testing.assert_close(found, PLAIN.backward(*arguments))
    calls = [f.calls for f in vars(module).values() if isinstance(f, StandIn)]
    widths = [call["q"].shape[-1] for one in calls for call in one]
    assert widths == [32 if name == "flash-attn-4" else 8] * 2


def test_records_cover_what_the_adapter_supports():
    arities = {
        (r["kernel"], len(f["returns"]))
        for r in RECORDS
        for f in r["functions"].values()
    }
    assert {("flash-attn", 8), ("flash-attn", 4), ("flash-attn-4", 2)} <= arities


# PyTorch matches arguments to an operator's schema before it looks for a kernel.
def test_operators_of_pytorch_take_the_arguments():
    dout, q, k, v, options = inputs(causal=True)
    out, lse = PLAIN.forward(q, k, v, *options)
    x = [x.bfloat16() for x in (dout, q, k, v, out)]
    with pytest.raises(NotImplementedError, match="_attention_forward' with arguments"):
        _flash.Aten.forward(*x[1:4], *options)
    with pytest.raises(
        NotImplementedError, match="_attention_backward' with arguments"
    ):
        _flash.Aten.backward(*x, lse, *options, True)


SCHEMAS = {
    "forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
    "return_debug_mask",
    "backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q "
    "max_k dropout_p is_causal rng_state unused",
}


@pytest.mark.parametrize("direction", SCHEMAS)
def test_schemas_of_pytorch_have_the_places_that_calls_fill(direction):
    operator = getattr(torch.ops.aten, f"_flash_attention_{direction}").default
    places = [a.name for a in operator._schema.arguments if not a.kwarg_only]
    assert " ".join(places) == SCHEMAS[direction]
    assert "scale" in [a.name for a in operator._schema.arguments if a.kwarg_only]
    if direction == "forward":
        out, lse, *_ = (result.name for result in operator._schema.returns)
        assert out == "output"
        assert lse.endswith("logsumexp")


def test_shapes_of_pytorch_s_kernel_are_those_of_the_contract():
    dout, q, k, v, (pack, *options) = inputs(causal=True)
    pack = Pack(pack.cu_q.to("meta"), pack.cu_k.to("meta"), pack.max_q, pack.max_k)
    dout, q, k, v = (x.bfloat16().to("meta") for x in (dout, q, k, v))
    out, lse = _flash.Aten.forward(q, k, v, pack, *options)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:2]
    grads = _flash.Aten.backward(dout, q, k, v, out, lse, pack, *options, False)
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]


@pytest.fixture
def only(monkeypatch):
    """Return a function that makes some kernels run here and no others."""

    def allow(*names):
        def why_not(kernel):
            return "" if kernel in names else f"{kernel} is switched off"

        monkeypatch.setattr(_flash, "why_not", why_not)
        monkeypatch.delenv(_flash.VARIABLE, raising=False)

    return allow


def test_the_best_kernel_that_runs_is_taken(only):
    for count in range(len(_flash.GPU_KERNELS)):
        there = _flash.GPU_KERNELS[count:]
        only(*there)
        name, reason = _flash.choose()
        assert name == there[0]
        assert reason == _flash.KERNELS[name].__doc__.rstrip(".")


def test_without_a_kernel_every_reason_is_given(only):
    only()
    name, reason = _flash.choose()
    assert name is None
    for kernel in _flash.GPU_KERNELS:
        assert f"{kernel}: {kernel} is switched off" in reason


def test_the_variable_and_the_argument_force_a_kernel(only, monkeypatch):
    only("flash-attn", "aten")
    monkeypatch.setenv(_flash.VARIABLE, "aten")
    assert _flash.choose() == ("aten", f"asked for by {_flash.VARIABLE}")
    assert _flash.choose("flash-attn") == ("flash-attn", "asked for by the call")


@pytest.mark.parametrize("by", ["call", "variable"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash-attn-1", "unknown kernel 'flash-attn-1': choose one of 'flash-attn-4'"),
        ("flash-attn", "'flash-attn', asked for by .*, does not run here: flash-att"),
    ],
)
def test_what_cannot_be_forced_is_an_error(only, monkeypatch, by, name, message):
    only("aten")
    if by == "variable":
        monkeypatch.setenv(_flash.VARIABLE, name)
    with pytest.raises(ValueError, match=message):
        _flash.choose(name if by == "call" else None)


def test_a_backend_may_name_its_kernel(only):
    only("aten")
    q = torch.zeros(4, 1, 8)
    for name in ("flash:flash-attn-1", "triton:aten", "flash-attn"):
        with pytest.raises(ValueError, match=r"unknown (kernel|backend)"):
            kernel_of(name, q)
    with pytest.raises(ValueError, match="'flash-attn', asked for by the call"):
        kernel_of("flash:flash-attn", q)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        kernel_of("flash:aten", q)


def test_a_call_names_a_kernel_that_does_not_exist():
    x = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match="unknown kernel 'flash-attn-1'"):
        moba_fast.moba_attention(
            x, x, x, block_size=2, topk=1, backend="flash:flash-attn-1"
        )

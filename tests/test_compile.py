"""The operators keep PyTorch's contracts: opcheck, compile, autocast, any strides."""

import pytest
import torch
from impls import make_case

import moba_fast
from moba_fast import op
from moba_fast.workspace import DEFAULT
from moba_lab.model import Config, Model

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CASES = {
    "one sequence": {"lengths": [20], "block_size": 4, "topk": 3},
    "a pack": {"lengths": [9, 0, 13], "block_size": 4, "topk": 2},
    "more keys": {"lengths": [9, 13], "queries": [2, 5], "block_size": 3, "topk": 3},
    "current block only": {"lengths": [11], "block_size": 4, "topk": 1},
}
SHAPES = pytest.mark.parametrize("name", CASES)
ON_DEVICES = pytest.mark.parametrize("device", DEVICES)


def tensors(name, device, dtype=torch.float32, grad=True):
    """Return q, k, v, the two offsets and the options of a case."""
    case = make_case(**CASES[name], H=4, HK=2, D=8)
    leaves = [
        torch.tensor(x, dtype=dtype, device=device).requires_grad_(grad)
        for x in (case.q, case.k, case.v)
    ]
    offsets = [None, None]
    if len(case.cu_seqlens) > 2:
        both = case.cu_seqlens, case.cu_seqlens_k
        offsets = [torch.tensor(x, dtype=torch.int32, device=device) for x in both]
    return leaves, offsets, (case.block_size, case.topk)


def opcheck(operator, *arguments):
    """Run all of PyTorch's checks of an operator and say that they passed."""
    results = torch.library.opcheck(operator, arguments)
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}


@SHAPES
@ON_DEVICES
def test_opcheck_select(name, device):
    (q, k, _), offsets, sizes = tensors(name, device, grad=False)
    opcheck(op.select, q, k, *offsets, *sizes, "torch")


@SHAPES
@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_attend_and_its_backward(name, device, dtype):
    leaves, offsets, (block_size, topk) = tensors(name, device, dtype)
    q, k, v = (x.detach() for x in leaves)
    selected = op.select(q, k, *offsets, block_size, topk, "torch")
    options = block_size, 0.3, "torch", True, DEFAULT
    opcheck(op.attend, *leaves, selected, *offsets, *options, False)
    out, lse = op.attend(q, k, v, selected, *offsets, *options, False)
    merged = torch.ones_like(out), q, k, v, out, lse
    opcheck(op.attend_backward, *merged, selected, *offsets, *options)


def loss_and_gradients(run, leaves, dout):
    out = run(*leaves)
    return out, torch.autograd.grad(out, leaves, dout)


@SHAPES
@ON_DEVICES
def test_compiled_attention_equals_eager(name, device):
    leaves, (cu_q, cu_k), (block_size, topk) = tensors(name, device)

    def attend(q, k, v):
        return moba_fast.moba_attention(
            *(q, k, v),
            block_size=block_size,
            topk=topk,
            cu_seqlens=cu_q,
            cu_seqlens_k=cu_k,
            backend="torch",
        )

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    dout = torch.linspace(-1, 1, leaves[0].numel(), device=device).view_as(leaves[0])
    eager = loss_and_gradients(attend, leaves, dout)
    found = loss_and_gradients(compiled, leaves, dout)
    assert torch.equal(found[0], eager[0])
    for a, b in zip(found[1], eager[1], strict=True):
        assert torch.equal(a, b)


def step(model, run, tokens, cu_seqlens):
    """Return the loss of a call and the gradients of all parameters."""
    model.zero_grad()
    logits = run(tokens, cu_seqlens)
    loss = torch.nn.functional.cross_entropy(logits.float(), tokens)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


# Inductor calls a C++ compiler for every kernel of a model, which takes a minute.
@pytest.mark.parametrize(
    ("backend", "attention"),
    [
        ("aot_eager", ("moba", "full")),
        pytest.param("inductor", ("moba",), marks=pytest.mark.slow),
    ],
    ids=["aot_eager", "inductor"],
)
def test_a_compiled_model_has_the_loss_and_gradients_of_the_eager_one(
    backend, attention
):
    torch.manual_seed(0)
    sizes = {"width": 16, "hidden": 16, "heads": 2, "kv_heads": 1, "head_dim": 8}
    model = Model(Config(**sizes, block_size=8, topk=3, attention=attention))
    tokens = torch.randint(256, (80,))
    cu_seqlens = torch.tensor([0, 30, 80], dtype=torch.int32)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    loss, grads = step(model, model, tokens, cu_seqlens)
    other, others = step(model, compiled, tokens, cu_seqlens)
    assert other == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-6)


def test_generated_code_calls_the_operators_as_eager_code_does():
    """Inductor hands strided views to the operators and computes with what they give.

    Around the call it has two kernels to compile, where a model has eighteen.
    """
    torch.manual_seed(0)
    into, out_of = torch.nn.Linear(16, 32), torch.nn.Linear(16, 16)
    cu_seqlens = torch.tensor([0, 30, 80], dtype=torch.int32)

    def attend(x):
        q, k, v = into(x).unflatten(-1, (4, 8)).split((2, 1, 1), dim=1)
        out = moba_fast.moba_attention(
            q, k, v, block_size=8, topk=3, cu_seqlens=cu_seqlens
        )
        return out_of(out.flatten(1)).square().mean()

    x, parameters = torch.randn(80, 16), [*into.parameters(), *out_of.parameters()]
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="inductor")
    (loss, grads), (other, others) = (
        (value := run(x), torch.autograd.grad(value, parameters))
        for run in (attend, compiled)
    )
    torch.testing.assert_close(other, loss)
    for grad, found in zip(grads, others, strict=True):
        assert grad.abs().max() > 0
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-6)


def test_compiled_attention_takes_other_lengths():
    case = make_case([33], block_size=4, topk=3, H=4, HK=2, D=8)
    q, k, v = (torch.tensor(x) for x in (case.q, case.k, case.v))

    def attend(q, k, v):
        return moba_fast.moba_attention(q, k, v, block_size=4, topk=3)

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (33, 17, 5):
        rows = q[:n], k[:n], v[:n]
        assert torch.equal(compiled(*rows), attend(*rows))


@ON_DEVICES
def test_autocast_computes_in_its_dtype(device):
    (q, k, v), _, (block_size, topk) = tensors("one sequence", device)
    sizes = {"block_size": block_size, "topk": topk}
    with torch.autocast(device, dtype=torch.bfloat16):
        out = moba_fast.moba_attention(q, k, v, **sizes)
    halves = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = moba_fast.moba_attention(*halves, **sizes)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    others = torch.autograd.grad(expected.float().sum(), halves)
    for grad, other in zip(grads, others, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, other.float())


@ON_DEVICES
def test_autocast_does_not_reach_the_gate(device):
    case = make_case([600], block_size=32, topk=4, H=4, HK=2, D=64)
    halves = [
        torch.tensor(x, device=device).bfloat16() for x in (case.q, case.k, case.v)
    ]
    options = {"block_size": 32, "topk": 4, "return_aux": True}
    expected = moba_fast.moba_attention(*halves, **options)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = moba_fast.moba_attention(*halves, **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@ON_DEVICES
def test_autocast_leaves_float64_alone(device):
    leaves, _, (block_size, topk) = tensors("one sequence", device, torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = moba_fast.moba_attention(*leaves, block_size=block_size, topk=topk)
    assert out.dtype == torch.float64


@SHAPES
@ON_DEVICES
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_any_subset_of_gradients_equals_all_of_them(name, device, wanted):
    leaves, offsets, (block_size, topk) = tensors(name, device)

    def gradients(names):
        named = {
            n: x.detach().clone().requires_grad_(n in names)
            for n, x in zip("qkv", leaves, strict=True)
        }
        out = moba_fast.moba_attention(
            **named,
            block_size=block_size,
            topk=topk,
            cu_seqlens=offsets[0],
            cu_seqlens_k=offsets[1],
        )
        out.square().sum().backward()
        return {n: x.grad for n, x in named.items()}

    every, some = gradients("qkv"), gradients(wanted)
    for n, grad in some.items():
        if n in wanted:
            assert torch.equal(grad, every[n])
            assert grad.abs().max() > 0
        else:
            assert grad is None


@ON_DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_give_what_copies_give(device, dtype):
    leaves, _, (block_size, topk) = tensors("one sequence", device, dtype, grad=False)
    views = {
        "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "every second": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
        "dimensions first": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "after an offset": lambda x: torch.cat([x[:3], x])[3:],
        "out of a wide row": lambda x: torch.cat([x, x], dim=2)[..., : x.shape[2]],
    }

    def run(tensors):
        inputs = [x.detach().requires_grad_() for x in tensors]
        out = moba_fast.moba_attention(*inputs, block_size=block_size, topk=topk)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    expected = run(leaves)
    for name, view in views.items():
        strided = [view(x) for x in leaves]
        assert all(torch.equal(a, b) for a, b in zip(strided, leaves, strict=True))
        for a, b in zip(run(strided), expected, strict=True):
            assert torch.equal(a, b), name


def test_a_second_derivative_is_refused():
    leaves, _, (block_size, topk) = tensors("one sequence", "cpu")
    out = moba_fast.moba_attention(*leaves, block_size=block_size, topk=topk)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="attend_backward"):
        torch.autograd.grad(grads[0].sum(), leaves)


def test_a_result_without_a_gradient_gives_none():
    leaves, _, (block_size, topk) = tensors("one sequence", "cpu")
    out = moba_fast.moba_attention(*leaves, block_size=block_size, topk=topk)
    # Autograd calls every function on the way, here without a gradient of out.
    loss = WithoutGradient.apply(out) + sum(x.sum() for x in leaves)
    for grad in torch.autograd.grad(loss, leaves):
        assert torch.equal(grad, torch.ones_like(grad))


class WithoutGradient(torch.autograd.Function):
    """Return a number that depends on x but has an undefined gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_lse_and_selected_have_no_gradient():
    leaves, _, (block_size, topk) = tensors("one sequence", "cpu")
    out, lse, selected = moba_fast.moba_attention(
        *leaves, block_size=block_size, topk=topk, return_aux=True
    )
    assert (out.requires_grad, lse.requires_grad) == (True, False)
    assert selected.dtype == torch.int32

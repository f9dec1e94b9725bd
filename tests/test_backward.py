"""Gradients against central differences, autograd and the other package."""

import numpy as np
import pytest
import torch
from hypothesis import given
from impls import FAST, REF, cases, largest_error, make_case

import moba_fast
import moba_ref
from moba_fast._packs import Pack
from moba_fast.varlen import attention_backward
from moba_lab.agree import agree, plain_attention


def gradients(impl, case, dout, scale=0.6):
    """Run forward and moba_attention_backward; return NumPy dq, dk, dv."""
    q, k, v = (impl.array(x) for x in (case.q, case.k, case.v))
    out, lse, selected = impl.moba_attention(
        q, k, v, **case.options, softmax_scale=scale, return_aux=True
    )
    grads = impl.moba_attention_backward(
        impl.array(dout), q, k, v, out, lse, selected, case.partition(impl), scale
    )
    return [np.asarray(x) for x in grads]


def autograd_of_definition(case, dout, scale=0.6):
    """Differentiate dense attention under the definition's mask with autograd."""
    mask = torch.tensor(moba_ref.token_mask(case.q, case.k, **case.options))
    leaves = [torch.tensor(x, requires_grad=True) for x in (case.q, case.k, case.v)]
    ratio = case.q.shape[1] // case.k.shape[1]
    k, v = (x.repeat_interleave(ratio, dim=1) for x in leaves[1:])
    scores = torch.einsum("shd,thd->sht", leaves[0], k) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    out = torch.einsum("sht,thd->shd", weights, v)
    return torch.autograd.grad(out, leaves, torch.tensor(dout))


def draw_dout(case, seed=1):
    return np.random.default_rng(seed).normal(size=case.q.shape)


@given(cases(most_tokens=14))
def test_reference_equals_autograd_through_the_definition(case):
    dout = draw_dout(case)
    if case.q.size == 0:
        assert not any(x.any() for x in gradients(REF, case, dout))
        return
    expected = autograd_of_definition(case, dout)
    for grad, other in zip(gradients(REF, case, dout), expected, strict=True):
        assert largest_error(grad, other) < 1e-10


def test_reference_equals_central_differences():
    case = make_case([9, 6], block_size=4, topk=2, H=4, HK=2, D=3)
    dout, step, scale = draw_dout(case), 1e-5, 0.6
    _, _, selected = case.run(REF)

    def loss(name, at, change):
        moved = getattr(case, name).copy()
        moved[at] += change
        options = {"selected": selected, "softmax_scale": scale}
        return (case.replace(**{name: moved}).run(REF, **options)[0] * dout).sum()

    for name, grad in zip("qkv", gradients(REF, case, dout), strict=True):
        numeric = np.zeros_like(grad)
        for at in np.ndindex(grad.shape):
            numeric[at] = (loss(name, at, step) - loss(name, at, -step)) / (2 * step)
        assert largest_error(grad, numeric) < 1e-6


@given(cases())
def test_twins_agree(case):
    dout = draw_dout(case)
    fast, ref = gradients(FAST, case, dout), gradients(REF, case, dout)
    for a, b in zip(fast, ref, strict=True):
        assert largest_error(a, b) < 1e-11


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("HK", [1, 4])
def test_dtypes_agree_with_the_reference(dtype, HK):
    case = make_case([150, 3, 47], block_size=8, topk=4, H=4, HK=HK, D=16)
    leaves = [torch.tensor(x).to(dtype) for x in (case.q, case.k, case.v)]
    dout = torch.tensor(draw_dout(case)).to(dtype)
    exact = [x.double().numpy() for x in leaves]
    out, lse, selected = moba_ref.moba_attention(
        *exact, **case.options, return_aux=True
    )
    blocks = case.partition(REF)
    expected = moba_ref.moba_attention_backward(
        dout.double().numpy(), *exact, out, lse, selected, blocks, 0.25
    )
    leaves = [x.requires_grad_() for x in leaves]
    fast = moba_fast.moba_attention(
        *leaves, **case.options, selected=torch.tensor(selected)
    )
    plain, _ = plain_attention(*leaves, selected, case.partition(FAST))
    fast = torch.autograd.grad(fast, leaves, dout)
    plain = torch.autograd.grad(plain, leaves, dout)
    for name, a, b, p in zip(("dq", "dk", "dv"), fast, expected, plain, strict=True):
        assert a.dtype == dtype
        agree(a, b, name, plain=p)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv", "qv"])
def test_any_subset_of_inputs_can_need_a_gradient(wanted):
    case = make_case([20], block_size=4, topk=3, H=2, HK=1)
    dout = torch.tensor(draw_dout(case))
    tensors = {
        name: torch.tensor(getattr(case, name), requires_grad=name in wanted)
        for name in "qkv"
    }
    moba_fast.moba_attention(**tensors, **case.options).backward(dout)
    expected = autograd_of_definition(case, draw_dout(case), scale=0.5)
    for name, grad in zip("qkv", expected, strict=True):
        if name in wanted:
            assert largest_error(tensors[name].grad, grad) < 1e-12
        else:
            assert tensors[name].grad is None


def test_the_choice_has_no_gradient():
    case = make_case([20], block_size=4, topk=2)
    k = torch.tensor(case.k, requires_grad=True)
    out = moba_fast.moba_attention(
        torch.tensor(case.q), k, torch.tensor(case.v), **case.options
    )
    # The first query of block 4 chose one past block: no other past key may move.
    out[16, 0].sum().backward()
    chosen = case.run(REF)[2][16, 0, 0]
    moved = k.grad.abs().sum((1, 2)) > 0
    assert moved.nonzero()[:, 0].tolist() == [*range(4 * chosen, 4 * chosen + 4), 16]


def test_keys_that_no_query_reads_get_zeros():
    q, k = torch.zeros(0, 1, 4), torch.ones(6, 1, 4)
    cu_q, cu_k = torch.tensor([0, 0, 0]), torch.tensor([0, 3, 6])
    merged = q, q, k, k, q, torch.zeros(0, 1)
    grads = attention_backward(*merged, Pack(cu_q, cu_k, 0, 3), False, 1.0, True)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    assert not any(x.any() for x in grads)

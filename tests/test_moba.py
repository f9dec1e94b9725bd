"""moba_attention against the definition, over shapes, packs, ties and dtypes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from impls import FAST, IMPLS, REF, cases, largest_error, make_case

import moba_fast
import moba_ref
from moba_lab.agree import agree, plain_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(cases())
@settings(max_examples=300)
def test_reference_equals_the_definition(case):
    out, lse, _ = case.run(REF)
    expected = moba_ref.moba_attention_definition(
        case.q, case.k, case.v, **case.options, return_aux=True
    )
    assert largest_error(out, expected[0]) < 1e-12
    assert largest_error(lse, expected[1]) < 1e-12


@given(cases())
@settings(max_examples=200)
def test_fast_equals_the_reference(case):
    out, lse, selected = case.run(FAST)
    expected = case.run(REF)
    assert selected.tolist() == expected[2].tolist()
    assert largest_error(out, expected[0]) < 1e-12
    assert largest_error(lse, expected[1]) < 1e-12


def test_mask_of_the_definition_is_what_was_selected():
    case = make_case([30, 7], block_size=4, topk=3, H=4, HK=2)
    _, _, selected = case.run(REF)
    blocks = case.partition(REF)
    mask = moba_ref.token_mask(case.q, case.k, **case.options)
    for i, h in np.ndindex(mask.shape[:2]):
        chosen = set(selected[i, h].tolist()) - {-1}
        assert set(blocks.of_token[mask[i, h]].tolist()) == chosen
        assert np.flatnonzero(mask[i, h]).max() == i


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_softmax_scale_is_used(impl, scale):
    case = make_case([23], block_size=4, topk=3)
    expected = moba_ref.moba_attention_definition(
        case.q, case.k, case.v, **case.options, softmax_scale=scale
    )
    assert largest_error(case.run(impl, softmax_scale=scale)[0], expected) < 1e-12


@pytest.mark.parametrize("impl", IMPLS, ids=repr)
def test_selected_replaces_the_gate(impl):
    case = make_case([20], block_size=4, topk=3)
    current = np.arange(20) // 4
    recent = np.stack([current - 2, current - 1, current], -1)
    recent = np.where(recent < 0, -1, recent)
    # Padding stands after the past blocks, not before them.
    recent[4:8] = recent[4:8][:, [1, 0, 2]]
    recent = np.repeat(recent[:, None], 2, axis=1).astype(np.int32)
    out, _, selected = case.run(impl, selected=impl.array(recent))
    assert selected.tolist() == recent.tolist()
    for i in (3, 6, 19):
        tokens = slice(max(0, (i // 4 - 2) * 4), i + 1)
        weights = np.exp(case.k[tokens, 0] @ case.q[i, 0] / 2)
        expected = weights @ case.v[tokens, 0] / weights.sum()
        assert largest_error(out[i, 0], expected) < 1e-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("HK", [1, 2, 4])
def test_dtypes_agree_with_the_reference(dtype, HK):
    case = make_case([150, 3, 47], block_size=8, topk=4, H=4, HK=HK, D=16)
    q, k, v = (torch.tensor(x).to(dtype) for x in (case.q, case.k, case.v))
    exact = case.replace(
        **{n: x.double().numpy() for n, x in zip("qkv", (q, k, v), strict=True)}
    )
    ref_out, ref_lse, selected = exact.run(REF)
    out, lse, _ = moba_fast.moba_attention(
        q, k, v, **case.options, selected=torch.tensor(selected), return_aux=True
    )
    blocks = case.partition(FAST)
    plain_out, plain_lse = plain_attention(q, k, v, selected, blocks)
    assert out.dtype == dtype
    agree(out, ref_out, "out", plain=plain_out)
    agree(lse, ref_lse, "lse", plain=plain_lse)


def test_strided_inputs_give_the_same_result():
    case = make_case([40], block_size=4, topk=3, H=4, HK=2)
    q, k, v = (torch.tensor(x) for x in (case.q, case.k, case.v))
    expected = moba_fast.moba_attention(q, k, v, **case.options)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    every_second = [x.repeat_interleave(2, dim=2)[..., ::2] for x in (q, k, v)]
    reversed_axes = [
        x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v)
    ]
    for strided in (heads_first, every_second, reversed_axes):
        assert not strided[0].is_contiguous()
        assert torch.equal(moba_fast.moba_attention(*strided, **case.options), expected)


def test_strided_gradients_give_the_same_result():
    case = make_case([40], block_size=4, topk=3, H=4, HK=2)

    def gradients(dout):
        leaves = [torch.tensor(x, requires_grad=True) for x in (case.q, case.k, case.v)]
        out = moba_fast.moba_attention(*leaves, **case.options)
        return torch.autograd.grad(out, leaves, dout)

    expanded = torch.ones(1, dtype=torch.float64).expand(case.q.shape)
    for a, b in zip(gradients(expanded), gradients(expanded.clone()), strict=True):
        assert torch.equal(a, b)


def test_repeated_calls_are_bit_identical():
    case = make_case([200], block_size=8, topk=4, H=4, HK=2)
    assert np.array_equal(case.run(FAST)[0], case.run(FAST)[0])


def test_blocks_laid_out_in_inference_mode_serve_training():
    q = torch.randn(37, 2, 8, generator=torch.Generator().manual_seed(0))
    sizes = {"block_size": 5, "topk": 3}
    with torch.inference_mode():
        expected = moba_fast.moba_attention(q, q, q, **sizes)
    leaf = q.clone().requires_grad_()
    out = moba_fast.moba_attention(leaf, leaf, leaf, **sizes)
    out.sum().backward()
    assert out.equal(expected.clone())
    assert leaf.grad.isfinite().all()

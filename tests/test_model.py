import dataclasses
import json

import pytest
import torch

from moba_lab.model import (
    CHECKPOINT,
    Config,
    Model,
    add_previous,
    config_json,
    full_attention,
    load_checkpoint,
)

SMALL = Config(
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=32,
    context=64,
    block_size=8,
    topk=3,
    attention=("moba", "full"),
)


@pytest.fixture
def model():
    """Weights far larger than at the start, so that what is read matters."""
    torch.manual_seed(0)
    model = Model(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(256, (100,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_moba_with_enough_blocks_is_full_attention(model, tokens):
    model.set_attention("full")
    full = model(tokens)
    model = wide(model, topk=13)
    assert model.attention == ("moba", "moba")
    torch.testing.assert_close(model(tokens), full, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_moba_with_few_blocks_is_not_full_attention(model, tokens):
    model.set_attention("full")
    full = model(tokens)
    model.set_attention("moba")
    assert (model(tokens) - full).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["moba", "full"])
@pytest.mark.parametrize("lengths", [(30, 30, 30), (41, 1, 17)])
def test_a_pack_equals_each_sequence_alone(model, tokens, kind, lengths):
    model.set_attention(kind)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = tokens[: ends[-1]]
    packed = model(tokens, ends)
    alone = torch.cat([model(part) for part in tokens.split(list(lengths))])
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["moba", "full"])
def test_no_byte_sees_the_future(model, tokens, kind):
    model.set_attention(kind)
    changed = tokens.clone()
    changed[60:] = (changed[60:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:60], after[:60], atol=1e-5, rtol=0)
    assert (before[60:] - after[60:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_position_is_relative(model, tokens):
    """Bytes after a full block see the same text at another place alike."""
    model = wide(model, topk=1)
    late = model(torch.cat([tokens[-16:], tokens[:40]]))[16:]
    torch.testing.assert_close(late[8:], model(tokens[:40])[8:], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_aux_says_what_was_selected(model, tokens):
    cu_seqlens = torch.tensor([0, 40, 100], dtype=torch.int32)
    _, (moba, full) = model(tokens, cu_seqlens, return_aux=True)
    assert (moba.kind, full.kind, full.selected) == ("moba", "full", None)
    assert moba.selected.shape == (100, 4, 3)
    assert moba.scores.shape == full.scores.shape == (100, 4, 5 + 8)
    own = torch.cat([torch.arange(40) // 8, 5 + torch.arange(60) // 8])
    assert (moba.selected[..., -1] == own[:, None]).all()
    assert (moba.selected[:40, :, :-1] < 5).all()
    late = moba.selected[80:, :, :-1]
    assert (late >= 5).all()
    scores = moba.scores.masked_fill(moba.scores.isinf(), -1e9)
    best = scores.topk(2, dim=-1).indices[80:].sort(-1).values
    torch.testing.assert_close(late.long(), best)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_aux_weights_reproduce_the_attention(model, tokens, layer):
    cu_seqlens = torch.tensor([0, 40, 100], dtype=torch.int32)
    captured = {}
    attention = model.layers[layer].attention
    attention.to_out.register_forward_pre_hook(
        lambda _, args: captured.update(out=args[0])
    )
    _, aux = model(tokens, cu_seqlens, return_aux=True)
    aux = aux[layer]
    for query in (0, 39, 40, 71, 99):
        weights = aux.weights(query)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4))
        values = aux.v.repeat_interleave(2, dim=1)
        out = torch.einsum("hs,shd->hd", weights, values)
        torch.testing.assert_close(
            out.flatten(), captured["out"][query], atol=1e-5, rtol=1e-4
        )


def test_set_attention_switches_the_layers_named(model):
    model.set_attention("full")
    model.set_attention("moba", layers=[1])
    assert model.attention == ("full", "moba")
    model.set_attention(["moba", "full"])
    assert model.attention == ("moba", "full")


def test_set_attention_refuses_what_it_does_not_know(model):
    with pytest.raises(ValueError, match="'dense'"):
        model.set_attention("dense")
    with pytest.raises(ValueError, match="each of 2 layers, got 3"):
        model.set_attention(["moba"] * 3)
    with pytest.raises(ValueError, match="'dense'"):
        Config(attention=("dense",))
    assert model.attention == ("moba", "full")


def test_losses_reach_every_parameter(model, tokens):
    losses = model.losses(tokens[:-1], tokens[1:])
    assert losses.shape == (99,)
    logits = model(tokens[:-1]).log_softmax(-1)
    expected = -logits[torch.arange(99), tokens[1:]]
    torch.testing.assert_close(losses, expected)
    losses.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_full_attention_is_pytorch_s_within_every_sequence():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, h, 4, generator=generator) for h in (2, 1, 1))
    out = full_attention(q, k, v, torch.tensor([0, 4, 4, 6]))
    for rows in (slice(0, 4), slice(4, 6)):
        parts = (x[rows].transpose(0, 1) for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(
            *parts, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out[rows], expected.transpose(0, 1))


def test_add_previous_of_two_sequences():
    x = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    position = torch.tensor([0, 1, 2, 0, 1])
    out = add_previous(x, torch.tensor([[1.0], [10.0]]), position)
    assert out.ravel().tolist() == [1.0, 3.0, 16.0, 8.0, 24.0]


def test_config_survives_json():
    assert Config(**json.loads(config_json(SMALL))) == SMALL


def test_missing_checkpoint_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="--export"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_shipped_model_is_small_and_knows_python():
    assert CHECKPOINT.stat().st_size <= 4_000_000
    model = load_checkpoint()
    card = json.loads(CHECKPOINT.with_suffix(".json").read_text(encoding="utf-8"))
    assert dataclasses.asdict(model.config) == {
        **card["config"],
        "attention": tuple(card["config"]["attention"]),
    }
    likely, unlikely = (
        torch.tensor(list(text))
        for text in (b"import sys\n\ndef main():\n    ret", b"Sie haben heute keine Po")
    )
    with torch.no_grad():
        losses = [model.losses(x[:-1], x[1:]).mean() for x in (likely, unlikely)]
        assert losses[0] < losses[1] - 1
        assert model(likely)[-1].argmax() == ord("u")


def wide(model, topk):
    """Return the same weights with all layers MoBA and another `topk`."""
    config = dataclasses.replace(SMALL, topk=topk, attention=("moba", "moba"))
    other = Model(config)
    other.load_state_dict(model.state_dict())
    return other.eval()

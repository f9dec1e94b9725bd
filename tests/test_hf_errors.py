"""What would be no MoBA is refused with words that help, and changes nothing."""

import pytest
import torch
from hf_models import SIZES, dynamic_cache, logits, make, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5Model

import moba_fast.hf
from moba_fast.hf.attention import moba_attention_forward

SMALL = {"block_size": 4, "topk": 2, "full_layers": (-1,)}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"topk": 2.5}, TypeError, "topk must be an int, got 2.5"),
        ({"decode": "dense"}, ValueError, 'decode must be "full" or "moba"'),
        ({"full_layers": [4]}, ValueError, r"from -4 to 3, .* got \[4\]"),
        ({"full_layers": [True]}, TypeError, "full_layers must be a list of ints"),
        ({"full_layers": range(4)}, ValueError, "no layer is left for MoBA"),
    ],
    ids=str,
)
def test_settings(settings, error, message):
    model, ids = make("llama"), tokens(1, 9)
    expected = logits(model, ids)
    with pytest.raises(error, match=message):
        moba_fast.hf.enable(model, **{**SMALL, **settings})
    assert not hasattr(model.config, "moba")
    assert torch.equal(logits(model, ids), expected)
    moba_fast.hf.enable(model, **SMALL)
    kept = dict(model.config.moba)
    with pytest.raises(error, match=message):
        moba_fast.hf.enable(model, **settings)
    assert model.config.moba == kept


def test_settings_written_into_the_configuration_are_checked_too():
    config = LlamaConfig(**SIZES)
    config.moba = {"block": 4}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="moba")
    with pytest.raises(ValueError, match=r"must be of .* got \['block'\]"):
        model(tokens(1, 9))
    config.moba = {"topk": 0}
    with pytest.raises(ValueError, match="topk must be at least 1"):
        model(tokens(1, 9))


def test_unknown_defaults():
    with pytest.raises(ValueError, match=r"got \['block'\]"):
        moba_fast.hf.register(block=4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, "kernels have no soft cap"),
        ("mistral", {"sliding_window": 8}, r"\[0, 1, 2, 3\] have a sliding window"),
    ],
)
def test_models_that_cannot(name, changes, message):
    with pytest.raises(ValueError, match=message):
        moba_fast.hf.enable(make(name, **changes), **SMALL)
    config = make(name, **changes).config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="moba")
    with pytest.raises(ValueError, match="MoBA"):
        model(tokens(1, 9))


def test_an_encoder_is_refused():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 4, "num_heads": 2}
    with pytest.raises(ValueError, match="this one has an encoder"):
        moba_fast.hf.enable(T5Model(T5Config(vocab_size=8, **sizes)), **SMALL)


def test_a_model_that_does_not_ask_for_an_attention_function(monkeypatch):
    model = make("llama")
    refuse = classmethod(lambda cls: False)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", refuse)
    with pytest.raises(ValueError, match="does not call the library's Attention"):
        moba_fast.hf.enable(model, **SMALL)
    assert not hasattr(model.config, "moba")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_four_axes(dtype):
    model, ids = moba_fast.hf.enable(make("llama"), **SMALL), tokens(1, 9)
    mask = torch.ones(1, 1, 9, 9, dtype=dtype).tril()
    with pytest.raises(ValueError, match=r"of shape \(batch, tokens\)"):
        logits(model, ids, attention_mask=mask)


def test_a_mask_that_leaves_out_the_cache():
    model, ids = moba_fast.hf.enable(make("llama"), **SMALL), tokens(1, 9)
    cache = dynamic_cache(model)
    logits(model, ids, cache)
    with pytest.raises(ValueError, match=r"up to the last query, 18.* got 9"):
        logits(model, ids, cache, attention_mask=torch.ones_like(ids))


def test_packed_sequences_with_a_cache():
    model, ids = moba_fast.hf.enable(make("llama"), **SMALL), tokens(1, 9)
    positions = torch.tensor([[9, 10, 11, 0, 1, 2, 3, 4, 5]])
    for mask in (None, torch.tensor([[0] + 17 * [1]])):
        cache = dynamic_cache(model)
        logits(model, ids, cache)
        with pytest.raises(ValueError, match="begin anew within queries"):
            logits(model, ids, cache, position_ids=positions, attention_mask=mask)


def test_offsets_beside_padding():
    model, ids = moba_fast.hf.enable(make("llama"), **SMALL), tokens(1, 9)
    cu, mask = torch.tensor([0, 4, 9]), torch.tensor([[0] + 8 * [1]])
    with pytest.raises(ValueError, match="give one of them"):
        logits(model, ids, attention_mask=mask, cu_seq_lens_q=cu, cu_seq_lens_k=cu)


def test_dropout_inside_attention():
    config = LlamaConfig(**SIZES, attention_dropout=0.1)
    model = moba_fast.hf.enable(AutoModelForCausalLM.from_config(config), **SMALL)
    logits(model.eval(), tokens(1, 9))
    with pytest.raises(ValueError, match=r"no dropout inside attention, got 0\.1"):
        model.train()(tokens(1, 9))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"softcap": 30.0}, "cannot take softcap"),
        ({"position_bias": torch.zeros(1)}, "cannot take position_bias"),
        ({"read_index": [0]}, "continuous batching"),
        ({"is_causal": False}, "attends in both directions"),
    ],
    ids=["softcap", "bias", "continuous", "bidirectional"],
)
def test_what_a_layer_may_ask_for(asked, message):
    model = moba_fast.hf.enable(make("llama"), **SMALL)
    x = torch.zeros(1, 4, 9, 8)
    with pytest.raises(ValueError, match=message):
        moba_attention_forward(model.model.layers[0].self_attn, x, x, x, None, **asked)


def test_continuous_batching():
    model = moba_fast.hf.enable(make("llama"), **SMALL)
    with pytest.raises(ValueError, match=r"continuous batching|paged\|moba"):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)


def test_masks_that_see_the_future():
    model = make("gemma3", use_bidirectional_attention=True)
    moba_fast.hf.enable(model, **SMALL)
    with pytest.raises(ValueError, match="MoBA reads the past only"):
        logits(model, tokens(1, 9))

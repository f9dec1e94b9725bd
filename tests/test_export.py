"""What `moba_lab.export` writes is, for transformers alone, the same model."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moba_lab import export
from moba_lab.model import (
    CHECKPOINT,
    Config,
    Model,
    config_json,
    load_card,
    load_checkpoint,
)

CONFIG = Config(
    width=24,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=40,
    context=64,
    block_size=4,
    topk=2,
    attention=("full", "moba", "full"),
    key_conv=1,
    rope_dims=8,
    rope_base=500.0,
)
TEXT = "é Ā = '\t\r\n\U0001f600'\x7f"


def write(folder, config=CONFIG):
    torch.manual_seed(0)
    model = Model(config)
    # Weights of 1 would not tell one norm from another.
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(torch.rand_like(x) + 0.5 if "norm" in name else 4 * x)
    path = folder / "small.safetensors"
    metadata = {"config": config_json(config)}
    safetensors.torch.save_file(model.state_dict(), path, metadata)
    return model.eval(), path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model, path = write(folder)
    export.main([str(path), str(folder / "hf")])
    return model, folder / "hf"


@torch.no_grad()
def test_logits_are_ours_in_full_and_by_moba(exported):
    import moba_fast.hf

    assert moba_fast.hf
    ours, folder = exported
    tokens = torch.randint(256, (2, 50), generator=torch.Generator().manual_seed(1))
    sparse = ours(tokens)
    by_moba = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="moba")
    torch.testing.assert_close(by_moba(tokens).logits, sparse, rtol=1e-4, atol=1e-4)
    assert by_moba.config.moba["full_layers"] == [0, 2]
    ours.set_attention("full")
    dense = ours(tokens)
    ours.set_attention(CONFIG.attention)
    library = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(library(tokens).logits, dense, rtol=1e-4, atol=1e-4)
    assert (dense - sparse).abs().max() > 0.1


def test_a_token_is_a_byte_and_a_text_is_opened(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported[1])
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == [0, *TEXT.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer("a\0b", add_special_tokens=False)["input_ids"] == [97, 0, 98]
    assert tokenizer("a", "b")["input_ids"] == [0, 97, 0, 98]
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(256))
    assert vocabulary == {"\0": 0} | {x: n for n, x in export.byte_signs().items()}


def test_generation_ends_where_a_file_ends(exported):
    model = AutoModelForCausalLM.from_pretrained(exported[1])
    assert model.generation_config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(exported[1]).model_max_length == 64


def test_smaller_weights_are_written_as_asked(tmp_path):
    made = export.export(write(tmp_path)[1], tmp_path / "hf", "bfloat16")
    assert made.dtype == torch.bfloat16
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"key_conv": 3}, "key_conv=3"), ({"rope_dims": 4}, "--rope-dims 8")],
)
def test_what_no_stock_model_has_is_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        export.to_transformers(Model(replace(CONFIG, **changes)))


def test_the_command_refuses_the_needle_model_and_writes_nothing(tmp_path, capsys):
    needle = CHECKPOINT.with_name("needle.safetensors")
    with pytest.raises(SystemExit):
        export.main([str(needle), str(tmp_path / "hf")])
    assert "key_conv=3, which no architecture" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@torch.no_grad()
def test_the_shipped_dense_model_is_small_and_the_same_in_the_library():
    path = CHECKPOINT.with_name("dense.safetensors")
    assert path.stat().st_size < 10e6
    ours = load_checkpoint(path)
    assert set(ours.attention) == {"full"}
    assert load_card(path)["config"]["context"] == ours.config.context == 2048
    tokens = torch.tensor(list(Path(__file__).read_bytes()))
    tokens = tokens[None, :200]
    library = export.to_transformers(ours)
    torch.testing.assert_close(library(tokens).logits, ours(tokens), rtol=0, atol=1e-3)
    # It has learned source code: far below the 8 bits of a byte.
    loss = library(tokens, labels=tokens).loss.item()
    assert loss < 2.2

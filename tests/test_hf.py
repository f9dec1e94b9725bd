"""Models of transformers run MoBA with batches, caches and masks of every kind."""

from itertools import pairwise

import pytest
import torch
from hf_models import (
    CONFIGS,
    cache_of,
    dynamic_cache,
    logits,
    make,
    static_cache,
    tokens,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    SiglipVisionConfig,
)

import moba_fast.hf
from moba_fast.hf.attention import moba_attention_forward
from moba_fast.hf.masks import moba_mask
from moba_ref import moba_attention as reference
from moba_ref.definition import moba_attention_definition

SMALL = {"block_size": 4, "topk": 2, "full_layers": (-1,)}
LENGTH = 37
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


def switched(name, **settings):
    return moba_fast.hf.enable(make(name), **{**SMALL, **settings})


def make_cache(kind, model):
    if kind == "pages":
        return moba_fast.hf.MobaCache(model.config)
    return dynamic_cache(model) if kind == "dynamic" else static_cache(model, 50)


@pytest.mark.parametrize("name", CONFIGS)
def test_topk_over_all_blocks_is_the_models_own_attention(name):
    model, ids = make(name), tokens(2, LENGTH)
    expected = logits(model, ids)
    moba_fast.hf.enable(model, block_size=4, topk=10, full_layers=())
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    moba_fast.hf.enable(model, topk=2)
    assert (logits(model, ids) - expected).abs().max() > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_disable_restores_every_bit(name):
    model, ids = make(name), tokens(2, LENGTH)
    expected, config = logits(model, ids), model.config.to_dict()
    moba_fast.hf.disable(moba_fast.hf.enable(model, **SMALL))
    assert torch.equal(logits(model, ids), expected)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(name, left):
    model, rows = switched(name), [tokens(n, seed=n) for n in (LENGTH, 22, 1)]
    ids, mask = padded(rows, left)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # Positions only matter by their differences.
    for given in ({"position_ids": positions}, {}):
        found = logits(model, ids, attention_mask=mask, **given)
        for row, real, alone in zip(found, mask.bool(), rows, strict=True):
            expected = logits(model, alone[None])[0]
            torch.testing.assert_close(row[real], expected, **CLOSE)


def padded(rows, left, extra=3):
    width = max(map(len, rows)) + extra
    # Not the padding token, whose keys are zero: that is how older static caches tell
    # what is not written yet.
    ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width).long()
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if left else slice(len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


def test_padding_within_a_row_changes_nothing():
    model, ids = switched("llama"), tokens(1, 20)
    mask = torch.ones(1, 25, dtype=torch.long)
    mask[0, [0, 1, 9, 10, 24]] = 0
    spread = torch.zeros(1, 25, dtype=torch.long)
    spread[mask.bool()] = ids[0]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, spread, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[mask.bool()], logits(model, ids)[0], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
def test_packed_equals_separate(name, told_by):
    model, rows = switched(name), [tokens(n, seed=n) for n in (13, 3, 16, 1)]
    lengths = torch.tensor([len(row) for row in rows])
    options = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if told_by == "cu_seq_lens":
        cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        options |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    found = logits(model, torch.cat(rows)[None], use_cache=False, **options)[0]
    expected = torch.cat([logits(model, row[None])[0] for row in rows])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_packed_rows_of_a_batch_and_with_padding():
    model = switched("llama")
    rows = [tokens(n, seed=n) for n in (9, 11, 14, 6)]
    ids = torch.stack([torch.cat(rows[:2]), torch.cat(rows[2:])])
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in x]) for x in ((9, 11), (14, 6))]
    )
    expected = torch.cat([logits(model, row[None])[0] for row in rows])
    found = logits(model, ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(found.flatten(0, 1), expected, **CLOSE)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    found = logits(model, ids, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(found[1], expected[20:], **CLOSE)
    torch.testing.assert_close(found[0, :-1], expected[:19], **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["dynamic", "static", "pages"])
@pytest.mark.parametrize("left", [None, True], ids=["whole", "padded"])
def test_chunked_equals_one_shot_in_every_cache(name, kind, left):
    model = switched(name)
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    if left:
        ids, mask = padded([tokens(LENGTH), tokens(11, seed=1)], left)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = logits(model, ids, attention_mask=mask, position_ids=positions)
    cache = make_cache(kind, model)
    found = []
    for a, b in pairwise([0, 2, 7, 21, ids.shape[1]]):
        options = {"attention_mask": mask[:, :b] if left else None}
        found.append(
            logits(model, ids[:, a:b], cache, position_ids=positions[:, a:b], **options)
        )
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static", "pages"])
def test_single_tokens_attend_in_full_or_by_moba(kind):
    for decode in ("full", "moba"):
        model, ids = switched("llama", decode=decode), tokens(2, LENGTH)
        cache = make_cache(kind, model)
        logits(model, ids[:, :-1], cache)
        found = logits(model, ids[:, -1:], cache)[:, -1]
        if decode == "moba":
            expected = logits(model, ids)[:, -1]
        else:
            cache = dynamic_cache(model)
            logits(model, ids[:, :-1], cache)
            moba_fast.hf.disable(model)
            expected = logits(model, ids[:, -1:], cache)[:, -1]
        torch.testing.assert_close(found, expected, **CLOSE)


class Layer(torch.nn.Module):
    """What an attention function sees of a layer."""

    def __init__(self, config, layer_idx=0):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_key_value_groups = 2


@pytest.mark.parametrize("topk", [1, 2, 3, 50])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_layer_is_the_reference_on_the_real_tokens(topk, left):
    config = make("llama").config
    config.moba = {"block_size": 4, "topk": topk, "full_layers": []}
    generator = torch.Generator().manual_seed(topk)
    q, k, v = (
        torch.randn(3, h, 21, 8, generator=generator, dtype=torch.float64)
        for h in (4, 2, 2)
    )
    rows = [torch.ones(n) for n in (21, 14, 2)]
    mask = padded(rows, left, extra=0)[1]
    roles = moba_mask(
        batch_size=3, q_length=21, kv_length=21, attention_mask=mask, config=config
    )
    options = {"scaling": 0.5, "output_attentions": True}
    out, selected = moba_attention_forward(Layer(config), q, k, v, roles, **options)
    assert selected.shape == (3, 4, 21, topk)
    sizes = {"block_size": 4, "topk": topk, "softmax_scale": 0.5}
    for i, real in enumerate(mask.bool()):
        alone = [x[i].transpose(0, 1)[real].numpy() for x in (q, k, v)]
        for function in (reference, moba_attention_definition):
            assert abs(out[i, real].numpy() - function(*alone, **sizes)).max() < 1e-12
        *_, chosen = reference(*alone, **sizes, return_aux=True)
        assert (selected[i].transpose(0, 1)[real].numpy() == chosen).all()
        assert (out[i, ~real] == 0).all()
        assert (selected[i][:, ~real] == -1).all()


def test_output_attentions_are_the_selected_blocks():
    model, ids = switched("gemma3", full_layers=[3]), tokens(2, LENGTH)
    with torch.no_grad():
        outputs = model(ids, output_attentions=True)
        plain = model(ids)
    assert torch.equal(outputs.logits, plain.logits)
    # Layers 0 and 2 have a window, layer 3 is full.
    assert [x.shape[-1] for x in outputs.attentions] == [0, 2, 0, 0]
    chosen = outputs.attentions[1]
    assert chosen.shape == (2, 4, LENGTH, 2)
    assert chosen.dtype == torch.int32
    current = torch.arange(LENGTH, dtype=torch.int32) // 4
    assert (chosen[..., -1] == current).all()
    assert ((chosen[..., 0] < current) & (chosen[..., 0] >= -1)).all()


def test_blocks_of_packed_sequences_count_from_their_own_start():
    model, rows = switched("llama"), [tokens(n, seed=n) for n in (13, 16)]
    positions = torch.cat([torch.arange(13), torch.arange(16)])[None]
    options = {"output_attentions": True, "use_cache": False}
    with torch.no_grad():
        found = model(torch.cat(rows)[None], position_ids=positions, **options)
        alone = [model(row[None], **options).attentions[0] for row in rows]
    assert torch.equal(found.attentions[0], torch.cat(alone, dim=2))


@pytest.mark.parametrize("values", [4, 12])
def test_values_may_have_another_head_dimension(values):
    config = make("llama").config
    config.moba = {"block_size": 4, "topk": 50, "full_layers": []}
    q, k = torch.randn(2, 2, 21, 8, generator=torch.Generator().manual_seed(0))[:, None]
    v = torch.randn(1, 2, 21, values, generator=torch.Generator().manual_seed(1))
    out, _ = moba_attention_forward(Layer(config), q, k, v, None)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, dense.transpose(1, 2))


def test_settings_survive_saving_and_loading(tmp_path):
    model, ids = switched("llama", decode="moba"), tokens(2, LENGTH)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    assert again.config.moba == model.config.moba
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert not torch.equal(logits(plain, ids), logits(model, ids))
    assert torch.equal(logits(moba_fast.hf.enable(plain), ids), logits(model, ids))
    moba_fast.hf.disable(again)
    assert again.config._attn_implementation == "sdpa"
    assert not hasattr(again.config, "moba")


def test_a_model_without_settings_has_the_registered_ones():
    ids, config = tokens(2, LENGTH), make("llama").config
    expected = logits(switched("llama"), ids)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="moba").eval()
    moba_fast.hf.register(**SMALL)
    try:
        assert torch.equal(logits(model, ids), expected)
    finally:
        moba_fast.hf.register()


def test_several_queries_after_a_cache_that_were_generated_attend_in_full():
    model, ids = switched("llama"), tokens(1, LENGTH)
    one_by_one = dynamic_cache(model)
    logits(model, ids[:, :30], one_by_one)
    expected = [logits(model, ids[:, i : i + 1], one_by_one) for i in range(30, LENGTH)]
    for cache in (dynamic_cache(model), moba_fast.hf.MobaCache(model.config)):
        logits(model, ids[:, :30], cache)
        found = logits(model, ids[:, 30:], cache, moba_generated=LENGTH - 30)
        torch.testing.assert_close(found, torch.cat(expected, 1), **CLOSE)
    found = logits(model, ids, moba_generated=LENGTH - 30, use_cache=False)
    torch.testing.assert_close(found[:, 30:], torch.cat(expected, 1), **CLOSE)


def test_generated_queries_beside_padding_in_a_static_cache():
    model, (ids, mask) = switched("llama"), padded([tokens(LENGTH), tokens(9)], True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def run(cuts, **options):
        cache, found = static_cache(model, 50), []
        for a, b in pairwise(cuts):
            where = {"position_ids": positions[:, a:b], "attention_mask": mask[:, :b]}
            found.append(logits(model, ids[:, a:b], cache, **where, **options))
            options = {}
        return torch.cat(found, 1)[:, 36:]

    found = run([0, 40], moba_generated=4)
    torch.testing.assert_close(found, run([0, 36, 37, 38, 39, 40]), **CLOSE)


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_a_single_query_that_is_padding_gets_zeros(decode):
    config = make("llama").config
    config.moba = {"block_size": 4, "full_layers": [], "topk": 2, "decode": decode}
    q, (k, v) = torch.ones(2, 4, 1, 8), torch.ones(2, 2, 2, 9, 8)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, -1] = False
    where = {"q_length": 1, "q_offset": 8, "kv_length": 9, "batch_size": 2}
    roles = moba_mask(**where, attention_mask=mask, config=config)
    out, _ = moba_attention_forward(Layer(config), q, k, v, roles)
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[1], torch.ones(1, 4, 8))


def test_disable_goes_back_to_what_it_was():
    model = make("llama")
    model.set_attn_implementation("eager")
    moba_fast.hf.enable(moba_fast.hf.enable(model, **SMALL), topk=3)
    assert moba_fast.hf.disable(model).config._attn_implementation == "eager"


def test_a_forward_pass_keeps_its_cache():
    model, ids = switched("llama"), tokens(2, LENGTH)
    with torch.no_grad():
        outputs = model(ids, use_cache=True)
    assert cache_of(outputs).get_seq_length() == LENGTH


def test_of_a_model_with_pictures_only_the_text_runs_moba():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=CONFIGS["gemma3"](),
        vision_config=SiglipVisionConfig(**vision),
        mm_tokens_per_image=1,
        image_token_index=60,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    ids = tokens(2, LENGTH).clamp(max=50)
    expected = logits(model, ids)
    moba_fast.hf.enable(model, block_size=4, topk=10, full_layers=())
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    assert model.config.vision_config._attn_implementation == "sdpa"
    # Tokens of a picture see each other in both directions.
    picture = torch.zeros_like(ids)
    picture[:, 5:9] = 1
    with pytest.raises(ValueError, match="MoBA reads the past only"):
        logits(model, ids, token_type_ids=picture)
    moba_fast.hf.enable(model, topk=2)
    assert (logits(model, ids) - expected).abs().max() > 1
    assert torch.equal(logits(moba_fast.hf.disable(model), ids), expected)

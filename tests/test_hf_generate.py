"""Every mode of generate gives the tokens that it should."""

import copy

import pytest
import torch
from hf_models import CONFIGS, cache_argument, dynamic_cache, logits, make, tokens

import moba_fast.hf

SMALL = {"block_size": 4, "topk": 2, "full_layers": (-1,)}
NEW = 12
BEAMS = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}
SAMPLING = {"do_sample": True, "top_k": 5, "temperature": 0.7}


def switched(name, **settings):
    return moba_fast.hf.enable(make(name), **{**SMALL, **settings})


def generate(model, ids, mask=None, seed=0, cache=None, **options):
    torch.manual_seed(seed)
    mask = torch.ones_like(ids) if mask is None else mask
    # Older versions want an end of text, which must not come here.
    ends = {"eos_token_id": 10**6, "pad_token_id": 0}
    options = {"max_new_tokens": NEW, "do_sample": False, **ends, **options}
    options |= cache_argument(model, cache)
    return model.generate(ids, attention_mask=mask, **options)


def one_by_one(model, ids):
    """Greedy tokens without generate: a prefill, then single steps."""
    cache, new = dynamic_cache(model), ids
    for _ in range(NEW):
        new = logits(model, new, cache)[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
    return ids


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("decode", ["full", "moba"])
def test_greedy(name, decode):
    model, ids = switched(name, decode=decode), tokens(2, 23)
    expected = one_by_one(model, ids)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)
    pages = moba_fast.hf.MobaCache(model.config)
    assert torch.equal(generate(model, ids, cache=pages), expected)
    chunks = {"prefill_chunk_size": 5, "cache": dynamic_cache(model)}
    assert torch.equal(generate(model, ids, **chunks), expected)


def test_by_moba_no_cache_is_needed():
    model, ids = switched("llama", decode="moba"), tokens(2, 23)
    assert torch.equal(generate(model, ids, use_cache=False), generate(model, ids))


@pytest.mark.parametrize("cache", ["dynamic", "static", "pages"])
@pytest.mark.parametrize("decode", ["full", "moba"])
def test_left_padded_rows_get_the_tokens_of_their_own(decode, cache):
    model, rows = switched("qwen3", decode=decode), [tokens(n, seed=n) for n in (23, 6)]
    ids, mask = torch.zeros(2, 2, 25, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    options = {}
    if cache == "static":
        options["cache_implementation"] = "static"
    elif cache == "pages":
        options["cache"] = moba_fast.hf.MobaCache(model.config)
    found = generate(model, ids, mask, **options)
    for row, alone in zip(found, rows, strict=True):
        expected = generate(model, alone[None])[0, -NEW:]
        assert row[-NEW:].tolist() == expected.tolist()


@pytest.mark.parametrize("mode", [SAMPLING, BEAMS, SAMPLING | BEAMS], ids=str)
@pytest.mark.parametrize("decode", ["full", "moba"])
def test_pages_give_the_same_tokens_as_without(decode, mode):
    model, ids = switched("llama", decode=decode), tokens(2, 23)
    expected = generate(model, ids, **mode)
    pages = moba_fast.hf.MobaCache(model.config)
    assert torch.equal(generate(model, ids, cache=pages, **mode), expected)
    dense = moba_fast.hf.disable(model)
    assert not torch.equal(generate(dense, ids, **mode), expected)


def test_beams_reorder_what_a_fresh_run_over_the_winner_confirms():
    model, ids = switched("llama", decode="moba"), tokens(2, 23)
    best = generate(model, ids, num_beams=4)
    again = generate(model, ids, num_beams=4, use_cache=False)
    assert torch.equal(best, again)


@pytest.mark.parametrize("decode", ["full", "moba"])
@pytest.mark.parametrize("helper", ["model", "lookup"])
@pytest.mark.parametrize("cache", ["dynamic", "pages"])
def test_assisted_decoding_gives_the_greedy_tokens(helper, decode, cache):
    model = switched("llama", decode=decode)
    ids = tokens(1, 8).repeat(1, 4)
    expected = generate(model, ids)
    options = {"prompt_lookup_num_tokens": 3}
    if helper == "model":
        options = {"assistant_model": make("llama", seed=0)}
    if cache == "pages":
        options["cache"] = moba_fast.hf.MobaCache(model.config)
    found = generate(model, ids, **options)
    # Older versions may go on for a token too many.
    assert torch.equal(found[:, : expected.shape[1]], expected)


def test_a_conversation_goes_on_from_its_cache():
    model, first = switched("llama", decode="moba"), tokens(1, 23)
    for cache in (dynamic_cache(model), moba_fast.hf.MobaCache(model.config)):
        said = generate(model, first, cache=cache)
        asked = torch.cat([said, tokens(1, 9, seed=1)], dim=1)
        assert torch.equal(generate(model, asked, cache=cache), generate(model, asked))


def test_generate_returns_the_blocks_of_every_step():
    model, ids = switched("llama", decode="moba"), tokens(1, 23)
    options = {"return_dict_in_generate": True, "output_attentions": True}
    steps = generate(model, ids, **options).attentions
    assert len(steps) == NEW
    assert steps[0][0].shape == (1, 4, 23, 2)
    assert [step[0][0, 0, 0, -1].item() for step in steps[1:]] == [
        (23 + i) // 4 for i in range(NEW - 1)
    ]


def test_pages_refuse_other_attention_and_gradients():
    model, ids = make("llama"), tokens(1, 9)
    cache = moba_fast.hf.MobaCache(model.config)
    logits(model, ids, cache)
    with pytest.raises(RuntimeError, match='works with attention "moba" only'):
        logits(model, ids, cache)
    moba_fast.hf.enable(model, **SMALL)
    cache = moba_fast.hf.MobaCache(model.config)
    with pytest.raises(ValueError, match="the cache keeps no gradients"):
        model(ids, **cache_argument(model, cache))


def test_pages_keep_no_padding_and_can_be_cropped_and_reset():
    model, ids = switched("llama"), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = moba_fast.hf.MobaCache(model.config)
    logits(model, ids, cache, attention_mask=mask)
    layer = cache.layers[0]
    assert layer.pages.lengths.tolist() == [4, 9]
    assert cache.get_seq_length() == 9
    cache.crop(-6)
    assert layer.pages.lengths.tolist() == [0, 3]
    cache.batch_repeat_interleave(2)
    assert layer.pages.lengths.tolist() == [0, 0, 3, 3]
    cache.batch_select_indices(torch.tensor([2]))
    assert layer.pages.lengths.tolist() == [3]
    cache.reset()
    assert cache.get_seq_length() == 0


def test_pages_of_other_settings_are_refused():
    model, ids = switched("llama"), tokens(1, 9)
    cache = moba_fast.hf.MobaCache(model.config)
    moba_fast.hf.enable(model, block_size=8)
    with pytest.raises(ValueError, match=r"blocks of 4 tokens, .* say 8 now"):
        logits(model, ids, cache)


def test_a_copy_of_a_switched_model_is_one_of_its_own():
    model, ids = switched("llama"), tokens(1, 8).repeat(1, 4)
    other = copy.deepcopy(model)
    expected = generate(model, ids)
    moba_fast.hf.disable(model)
    found = generate(other, ids, prompt_lookup_num_tokens=3)
    assert torch.equal(found[:, : expected.shape[1]], expected)
    assert other.prepare_inputs_for_generation.__self__ is other
    moba_fast.hf.disable(other)
    assert torch.equal(generate(other, ids), generate(model, ids))

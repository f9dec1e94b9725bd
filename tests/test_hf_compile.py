"""Models that run MoBA compile as one graph, and give what they give without."""

import pytest
import torch
from hf_models import cache_argument, logits, make, static_cache, tokens
from transformers.masking_utils import create_causal_mask

import moba_fast.hf

SMALL = {"block_size": 4, "topk": 2, "full_layers": (-1,)}
LENGTH = 22


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    # The backend decides nothing about what a graph can hold, and this one is fast.
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def batch(case):
    """Return ids, options of the model and which tokens count."""
    ids, real = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.bool)
    options = {"use_cache": False}
    if case == "padded":
        real[0, :5] = real[1, -3:] = False
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        options |= {"attention_mask": real.long(), "position_ids": positions}
    elif case == "packed":
        positions = torch.cat([torch.arange(n) for n in (9, LENGTH - 9)])
        options["position_ids"] = positions.expand(2, -1).contiguous()
    return ids, options, real


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("llama", "plain"),
        ("llama", "padded"),
        ("llama", "packed"),
        ("gpt-oss", "padded"),
    ],
)
def test_a_training_step_is_one_graph(name, case):
    model = moba_fast.hf.enable(make(name, num_hidden_layers=2).train(), **SMALL)
    model.config.moba["full_layers"] = []
    ids, options, real = batch(case)
    results = []
    for run in (model, compiled(model)):
        model.zero_grad()
        out = run(ids, **options).logits[real]
        out.square().mean().backward()
        grads = [x.grad.clone() for x in model.parameters() if x.grad is not None]
        results.append([out.detach(), *grads])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_decoding_with_a_static_cache_is_one_graph(decode):
    model = make("llama", num_hidden_layers=2)
    moba_fast.hf.enable(model, **SMALL, decode=decode)
    ids, run = tokens(2, LENGTH), compiled(model)
    expected, found = ([], [])
    for results, step in ((expected, model), (found, run)):
        cache = static_cache(model, 32)
        logits(model, ids[:, :16], cache)
        for i in range(16, LENGTH):
            with torch.no_grad():
                argument = cache_argument(model, cache)
                results.append(step(ids[:, i : i + 1], **argument).logits)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected))


def test_a_compiled_mask_that_sees_the_future_is_refused():
    config = moba_fast.hf.enable(make("llama"), **SMALL).config
    ids = torch.tensor([[-1, 0, 0, -1]])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def masked(embeds, block_ids):
        mask = create_causal_mask(
            config, embeds, None, None, block_sequence_ids=block_ids
        )
        return embeds if mask is None else embeds + mask.sum()

    masked(torch.zeros(1, 4, 2), torch.full_like(ids, -1))
    with pytest.raises(RuntimeError, match="MoBA reads the past only"):
        masked(torch.zeros(1, 4, 2), ids)

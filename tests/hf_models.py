"""Make tiny models with random weights, and call them alike in old and new versions."""

import inspect

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.cache_utils import DynamicCache, StaticCache

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOWS = ["sliding_attention", "full_attention"] * 2
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "gemma2": lambda: Gemma2Config(
        **SIZES,
        sliding_window=6,
        layer_types=WINDOWS,
        attn_logit_softcapping=None,
        query_pre_attn_scalar=16,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, sliding_window=6, layer_types=WINDOWS, query_pre_attn_scalar=16
    ),
    "gpt-oss": lambda: GptOssConfig(
        **SIZES,
        sliding_window=6,
        layer_types=WINDOWS,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}


def make(name, seed=0, **changes):
    """Make a model of random weights, in eval mode."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(*shape, seed=0):
    """Draw token ids, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def cache_of(outputs):
    """Return the cache of a model's outputs, which has had two names."""
    return outputs["cache"] if "cache" in outputs else outputs["past_key_values"]


@torch.no_grad()
def logits(model, ids, cache=None, **options):
    """Run a model and return its logits."""
    return model(ids, **cache_argument(model, cache), **options).logits


def cache_argument(model, cache):
    """Name the argument of a cache as the installed version does."""
    if cache is None:
        return {}
    names = inspect.signature(type(model.base_model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def static_cache(model, length):
    """Make a static cache of so many tokens."""
    return StaticCache(config=model.config, max_cache_len=length)


def dynamic_cache(model):
    """Make an empty dynamic cache."""
    return DynamicCache(config=model.config)

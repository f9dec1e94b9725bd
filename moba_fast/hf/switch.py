"""Switch a model to MoBA and back, in place."""

from types import MethodType

from transformers import AttentionInterface, AttentionMaskInterface

from moba_fast.hf import settings as keep
from moba_fast.hf.attention import moba_attention_forward
from moba_fast.hf.masks import moba_mask

NAME = keep.NAME


def register(**defaults):
    """Register attention "moba" with transformers; importing `moba_fast.hf` does it.

    Args:
        defaults: block_size, topk, full_layers and decode of models whose configuration
            has none; see `enable`. Without any, those of the paper's 8B model.

    Raises:
        ValueError: if a name is another one.

    Example:
        >>> register(block_size=512, topk=3)
        >>> register()
    """
    if unknown := sorted(defaults.keys() - keep.PAPER.keys()):
        raise ValueError(f"settings must be of {sorted(keep.PAPER)}, got {unknown}")
    keep.defaults = {**keep.PAPER, **defaults}
    AttentionInterface.register(NAME, moba_attention_forward)
    AttentionMaskInterface.register(NAME, moba_mask)


def enable(model, block_size=None, topk=None, full_layers=None, decode=None):
    """Switch a transformers model to MoBA, in place, at any time.

    Paper: section 2.2 (full and MoBA layers have the same parameters), 3.2 (the last
    layers full), 3.3 (MoBA for prefill, full attention when generating).

    What is None stays as the model's configuration has it; without any, it is 4096, 12,
    (-3, -2, -1) and "full", as in the paper's 8B model. Settings are kept in
    `config.moba`, so that they are saved with the model. Of a prompt of at most
    block_size * topk tokens all blocks are chosen: it is read as in full.

    Args:
        model: a causal language model, also one within PEFT.
        block_size: tokens per block.
        topk: blocks per query, the current one included.
        full_layers: layers that attend in full, from the end where negative.
        decode: "full" lets generated tokens attend in full, "moba" by MoBA.

    Returns:
        model.

    Raises:
        TypeError: if a number is no int.
        ValueError: if a setting does not fit the model, or the model cannot run MoBA.
    """
    model = inner(model)
    config = model.config.get_text_config(decoder=True)
    before = getattr(config, NAME, None)
    given = {
        "block_size": block_size,
        "topk": topk,
        "full_layers": None if full_layers is None else list(full_layers),
        "decode": decode,
    }
    chosen = {**keep.settings_of(config)}
    chosen |= {name: x for name, x in given.items() if x is not None}
    chosen["full_layers"] = list(chosen["full_layers"])
    if config._attn_implementation != NAME:
        chosen["dense"] = config._attn_implementation
    config.moba = chosen
    try:
        keep.check_settings(config)
        set_attention(model, config, NAME)
    except (TypeError, ValueError):
        restore(config, before)
        raise
    if "moba_hook" not in model.__dict__:
        model.moba_hook = model.register_forward_pre_hook(
            mark_generated, with_kwargs=True
        )
        model.prepare_inputs_for_generation = MethodType(prepare_inputs, model)
    return model


def disable(model):
    """Give a model the attention that it had before `enable`, and forget the settings.

    Args:
        model: a model that runs MoBA; another one stays as it is.

    Returns:
        model.
    """
    model = inner(model)
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation == NAME:
        dense = keep.settings_of(config).get("dense")
        set_attention(
            model, config, dense or model.get_correct_attn_implementation(None)
        )
    restore(config, None)
    if "moba_hook" in model.__dict__:
        model.__dict__.pop("moba_hook").remove()
        model.__dict__.pop("prepare_inputs_for_generation")
    return model


def inner(model):
    """Return the model of the library within PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def restore(config, settings):
    """Put settings back as they were."""
    if settings is not None:
        config.moba = settings
    elif NAME in config.__dict__:
        del config.moba


def set_attention(model, config, name):
    """Set the attention of the text model only, and see that it was set.

    Raises:
        ValueError: if the model does not call the library's attention interface.
    """
    if config is model.config:
        model.set_attn_implementation(name)
    else:
        parts = model.config.sub_configs
        [key] = [x for x in parts if getattr(model.config, x, None) is config]
        model.set_attn_implementation({key: name})
    if config._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} does not call the library's AttentionInterface, "
            f"so its attention cannot be replaced"
        )


def prepare_inputs(self, *args, **kwargs):
    """Tell `mark_generated` that generate makes the call."""
    inputs = type(self).prepare_inputs_for_generation(self, *args, **kwargs)
    return {**inputs, "moba_generate": True}


def mark_generated(model, args, kwargs):
    """Say how many of the last tokens of a call are generated ones.

    In assisted decoding generate lets the model check several tokens in one call, which
    would look like a chunk of a prompt; it wants their logits and that of the token
    before.
    """
    kept = kwargs.get("logits_to_keep", 0)
    if kwargs.pop("moba_generate", False) and isinstance(kept, int) and kept > 1:
        tokens = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        kwargs["moba_generated"] = kept if kept == tokens.shape[1] else kept - 1
    return args, kwargs

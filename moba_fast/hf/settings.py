"""Keep MoBA's settings in the configuration of a model, and say which layers use it."""

from moba_fast.checks import check_integer

NAME = "moba"
DECODE = ("full", "moba")
# The paper's 8B model (section 3.3): 4096 tokens a block, top 12, last three layers
# full, full attention when generating.
PAPER = {"block_size": 4096, "topk": 12, "full_layers": (-3, -2, -1), "decode": "full"}
defaults = dict(PAPER)


def settings_of(config):
    """Return block_size, topk, full_layers and decode of a configuration, as a dict.

    Args:
        config: configuration of a text model; its attribute `moba`, if there is one, is
            a dict of settings.
    """
    return {**defaults, **(getattr(config, NAME, None) or {})}


def check_settings(config):
    """Raise unless the settings of a configuration fit its layers.

    Raises:
        TypeError: if a number is no int.
        ValueError: if a setting is unknown, a number is less than 1, decode or a layer
            does not exist, no layer is left for MoBA, or the model attends in a way
            that MoBA cannot take part in.
    """
    settings = settings_of(config)
    if unknown := sorted(settings.keys() - {*PAPER, "dense"}):
        raise ValueError(f"moba settings must be of {sorted(PAPER)}, got {unknown}")
    check_integer(settings["block_size"], "block_size")
    check_integer(settings["topk"], "topk")
    if settings["decode"] not in DECODE:
        raise ValueError(f'decode must be "full" or "moba", got {settings["decode"]!r}')
    full = full_layers(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("MoBA is for decoder-only models; this one has an encoder")
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f"MoBA's kernels have no soft cap, and this model caps its scores at "
            f"{config.attn_logit_softcapping}; set config.attn_logit_softcapping to "
            f"None if the model may go without, else keep its own attention"
        )
    types = layer_types(config)
    if "chunked_attention" in types:
        raise ValueError("MoBA cannot stand beside chunked attention (Llama 4) yet")
    if not set(range(len(types))) - full - other_layers(types):
        windows = sorted(other_layers(types))
        raise ValueError(
            f"no layer is left for MoBA: of {len(types)} layers {sorted(full)} are to "
            f"be full and {windows} have a sliding window or are no attention; give "
            f"fewer full_layers, or set config.sliding_window to None"
        )


def layer_types(config):
    """List the kind of every layer, in the names of the library."""
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        kind = "full_attention" if window is None else "sliding_attention"
        if getattr(config, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        types = [kind] * config.num_hidden_layers
    return list(types)


def other_layers(types):
    """Return the set of layers that do not attend to everything before them."""
    return {i for i, kind in enumerate(types) if kind != "full_attention"}


def full_layers(config):
    """Return the set of layers that attend in full, counted from 0.

    Raises:
        TypeError: if one is no int.
        ValueError: if there is no such layer.

    Example:
        >>> from types import SimpleNamespace
        >>> sorted(full_layers(SimpleNamespace(num_hidden_layers=8)))
        [5, 6, 7]
    """
    n, listed = config.num_hidden_layers, settings_of(config)["full_layers"]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        raise TypeError(f"full_layers must be a list of ints, got {listed!r}")
    if wrong := [i for i in listed if not -n <= i < n]:
        raise ValueError(
            f"full_layers must be from {-n} to {n - 1}, the layers of this model, "
            f"got {wrong}"
        )
    return {i % n for i in listed}

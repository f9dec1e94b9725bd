"""Write a small model in the format of Hugging Face: `python -m moba_lab.export`.

Without a convolution on the keys our model is, weight for weight, a Qwen3: RMSNorm
before attention and feed-forward and on every query and key, rotary embedding of the
two halves of a head, SwiGLU, a tied embedding. So `transformers` loads what this writes
with its own classes and without our code, and computes the same logits.
"""

import argparse
from pathlib import Path

import torch

from moba_lab.data import BOS
from moba_lab.model import load_checkpoint

# Our names -> the library's, within a layer.
LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.to_q.weight": "self_attn.q_proj.weight",
    "attention.to_k.weight": "self_attn.k_proj.weight",
    "attention.to_v.weight": "self_attn.v_proj.weight",
    "attention.to_out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
DTYPES = ("float32", "bfloat16", "float16")


def to_transformers(model):
    """Build the library's model with the weights of one of ours.

    Layers that attend by MoBA are noted in `config.moba`, as `moba_fast.hf.enable`
    keeps them; the model itself attends in full until that, or
    `attn_implementation="moba"`, switches it.

    Args:
        model: `moba_lab.model.Model`.

    Returns:
        `transformers.Qwen3ForCausalLM`, float32, in evaluation mode.

    Raises:
        ValueError: the model has something that no stock architecture has.
    """
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    check_stock(model.config)
    made = Qwen3ForCausalLM(Qwen3Config(**config_of(model)))
    weights = library_weights(model.state_dict())
    missing, unexpected = made.load_state_dict(weights, strict=False)
    # The output layer is the embedding, so the file need not hold it.
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"expected our weights to fit, got {missing}, {unexpected}")
    ids = {f"{name}_token_id": BOS for name in ("bos", "eos", "pad")}
    made.generation_config = GenerationConfig(**ids)
    return made.eval()


def check_stock(config):
    """Raise ValueError where a `Config` has what the library's model has not."""
    if config.key_conv != 1:
        raise ValueError(
            f"expected a model without a convolution on its keys, got "
            f"key_conv={config.key_conv}, which no architecture of transformers has; "
            "train one with `python -m moba_lab.train --key-conv 1`"
        )
    if config.rope_dims < config.head_dim:
        raise ValueError(
            f"expected all {config.head_dim} dimensions of a head to carry the "
            f"position, as in Qwen3, got rope_dims={config.rope_dims}; train a model "
            f"with --rope-dims {config.head_dim}"
        )


def config_of(model):
    """Return the arguments of `Qwen3Config` that describe one of our models."""
    ours, kinds = model.config, model.attention
    arguments = {
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.width,
        "intermediate_size": ours.hidden,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": ours.heads,
        "num_key_value_heads": ours.kv_heads,
        "head_dim": ours.head_dim,
        "max_position_embeddings": ours.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": ours.rope_base},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        **{f"{name}_token_id": BOS for name in ("bos", "eos", "pad")},
    }
    if "moba" in kinds:
        arguments["moba"] = {
            "block_size": ours.block_size,
            "topk": ours.topk,
            "full_layers": [i for i, kind in enumerate(kinds) if kind == "full"],
            "decode": "full",
        }
    return arguments


def library_weights(weights):
    """Rename the tensors of our `state_dict` as the library's model has them.

    >>> list(library_weights({"layers.2.mlp.up.weight": 0, "norm.weight": 0}))
    ['model.layers.2.mlp.up_proj.weight', 'model.norm.weight']
    """
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            # Of no rows where there is no convolution.
            if rest != "attention.key_conv":
                renamed[f"model.layers.{index}.{LAYER[rest]}"] = tensor
        elif name == "embedding.weight":
            renamed["model.embed_tokens.weight"] = tensor
        else:
            renamed[f"model.{name}"] = tensor
    return renamed


def byte_tokenizer(context):
    """Make the library's tokenizer for our vocabulary: a token is a byte.

    Byte 0, which no text file holds, opens every text and ends what is generated, as it
    stands between the files in training. As a token it is that byte itself, so a text
    that does hold it is read as our model would read it.

    Args:
        context: tokens that the model was trained on.

    Returns:
        `transformers.PreTrainedTokenizerFast`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    opening = chr(BOS)
    vocabulary = {sign: byte for byte, sign in byte_signs().items()}
    vocabulary |= {opening: BOS}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(opening, special=True, normalized=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{opening} $A",
        pair=f"{opening} $A {opening} $B",
        special_tokens=[(opening, BOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=opening,
        eos_token=opening,
        pad_token=opening,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def byte_signs():
    """Return the sign by which the library writes each byte, for all but `BOS`.

    Bytes that can be printed stand for themselves, the others for the signs from 256
    on, in their order.

    >>> signs = byte_signs()
    >>> signs[ord("A")], signs[ord(" ")], len(signs)
    ('A', 'Ġ', 255)
    """
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printed]
    signs = {byte: chr(byte) for byte in printed}
    signs |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {byte: sign for byte, sign in signs.items() if byte != BOS}


def export(checkpoint, folder, dtype="float32"):
    """Write a model and its tokenizer for `from_pretrained`.

    Args:
        checkpoint: a file written by `python -m moba_lab.train --export`.
        folder: where the library's files go.
        dtype: of the weights; the small model's own files are bfloat16, and float32
            holds them exactly and computes as our model does.

    Returns:
        `transformers.Qwen3ForCausalLM`, what was written.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the model has something that no stock architecture has.
    """
    model = load_checkpoint(checkpoint)
    made = to_transformers(model).to(getattr(torch, dtype))
    made.save_pretrained(folder)
    byte_tokenizer(model.config.context).save_pretrained(folder)
    return made


def main(argv=None):
    """Export as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m moba_lab.export",
        description="Write a small model in the format of Hugging Face transformers.",
    )
    parser.add_argument("checkpoint", type=Path, help="file of moba_lab.train --export")
    parser.add_argument("folder", type=Path, help="folder for from_pretrained")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    args = parser.parse_args(argv)
    try:
        made = export(args.checkpoint, args.folder, args.dtype)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.folder}: {type(made).__name__}, {made.num_parameters()} parameters")


if __name__ == "__main__":
    main()

"""Load, lengthen, switch and save the model that is trained on."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moba_fast.hf
from moba_fast.peers import first_line

# Matrices of a layer that adapters go to, as Llama, Qwen, Mistral and Gemma name them.
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def find(name, out):
    """Return a name that `from_pretrained` takes.

    Args:
        name: a folder, a hub name, or a checkpoint of `moba_lab.train --export`, which
            is written in the library's format first.
        out: Path of the run's folder.

    Raises:
        ValueError: a checkpoint is not there or has no such format.
    """
    if not str(name).endswith(".safetensors"):
        return str(name)
    from moba_lab.export import export

    folder = out / f"start-{short_name(name)}"
    if not folder.exists():
        part = fresh(folder.with_name(folder.name + ".part"))
        try:
            export(name, part)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        os.replace(part, folder)
    return str(folder)


def short_name(*words):
    """Return a short name for words, the same on every run.

    >>> short_name("a", None)
    '3f5fb7f1'
    """
    return hashlib.sha256(repr(words).encode()).hexdigest()[:8]


def tried(kind, name, what, **more):
    """Load something by name, or raise ValueError with what was expected."""
    try:
        return kind.from_pretrained(name, **more)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"expected {what} at {name}; got: {first_line(error)}"
        ) from error


def load_config(name):
    """Return the configuration of a model and that of its text model, often the same.

    Raises:
        ValueError: there is no such model.
    """
    config = tried(AutoConfig, name, "a language model")
    return config, config.get_text_config(decoder=True)


def load_tokenizer(name):
    """Return the tokenizer of a model.

    Raises:
        ValueError: there is none.
    """
    return tried(AutoTokenizer, name, "a tokenizer")


def load(name, longest=None, lora=None, dtype=torch.float32, seed=0):
    """Load a model to train.

    Args:
        name: that `from_pretrained` takes.
        longest: tokens that it is to read; where its positions end before, they are
            interpolated.
        lora: rank of the adapters that alone are trained; None trains everything.
        dtype: of the weights.
        seed: of the adapters.

    Returns:
        the model, within PEFT's where there are adapters.

    Raises:
        ValueError: there is no such model, or its positions cannot be interpolated.
    """
    config, text = load_config(name)
    if longest:
        interpolate(text, longest)
    model = tried(
        AutoModelForCausalLM, name, "a language model", config=config, dtype=dtype
    )
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        adapters = LoraConfig(
            r=lora,
            lora_alpha=2 * lora,
            target_modules=adapted_names(model),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, adapters)
    return model


def adapted_names(model):
    """Return the names of the matrices that adapters go to; "all-linear" else."""
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in ADAPTED if name in there] or "all-linear"


def interpolate(config, longest):
    """Squeeze the positions of a longer text into those that a model knows.

    Paper: section 3.3, by position interpolation (Chen et al., arXiv 2306.15595): every
    position is divided by how many times longer texts become.

    Args:
        config: of the text model, changed in place.
        longest: tokens of the longest text.

    Raises:
        ValueError: the model scales its positions in another way already.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(
    ...     max_position_embeddings=64, rope_parameters={"rope_theta": 1e4})
    >>> interpolate(config, 256)
    >>> config.rope_parameters["factor"], config.max_position_embeddings
    (4.0, 256)
    """
    positions = config.max_position_embeddings
    if longest <= positions:
        return
    rope = config.rope_parameters
    # Some models keep one for every kind of layer; windows need not see further.
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ValueError(
            f"expected rotary positions that are not scaled, or linearly, got "
            f"{kind!r}, which does not combine with position interpolation; stay "
            f"within the model's {positions} tokens: --longest {positions}"
        )
    factor = rope.get("factor", 1.0) * longest / positions
    rope.update(rope_type="linear", factor=factor)
    config.max_position_embeddings = longest


def switch(model, settings):
    """Let a model attend by MoBA with these settings, or in full where there are none.

    Args:
        model: of the library, or within PEFT's.
        settings: arguments of `moba_fast.hf.enable`, or None.
    """
    if settings is None:
        moba_fast.hf.disable(model)
    else:
        moba_fast.hf.enable(model, **settings)


@contextmanager
def evaluating(model, now, settings):
    """Let a model attend otherwise for a while, in evaluation mode.

    Args:
        model: of the library, or within PEFT's.
        now: settings for `switch`, or None.
        settings: those to go back to.
    """
    training = model.training
    model.eval()
    switch(model, now)
    try:
        yield
    finally:
        switch(model, settings)
        model.train(training)


def save(model, tokenizer, folder):
    """Write a model for `from_pretrained`, whole or not at all; adapters are merged.

    The attention that it has now is written into its configuration, which the library
    does not do: a folder saved with MoBA is loaded with MoBA once `moba_fast.hf` is
    imported, and refused without it, instead of being run in full unseen. Old versions
    of the library, 5.0 among them, do not read it; there `attn_implementation="moba"`
    has to be said.

    Args:
        model: of the library, or within PEFT's, whose adapters it loses.
        tokenizer: that goes along.
        folder: Path, replaced where it is there.
    """
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    part = fresh(folder.with_name(folder.name + ".part"))
    model.save_pretrained(part)
    tokenizer.model_max_length = model.config.get_text_config(
        decoder=True
    ).max_position_embeddings
    tokenizer.save_pretrained(part)
    path = part / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if hasattr(model.config, "moba"):
        written["attn_implementation"] = "moba"
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def fresh(folder):
    """Return a folder without what an interrupted run left in it."""
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder

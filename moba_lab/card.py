"""Measure a trained model; write it for inference, with a card that says all of it."""

import json
import lzma
import math
import os
import platform
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from moba_fast.machine import describe_machine
from moba_lab.data import BOS
from moba_lab.model import config_json, load_checkpoint
from moba_lab.probe import definition_recall

COMPRESSORS = {
    "zlib level 9": lambda data: zlib.compress(data, 9),
    "lzma preset 9": lambda data: lzma.compress(data, preset=9),
}


@torch.no_grad()
def byte_losses(model, text, pack=8):
    """Compute how many bits each byte of a text costs, given the bytes before it.

    The text is read in windows of the model's context that overlap by half, so that
    every byte but the first few has at least half a context before it. The first byte
    is predicted from `BOS`.

    Args:
        model: `moba_lab.model.Model`.
        text: (n,) uint8.
        pack: windows that go through the model at once.

    Returns:
        (n,) float32, bits.
    """
    tokens = np.concatenate([[BOS], text]).astype(np.int64)
    context, stride, n = model.config.context, model.config.context // 2, len(text)
    stop = max(n + stride, context + 1)
    ends = [min(end, n) for end in range(context, stop, stride)]
    bits, done = np.zeros(n, np.float32), 0
    for first in range(0, len(ends), pack):
        spans = [(max(0, end - context), end) for end in ends[first : first + pack]]
        lengths = [end - start for start, end in spans]
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        inputs = np.concatenate([tokens[start:end] for start, end in spans])
        targets = np.concatenate([tokens[start + 1 : end + 1] for start, end in spans])
        losses = model.losses(*map(torch.from_numpy, (inputs, targets)), cu_seqlens)
        for (_, end), part in zip(spans, losses.split(lengths), strict=True):
            if end > done:
                bits[done:end] = part[done - end :].numpy() / math.log(2)
                done = end
    return bits


def compressed_bits(texts):
    """Compress texts with the standard library, as a yardstick for a model.

    Args:
        texts: path -> (n,) uint8.

    Returns:
        name of the compressor -> {"per file": bits per byte with every file compressed
        on its own, "concatenated": bits per byte of all files in a row}.
    """
    size = sum(map(len, texts.values()))
    joined = b"".join(text.tobytes() for text in texts.values())
    bits = {}
    for name, compress in COMPRESSORS.items():
        alone = sum(len(compress(text.tobytes())) for text in texts.values())
        together = len(compress(joined))
        bits[name] = {
            "per file": round(8 * alone / size, 4),
            "concatenated": round(8 * together / size, 4),
        }
    return bits


def measure(model, held_out):
    """Measure a model on held-out files.

    Args:
        model: `moba_lab.model.Model`.
        held_out: path -> (n,) uint8.

    Returns:
        dict for the card: bits per byte of the model and of compressors, and how often
        its heads chose the block of a called name's definition.
    """
    bits = {
        path: float(byte_losses(model, text).sum()) for path, text in held_out.items()
    }
    size = sum(map(len, held_out.values()))
    return {
        "held-out bytes": size,
        "bits per byte": {
            "model, per file": round(sum(bits.values()) / size, 4),
            **compressed_bits(held_out),
        },
        "bits per byte of each file": {
            path: round(bits[path] / len(held_out[path]), 3) for path in held_out
        },
        "definition recall": recall_card(model, held_out),
    }


def recall_card(model, held_out):
    """Return `probe.definition_recall` as a dict, None where the files hold no call."""
    kinds = model.attention
    model.set_attention("moba")
    try:
        recall = definition_recall(model, list(held_out.values()))
    except ValueError:
        return None
    finally:
        model.set_attention(kinds)
    fields = asdict(recall)
    return {
        name: np.round(value, 3).tolist() if name in ("hit", "control") else value
        for name, value in fields.items()
    }


def export(trainer, command, corpus, path):
    """Write a trained model in bfloat16 with its card and its curve beside it.

    The card's numbers are those of the written file, read again.

    Args:
        trainer: `moba_lab.trainer.Trainer` at the end of its run.
        command: that made it.
        corpus: `moba_lab.data.Corpus` it was trained on.
        path: of the model, `NAME.safetensors`; the card is `NAME.json`, the curve
            `NAME.csv`.
    """
    path = Path(path)
    weights = trainer.model.state_dict()
    weights = {name: weight.bfloat16().cpu() for name, weight in weights.items()}
    metadata = {"config": config_json(trainer.model.config)}
    write_atomically(path, safetensors.torch.save(weights, metadata))
    write_atomically(path.with_suffix(".csv"), trainer.curve().encode())
    card = describe(trainer, command, corpus) | measure(
        load_checkpoint(path), corpus.held_out
    )
    text = json.dumps(card, indent=1) + "\n"
    write_atomically(path.with_suffix(".json"), text.encode())
    return card


def describe(trainer, command, corpus):
    """Return what the card says of the run: settings, time, machine, versions."""
    args = trainer.settings
    text_bytes = sum(s.steps * s.batch * s.context for s in trainer.stages)
    return {
        "command": command,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "config": asdict(trainer.model.config),
        "stages": [asdict(stage) for stage in trainer.stages],
        "optimiser": {
            "name": "AdamW",
            "betas": [0.9, 0.95],
            "learning rate": args.lr,
            "schedule": f"{args.warmup} steps up, then cosine to a twentieth",
            "weight decay": args.weight_decay,
            "clip": args.clip,
        },
        "seed": args.seed,
        "renamed windows": trainer.record["rename"],
        "corpus": {
            "training files": sum(f.split == "train" for f in corpus.files),
            "training bytes": len(corpus.train),
            "held-out files": len(corpus.held_out),
        },
        "training": {
            "bytes read": text_bytes,
            "seconds": round(trainer.seconds),
            "bytes per second": round(text_bytes / trainer.seconds),
        },
        "hardware": hardware_of(trainer),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "platform": sys.platform,
        },
    }


def hardware_of(trainer):
    """Name what a model was trained on."""
    machine = describe_machine(trainer.place.device)
    return {
        "device": machine["device"],
        "processor": machine["cpu"],
        "threads": trainer.record["threads"],
    }


def write_atomically(path, data):
    """Write a file so that a reader sees all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

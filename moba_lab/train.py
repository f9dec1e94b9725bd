"""Train the small byte-level model: `python -m moba_lab.train --help`.

Without arguments this trains the model that the package ships, on Python's own standard
library. A run is a row of stages, each with its own attention, context and batch; the
parameters are the same for MoBA and full attention, so any stage may follow any other.

Where other programs share the processor, put `OMP_WAIT_POLICY=passive` before the
command: threads that spin while they wait for each other slow one another down.
"""

import argparse
import csv
import io
import json
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open
from tqdm import tqdm

from moba_lab.card import export, measure, write_atomically
from moba_lab.data import BatchSampler, load_corpus, verify_corpus
from moba_lab.model import Config, Model

# Heads that copy form in a few thousand small steps of full attention on short text;
# the last stage gets the model used to reading few blocks.
STAGES = ("full:512:2:5600", "moba:1024:2:1400")
LAST = "last.safetensors"
CURVE = "curve.csv"
# What a resumed run takes from its own command, not from the checkpoint.
NOT_RESTORED = ("resume", "out", "export")


@dataclass(frozen=True)
class Stage:
    """A part of a run: `steps` batches of `batch` sequences of `context` bytes.

    attention: "moba" or "full", or one of them for every layer.
    """

    attention: str | tuple[str, ...]
    context: int
    batch: int
    steps: int


class Trainer:
    """A model, its optimiser, its text and its place in the run.

    Everything that decides the next step is in `save`'s file, so that a run continued
    from it is bit for bit the run that was never stopped.
    """

    def __init__(self, args, stream):
        self.args, self.stream = args, stream
        self.stages = [parse_stage(text) for text in args.stage]
        self.total = sum(stage.steps for stage in self.stages)
        torch.manual_seed(args.seed)
        self.model = Model(config_of(args, self.stages[-1]))
        self.optimizer = make_optimizer(self.model, args)
        self.step, self.losses, self.seconds = 0, [], 0.0
        self.enter_stage(0)

    def enter_stage(self, index):
        """Switch the attention and cut the text for a stage."""
        self.stage_index, stage = index, self.stages[index]
        self.model.set_attention(stage.attention)
        self.sampler = BatchSampler(
            self.stream,
            stage.batch,
            stage.context,
            self.args.seed + index,
            self.args.rename,
        )
        self.cu_seqlens = (
            torch.arange(stage.batch + 1, dtype=torch.int32) * stage.context
        )

    def train_step(self):
        """Take one step and return its loss in nats.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        while self.step >= sum(s.steps for s in self.stages[: self.stage_index + 1]):
            self.enter_stage(self.stage_index + 1)
        rate = learning_rate(self.step, self.total, self.args.lr, self.args.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens, targets = map(torch.from_numpy, self.sampler.next_batch())
        loss = self.model.losses(tokens, targets, self.cu_seqlens).mean()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"expected a finite loss, got {loss.item()} at step {self.step} with "
                f"learning rate {rate:.2g}; lower --lr or lengthen --warmup, then "
                "start again or --resume from the last checkpoint"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.step += 1
        return loss.item()

    def save(self, folder):
        """Write the checkpoint and the loss curve, each whole or not at all."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in slot.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        state = {
            "args": {k: v for k, v in vars(self.args).items() if k not in NOT_RESTORED},
            "step": self.step,
            "stage": self.stage_index,
            "sampler": self.sampler.state_dict(),
            "seconds": self.seconds,
        }
        data = safetensors.torch.save(tensors, {"state": json.dumps(state)})
        write_atomically(folder / LAST, data)
        write_atomically(folder / CURVE, self.curve().encode())

    def load(self, folder):
        """Continue from what `save` wrote."""
        tensors, state = read_checkpoint(folder)
        self.enter_stage(state["stage"])
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses = tensors.pop("losses").tolist()
        model, slots = {}, {}
        for name, tensor in tensors.items():
            if name.startswith("model."):
                model[name.removeprefix("model.")] = tensor
            else:
                _, index, key = name.split(".")
                slots.setdefault(int(index), {})[key] = tensor
        self.model.load_state_dict(model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})

    @property
    def command(self):
        """The command that makes this run from its start."""
        return command_of(self.args)

    def curve(self):
        """Return the loss curve as CSV, one row per `--log-every` steps."""
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["step", "bytes", "attention", "context", "bits_per_byte"])
        done = seen = 0
        for stage in self.stages:
            kinds = stage.attention
            kinds = kinds if isinstance(kinds, str) else " ".join(kinds)
            losses = self.losses[done : done + stage.steps]
            for first in range(0, len(losses), self.args.log_every):
                part = losses[first : first + self.args.log_every]
                seen += len(part) * stage.batch * stage.context
                bits = f"{np.mean(part) / math.log(2):.4f}"
                step = done + first + len(part)
                rows.writerow([step, seen, kinds, stage.context, bits])
            done += stage.steps
        return out.getvalue()


def parse_stage(text):
    """Read a stage from the command line.

    Raises:
        ValueError: the text has not the four parts ATTENTION:CONTEXT:BATCH:STEPS.

    >>> parse_stage("full:256:4:1000")
    Stage(attention='full', context=256, batch=4, steps=1000)
    >>> parse_stage("moba,full:1024:2:10").attention
    ('moba', 'full')
    """
    parts = text.split(":")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts[1:]):
        raise ValueError(
            "expected a stage as ATTENTION:CONTEXT:BATCH:STEPS, such as "
            f"moba:1024:2:1000, got {text!r}"
        )
    kinds = tuple(parts[0].split(","))
    return Stage(kinds[0] if len(kinds) == 1 else kinds, *map(int, parts[1:]))


def config_of(args, stage):
    """Return the `Config` of the model that the last stage leaves behind."""
    kinds = stage.attention
    return Config(
        width=args.width,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        hidden=args.hidden,
        context=stage.context,
        block_size=args.block_size,
        topk=args.topk,
        key_conv=args.key_conv,
        rope_dims=args.rope_dims,
        rope_base=args.rope_base,
        attention=(kinds,) * args.layers if isinstance(kinds, str) else kinds,
    )


def make_optimizer(model, args):
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, total, peak, warmup):
    """Rise linearly over `warmup` steps, then fall as a cosine to a twentieth.

    >>> [round(learning_rate(step, 100, 1.0, 10), 3) for step in (0, 9, 55, 99)]
    [0.1, 1.0, 0.525, 0.05]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def read_checkpoint(folder):
    """Return the tensors and the state that `Trainer.save` wrote.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
    """
    path = folder / LAST
    if not path.exists():
        raise FileNotFoundError(
            f"expected a checkpoint at {path} to resume from, found none; start "
            "without --resume, or name the run's folder with --out"
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["state"])


def make_parser():
    """Return the command line's parser; its defaults are the shipped model's."""
    parser = argparse.ArgumentParser(
        prog="python -m moba_lab.train",
        description="Train the small byte-level language model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", help="folder of text files; without it, Python's standard library")
    add("--out", type=Path, default=Path("build/train"), help="checkpoint and curve")
    add("--resume", action="store_true", help="go on from OUT, with its settings")
    add("--export", type=Path, help="write the model for inference here, with its card")
    add(
        "--stage",
        nargs="+",
        default=list(STAGES),
        metavar="ATTENTION:CONTEXT:BATCH:STEPS",
        help='ATTENTION is "moba" or "full", or one of them per layer, with commas',
    )
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=2, help="query heads")
    add("--kv-heads", type=int, default=1, help="key/value heads")
    add("--head-dim", type=int, default=64)
    add("--hidden", type=int, default=384, help="width inside the feed-forward")
    add("--key-conv", type=int, default=3, help="width of the keys' convolution")
    add("--rope-dims", type=int, default=64, help="rotated dimensions of a head")
    add("--rope-base", type=float, default=10_000.0)
    add("--block-size", type=int, default=32, help="bytes per block")
    add("--topk", type=int, default=4, help="blocks per query, its own included")
    add("--rename", type=float, default=0.5, help="share of windows with new names")
    add("--lr", type=float, default=4e-3, help="peak learning rate")
    add("--warmup", type=int, default=350, help="steps of rising learning rate")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--checkpoint-every", type=int, default=400, help="steps")
    add("--log-every", type=int, default=20, help="steps per row of the curve")
    return parser


def parse_args(argv=None):
    """Read the command line, with `--resume` the settings of the run to go on with."""
    args = make_parser().parse_args(argv)
    if args.resume:
        for name, value in read_checkpoint(args.out)[1]["args"].items():
            setattr(args, name, value)
    return args


def command_of(args):
    """Return the command that makes a run from the start.

    >>> command_of(parse_args(["--seed", "3", "--stage", "full:64:1:5"]))
    'python -m moba_lab.train --stage full:64:1:5 --seed 3'
    """
    parser, words = make_parser(), ["python", "-m", "moba_lab.train"]
    for name, value in vars(args).items():
        if name not in ("resume", "out") and value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    return shlex.join(words)


def train(args, stream):
    """Train to the last step, with a checkpoint now and then; return the `Trainer`."""
    torch.set_num_threads(args.threads)
    trainer = Trainer(args, stream)
    if args.resume:
        trainer.load(args.out)
    before, start = trainer.seconds, time.monotonic()
    with tqdm(total=trainer.total, initial=trainer.step, unit="step") as bar:
        while trainer.step < trainer.total:
            loss = trainer.train_step()
            trainer.seconds = before + time.monotonic() - start
            bar.update()
            bar.set_postfix_str(f"{loss / math.log(2):.3f} bits per byte")
            if trainer.step % args.checkpoint_every == 0:
                trainer.save(args.out)
    trainer.save(args.out)
    return trainer


def main(argv=None):
    """Train, measure on the held-out files, and export where asked."""
    args = parse_args(argv)
    torch.use_deterministic_algorithms(True)
    corpus = load_corpus(args.data)
    if args.data is None:
        verify_corpus(corpus)
    trainer = train(args, corpus.train)
    if args.export:
        card = export(trainer, corpus, args.export)
    else:
        card = measure(trainer.model.eval(), corpus.held_out)
    print(json.dumps(card["bits per byte"], indent=1))


if __name__ == "__main__":
    main()

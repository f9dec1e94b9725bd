"""Read the command line of `python -m moba_lab.train`, and write it again."""

import argparse
import shlex
from pathlib import Path

from moba_lab.model import Config
from moba_lab.settings import Settings, Stage
from moba_lab.trainer import read_checkpoint

# Heads that copy form in a few thousand small steps of full attention on short text;
# the last stage gets the model used to reading few blocks.
STAGES = ("full:512:2:5600", "moba:1024:2:1400")
# What a resumed run takes from its own command, not from the checkpoint.
NOT_RESTORED = ("resume", "out", "export", "device", "compile", "tensorboard")
# What does not change the model that a command makes.
NOT_TOLD = ("resume", "out", "tensorboard")


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


def settings_of(args):
    """Return the `Settings` of a command; the last stage decides the model's kinds."""
    stages = tuple(parse_stage(text) for text in args.stage)
    kinds = stages[-1].attention
    config = Config(
        width=args.width,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        hidden=args.hidden,
        context=stages[-1].context,
        block_size=args.block_size,
        topk=args.topk,
        key_conv=args.key_conv,
        rope_dims=args.rope_dims,
        rope_base=args.rope_base,
        attention=(kinds,) * args.layers if isinstance(kinds, str) else kinds,
    )
    names = ("seed", "lr", "warmup", "weight_decay", "clip", "accumulate", "log_every")
    return Settings(config, stages, **{name: getattr(args, name) for name in names})


def make_parser():
    """Return the command line's parser; its defaults are the shipped model's."""
    parser = argparse.ArgumentParser(
        prog="python -m moba_lab.train",
        description="Train the small byte-level language model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", help="folder of text files; without it, Python's standard library")
    add("--dataset", help="Hugging Face dataset instead, or json:PATH and the like")
    add("--dataset-config", help="name of the dataset's configuration")
    add("--dataset-column", default="text", help="column that holds the texts")
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
    add_model(parser)
    add("--rename", type=float, default=0.5, help="share of windows with new names")
    add("--lr", type=float, default=4e-3, help="peak learning rate")
    add("--warmup", type=int, default=350, help="steps of rising learning rate")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--accumulate", type=int, default=1, help="parts of a batch, to save memory")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--device", default="auto", help='"cpu", "cuda", or "auto"')
    add("--precision", default="auto", help='"fp32", "bf16", or "auto": bf16 on a GPU')
    add("--compile", action="store_true", help="build the model with torch.compile")
    add("--checkpoint-every", type=int, default=400, help="steps")
    add("--log-every", type=int, default=20, help="steps per row of the curve")
    add("--tensorboard", action="store_true", help="write OUT/tensorboard, too")
    return parser


def add_model(parser):
    """Add the options that say how large the model is and what its gate does."""
    add = parser.add_argument
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


def parse_args(argv=None):
    """Read the command line, with `--resume` the settings of the run to go on with."""
    args = make_parser().parse_args(argv)
    if args.resume:
        for name, value in read_checkpoint(args.out)[1]["args"].items():
            setattr(args, name, value)
    return args


def record_of(args):
    """Return what a checkpoint keeps of a command, so that `--resume` needs no more."""
    return {k: v for k, v in vars(args).items() if k not in NOT_RESTORED}


def command_of(args):
    """Return the command that makes a run from the start.

    >>> command_of(parse_args(["--seed", "3", "--stage", "full:64:1:5"]))
    'python -m moba_lab.train --stage full:64:1:5 --seed 3'
    """
    parser, words = make_parser(), ["python", "-m", "moba_lab.train"]
    for name, value in vars(args).items():
        if name not in NOT_TOLD and value != parser.get_default(name):
            words.append("--" + name.replace("_", "-"))
            values = value if isinstance(value, list) else [value]
            words += [] if value is True else map(str, values)
    return shlex.join(words)

"""Read the command line of `python -m moba_lab.convert`."""

import argparse
import shlex
from pathlib import Path

from moba_lab.convert.recipes import RECIPES
from moba_lab.evaluate.options import layers, some
from moba_lab.options import parse_stage

# What does not change the run that a command makes.
NOT_TOLD = ("out", "record", "command")


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m moba_lab.convert",
        description="Switch a dense model of transformers to MoBA and train it on. "
        "The same command again goes on where it was stopped.",
        epilog="Exit status: 0 finished, 2 the command was wrong, 130 it was "
        "interrupted and can be given again.",
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="a folder of save_pretrained, a hub name, or a .safetensors file of "
        "moba_lab.train --export",
    )
    add(
        "--out",
        type=Path,
        default=Path("build/convert"),
        help="all files of the run (default: %(default)s)",
    )
    add(
        "--recipe",
        choices=RECIPES,
        default="paper",
        help="stages, see the README (default: %(default)s)",
    )
    add(
        "--stage",
        nargs="+",
        type=read_stage,
        metavar="KIND:CONTEXT:BATCH:STEPS",
        help="instead of a recipe; KIND is full, moba, or tune",
    )
    add("--control", action="store_true", help="train the same in full, to compare")
    add("--record", help="also keep the rows as moba_lab/results/convert_NAME.csv")
    add_data(parser)
    add_sizes(parser)
    add_training(parser)
    return parser


def add_data(parser):
    """Add the options that say what is read."""
    add = parser.add_argument
    add("--data", help="folder of text files; without it, Python's standard library")
    add("--dataset", help="Hugging Face dataset instead, or json:PATH and the like")
    add("--dataset-config", help="name of the dataset's configuration")
    add(
        "--dataset-column",
        default="text",
        help="column that holds the texts (default: %(default)s)",
    )
    add(
        "--tune",
        metavar="DATASET",
        help="dataset or json:PATH with columns prompt and completion, or messages, "
        "to fine-tune on; only answers count in the loss",
    )


def add_sizes(parser):
    """Add the options that scale a recipe, and those of MoBA."""
    add = parser.add_argument
    add("--context", type=some, help="tokens the model was trained on, if not as told")
    add("--longest", type=some, help="longest context of recipe paper; 8 times that")
    add("--tokens", type=some, help="of all stages; 2 for every parameter")
    add("--tokens-per-step", type=some, help="4 contexts, or one longest")
    add("--block-size", type=some, help="tokens per block; as in the paper's settings")
    add("--topk", type=some, help="blocks per query, its own included")
    add(
        "--full-layers",
        type=layers,
        help="layers that stay full, as in --full-layers=-2,-1; the last three",
    )


def add_training(parser):
    """Add the options of the optimiser, and of what is looked at on the way."""
    add = parser.add_argument
    add("--lora", type=some, metavar="RANK", help="train adapters of this rank only")
    add("--lr", type=float, help="peak learning rate; scaled with the model's size")
    known = "(default: %(default)s)"
    add("--seed", type=int, default=0, help=known)
    add("--micro-batch", type=some, default=1, help=f"sequences at once {known}")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--save-every", type=some, default=50, help=f"steps {known}")
    add(
        "--check-every",
        type=some,
        default=25,
        help=f"steps between held-out losses {known}",
    )
    add("--windows", type=some, default=16, help=f"held-out texts of those {known}")
    add(
        "--stop-gap",
        type=float,
        help="end a stage of MoBA when the loss of the last sixteenth of a text is at "
        "most so many nats above that of full attention, at two checks in a row",
    )
    add("--threads", type=some, help="of the CPU")
    add("--device", default="auto", help=f'"cpu", "cuda", or "auto" {known}')
    add(
        "--precision",
        default="auto",
        help=f'"fp32", "bf16", or "auto": bf16 on a GPU {known}',
    )
    add("--quiet", action="store_true", help="show no progress")


def read_stage(text):
    """Read a stage, with errors as a command line shows them."""
    try:
        return parse_stage(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_args(argv=None):
    """Read a command line; `command` of the result is what it was."""
    args = make_parser().parse_args(argv)
    parser = make_parser()
    words = ["python", "-m", "moba_lab.convert"]
    for name, value in vars(args).items():
        if name in NOT_TOLD or value == parser.get_default(name):
            continue
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else told(name, value)
    args.command = shlex.join(words)
    return args


def told(name, value):
    """Return the words of an option's value."""
    if name == "stage":
        return [f"{s.attention}:{s.context}:{s.batch}:{s.steps}" for s in value]
    if name == "full_layers":
        return [",".join(map(str, value))]
    return [str(value)]

"""Train the small byte-level model: `python -m moba_lab.train --help`.

Without arguments this trains the model that the package ships, on Python's own standard
library. A run is a row of stages, each with its own attention, context and batch; the
parameters are the same for MoBA and full attention, so any stage may follow any other.
Ctrl-C saves and stops; `--resume` goes on.

Where other programs share the processor, put `OMP_WAIT_POLICY=passive` before the
command: threads that spin while they wait for each other slow one another down.
"""

import json
import sys

import torch

from moba_lab import loop
from moba_lab.card import export, measure
from moba_lab.data import BatchSampler, load_corpus, verify_corpus
from moba_lab.hub import load_dataset_corpus
from moba_lab.options import command_of, parse_args, record_of, settings_of
from moba_lab.place import choose_place
from moba_lab.trainer import Trainer

# What a shell expects of a program that Ctrl-C ended.
STOPPED = 130


def make_trainer(args, stream):
    """Return the `Trainer` of a command, at its start or where it is resumed."""

    def data(index, stage):
        seed = args.seed + index
        return BatchSampler(stream, stage.batch, stage.context, seed, args.rename)

    place = choose_place(args.device, args.precision, args.compile)
    trainer = Trainer(settings_of(args), data, place, record_of(args))
    if args.resume:
        trainer.load(args.out)
    return trainer


def train(args, stream):
    """Train to the last step or to Ctrl-C; return the `Trainer`, which is saved."""
    torch.set_num_threads(args.threads)
    trainer = make_trainer(args, stream)
    log = None
    if args.tensorboard:
        log = loop.tensorboard(args.out / "tensorboard", trainer.step)
    loop.run(trainer, args.out, loop.Saving(steps=args.checkpoint_every), log)
    return trainer


def read_corpus(args):
    """Return the `Corpus` that a command names."""
    if args.dataset:
        return load_dataset_corpus(
            args.dataset, args.dataset_config, args.dataset_column
        )
    corpus = load_corpus(args.data)
    if args.data is None:
        verify_corpus(corpus)
    return corpus


def main(argv=None):
    """Train, measure on the held-out files, and export where asked."""
    args = parse_args(argv)
    # On a GPU the fastest kernels add up in any order.
    torch.use_deterministic_algorithms(
        choose_place(args.device, args.precision).device == "cpu"
    )
    corpus = read_corpus(args)
    trainer = train(args, corpus.train)
    if trainer.step < trainer.total:
        print(
            f"stopped after {trainer.step} of {trainer.total} steps and saved in "
            f"{args.out}; go on with python -m moba_lab.train --out {args.out} --resume"
        )
        sys.exit(STOPPED)
    if args.export:
        card = export(trainer, command_of(args), corpus, args.export)
    else:
        card = measure(trainer.model.eval().cpu(), corpus.held_out)
    print(json.dumps(card["bits per byte"], indent=1))


if __name__ == "__main__":
    main()

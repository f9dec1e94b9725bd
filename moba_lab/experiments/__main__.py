r"""Make experiments: `python -m moba_lab.experiments --help`.

Runs whose rows are in the results are skipped and stopped ones go on, so the same
command again finishes what is missing. Ctrl-C and the end of `--budget` save and stop.
Given several times at once, with the same OUT, it shares the runs: small models leave
most of a GPU idle, and CUDA_VISIBLE_DEVICES puts each process on a GPU of its own.
Seconds and tokens per second mean what they say only where a run had its GPU alone.
On a GPU, the full sizes, what matters most first, in calls of nine minutes:

    python -m moba_lab.experiments scaling trailing hybrid granularity --size full \
        --out OUT --budget 540

Afterwards the same names with `--size full --out OUT --record h200` put the rows into
the package.
"""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from moba_lab import loop
from moba_lab.experiments import results
from moba_lab.experiments.contract import SIZES
from moba_lab.experiments.registry import choose, find
from moba_lab.experiments.runner import Options, csv_of, jobs_of, run_all
from moba_lab.place import choose_place

FAILED, UNFINISHED = 1, 3


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m moba_lab.experiments",
        description="Make the training experiments; see --list.",
        epilog="Exit status: 0 all runs are there, 1 one failed, 3 some are missing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help='experiments in order, or "all"')
    add("--size", choices=SIZES, default="small", help="small is for two CPU cores")
    add("--out", type=Path, default=Path("build/experiments"), help="results")
    add("--only", default="*", metavar="GLOB", help="runs to make, by name")
    add("--data", help="folder of text files; without it, Python's standard library")
    add("--device", default="auto", help='"cpu", "cuda", or "auto"')
    add("--precision", default="auto", help='"fp32", "bf16", or "auto": bf16 on a GPU')
    add("--compile", action="store_true", help="build models with torch.compile")
    add("--budget", type=float, metavar="SECONDS", help="save and stop after so long")
    add("--save-seconds", type=float, default=60.0, help="time between checkpoints")
    add("--steps", type=int, help="most steps of a stage, for a trial")
    add("--list", action="store_true", help="name experiments, or the NAMEs' runs")
    add("--record", metavar="AS", help="copy rows to moba_lab/results/train_NAME_AS")
    return parser


def options_of(args, start):
    """Return the `Options` of a command that began at `start`."""
    return Options(
        size=args.size,
        out=args.out,
        place=choose_place(args.device, args.precision, args.compile),
        data=args.data,
        only=args.only,
        steps=args.steps,
        save_seconds=args.save_seconds,
        deadline=start + args.budget if args.budget is not None else float("inf"),
    )


def show_list(names, options):
    """Print the experiments and their questions, or the runs of some of them."""
    if not names:
        for experiment in find().values():
            print(f"{experiment.name}: {experiment.question}")
        return
    for job in jobs_of(choose(names), options):
        state = "done" if job.finished else "missing"
        steps = job.run.settings.steps
        print(f"{job.experiment.name} {job.run.name}: {steps} steps, {state}")


def record(experiments, options, suffix):
    """Copy rows into the package, where notebooks read them."""
    for experiment in experiments:
        rows = results.read(csv_of(experiment, options))
        if rows:
            path = results.RECORDED / f"train_{experiment.name}_{suffix}.csv"
            results.write(path, rows)
            print(f"{len(rows)} rows in {path.name}")


def summary(states):
    """Print what became of the runs; return the exit status."""
    for (experiment, run), state in states.items():
        if state not in ("skipped", loop.FINISHED):
            tqdm.write(f"{experiment} {run}: {state}")
    done = sum(state in ("skipped", loop.FINISHED) for state in states.values())
    tqdm.write(f"{done} of {len(states)} runs are there")
    if any(state.startswith("failed") for state in states.values()):
        return FAILED
    return UNFINISHED if done < len(states) else 0


def main(argv=None):
    """Run the command line; return the exit status."""
    start, parser = time.monotonic(), make_parser()
    args = parser.parse_args(argv)
    try:
        options = options_of(args, start)
        experiments = choose(args.names) if args.names else []
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        show_list(args.names, options)
    elif not experiments:
        parser.error("expected the name of an experiment, or --list")
    elif args.record:
        record(experiments, options, args.record)
    else:
        return summary(run_all(experiments, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())

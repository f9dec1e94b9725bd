"""Switch a dense model to MoBA and train it on: `python -m moba_lab.convert --help`."""

import copy
import json
import os
import sys
from dataclasses import asdict

import torch
import transformers

from moba_fast.machine import describe_machine
from moba_lab.card import write_atomically
from moba_lab.convert import checks, recipes, texts
from moba_lab.convert import model as models
from moba_lab.convert.options import parse_args
from moba_lab.convert.stages import Job, run_stage
from moba_lab.experiments import results
from moba_lab.loop import Signals
from moba_lab.place import choose_place
from moba_lab.train import STOPPED, read_corpus

FIRST = ("run", "stage", "trained", "length", "step", "tokens")
# Options that may differ when a run is gone on with.
FREE = ("out", "record", "quiet", "threads", "save_every", "control", "command")
# Options that decide the tokens.
TEXTS = ("model", "data", "dataset", "dataset_config", "dataset_column")
OPTIONS = "settings.json"


def main(argv=None):
    """Run a command, and return its exit status."""
    args = parse_args(argv)
    # Bars of files that are read and written would hide that of the training.
    transformers.logging.disable_progress_bar()
    try:
        check_alone()
        jobs, start = prepare(args)
        for name, job in jobs:
            if not run_all(name, job, start):
                print(f"stopped and saved in {args.out}; go on with the same command")
                return STOPPED
    except (ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(jobs)
    return 0


def check_alone():
    """Raise ValueError where several processes are to share the work."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "expected one process, got a launcher's WORLD_SIZE of "
            f"{os.environ['WORLD_SIZE']}; start the command without it"
        )


def prepare(args):
    """Read model and texts, and return the runs to make and what they start from."""
    place = choose_place(args.device, args.precision)
    if args.threads:
        torch.set_num_threads(args.threads)
    # On a GPU the fastest kernels add up in any order.
    torch.use_deterministic_algorithms(place.device == "cpu", warn_only=True)
    start = models.find(args.model, args.out)
    _, config = models.load_config(start)
    tokenizer = models.load_tokenizer(start)
    stages, settings, rate = plan_of(args, start, config)
    options = options_of(args, stages, settings, rate)
    check_folder(args.out, options)
    corpus = read_corpus(args)
    tokens = texts.cached_tokens(
        args.out / f"tokens-{models.short_name(*map(vars(args).get, TEXTS))}.npy",
        tokenizer,
        lambda: texts.training_texts(corpus),
    )
    held_out = [text.tobytes() for text in corpus.held_out.values()]
    # What would end a run at its last stage is found before the first.
    longest = max(stage.context for stage in stages)
    texts.Windows(tokens, longest, args.seed)
    texts.held_out_windows(tokenizer, held_out, longest, 1)
    common = {
        "settings": settings,
        "tokens": tokens,
        "held_out": held_out,
        "tuning": texts.tuning_rows(args.tune) if args.tune else None,
        "tokenizer": tokenizer,
        "place": place,
        "rate": rate,
        "args": args,
    }
    jobs = [("moba", Job(args.out / "moba", stages, **common))]
    if args.control:
        dense = tuple(s if s.attention == "full" else in_full(s) for s in stages)
        jobs.append(("full", Job(args.out / "full", dense, **common)))
    # Only a command that can be run claims the folder.
    text = json.dumps(options, indent=1) + "\n"
    write_atomically(args.out / OPTIONS, text.encode())
    return jobs, start


def in_full(stage):
    """Return the stage of the control, which reads the same."""
    if stage.attention == "tune":
        raise ValueError(
            "expected stages without fine-tuning for --control, got one; compare "
            "fine-tuned models by two commands"
        )
    return recipes.Stage("full", stage.context, stage.batch, stage.steps)


def plan_of(args, start, config):
    """Return stages, settings of MoBA and learning rate, as asked or by the size."""
    with torch.device("meta"):
        whole, _ = models.load_config(start)
        empty = transformers.AutoModelForCausalLM.from_config(whole)
    size, own = empty.num_parameters(), args.context or config.max_position_embeddings
    stages = args.stage and tuple(args.stage)
    if not stages:
        longest = args.longest or recipes.LONGER * own
        plan = recipes.Plan(
            own,
            longest,
            args.tokens or 2 * size,
            args.tokens_per_step
            or max(4 * own, longest if args.recipe == "paper" else 0),
            tunes=args.tune is not None,
        )
        stages = recipes.stages_of(args.recipe, plan)
    recipes.check_stages(stages, args.tune is not None, args.micro_batch)
    block_size, topk = recipes.default_blocks(max(s.context for s in stages))
    layers = recipes.default_full_layers(config.num_hidden_layers)
    settings = {
        "block_size": args.block_size or block_size,
        "topk": args.topk or topk,
        "full_layers": layers if args.full_layers is None else args.full_layers,
        "decode": "full",
    }
    # On a model without weights a setting that does not fit is found at once.
    models.switch(empty, settings)
    models.interpolate(copy.deepcopy(config), max(s.context for s in stages))
    rate = args.lr or recipes.default_rate(size, args.lora)
    return stages, settings, rate


def options_of(args, stages, settings, rate):
    """Return what decides a run, as JSON."""
    options = {k: v for k, v in vars(args).items() if k not in FREE}
    options["stage"] = [asdict(stage) for stage in stages]
    options |= {"settings": settings, "rate": rate}
    return json.loads(json.dumps(options, default=str))


def check_folder(out, options):
    """Raise ValueError where a folder has another run."""
    path = out / OPTIONS
    if not path.exists():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    differ = sorted(k for k in options if found.get(k) != options[k])
    if differ:
        raise ValueError(
            f"expected the settings of the run in {out}, got others for "
            f"{', '.join(differ)}; name another folder by --out"
        )


def run_all(name, job, start):
    """Run all stages of a job, and say whether they were finished."""
    for index, stage in enumerate(job.stages):
        print(
            f"{name}, stage {index + 1} of {len(job.stages)}: {stage.attention}, "
            f"{stage.steps} steps of {stage.batch} x {stage.context} tokens"
        )
        with Signals() as signals:
            start = run_stage(job, index, start, signals)
        keep_rows(name, job)
        if start is None:
            return False
    return True


def keep_rows(name, job):
    """Write the checks of a run into the command's CSV, and into the recorded one."""
    rows = checks_of(job)
    made = {
        "model": job.args.model,
        **job.settings,
        "lora": job.args.lora,
        "lr": job.rate,
        "seed": job.args.seed,
        "data": job.args.dataset or job.args.data or "standard library",
        "precision": job.place.precision,
        **describe_machine(job.place.device),
        "transformers": transformers.__version__,
        "command": job.args.command,
    }
    rows = [{"run": name, **row, **made} for row in rows]
    if not rows:
        return
    paths = [job.args.out / "checks.csv"]
    if job.args.record:
        paths.append(results.RECORDED / f"convert_{job.args.record}.csv")
    for path in paths:
        results.add(path, rows, FIRST)


def checks_of(job):
    """Return the rows of all stages so far."""
    paths = (
        job.folder / f"stage-{i + 1}" / "checks.json" for i in range(len(job.stages))
    )
    return [
        row
        for path in paths
        if path.exists()
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def report(jobs):
    """Say what was reached, and where the models lie."""
    print(checks.summary(*(checks_of(job) for _, job in jobs)))
    for name, job in jobs:
        print(f"{name}: {job.model_of(len(job.stages) - 1)}")


if __name__ == "__main__":
    sys.exit(main())

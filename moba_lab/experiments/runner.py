"""Train the runs of experiments one after the other, and keep their rows."""

import hashlib
import json
import math
import shlex
import time
import traceback
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import safetensors.torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from moba_fast.machine import describe_machine
from moba_lab import loop
from moba_lab.card import write_atomically
from moba_lab.data import load_corpus
from moba_lab.experiments import results
from moba_lab.experiments.contract import Finished
from moba_lab.flops import matrix_parameters, training_flops
from moba_lab.model import config_json
from moba_lab.place import Place, peak_flops
from moba_lab.trainer import LAST, Trainer, settings_json

MODEL = "model.safetensors"
# Between two looks at whether another process has made a run.
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Options:
    """How runs are made, whatever the experiment.

    out: folder of results; rows are in OUT/SIZE/NAME.csv, the picture beside them, and
        OUT/SIZE/NAME/RUN holds what a run needs to go on.
    only: runs to make, a pattern with * and ?.
    steps: most steps of a stage, for a trial; None means all.
    save_seconds: time between checkpoints; a kill loses at most so much.
    deadline: value of `time.monotonic()` at which to save and stop.
    quiet: show no progress bar.
    """

    size: str = "small"
    out: Path = Path("build/experiments")
    place: Place = field(default_factory=Place)
    data: str | None = None
    only: str = "*"
    steps: int | None = None
    save_seconds: float = 60.0
    deadline: float = math.inf
    quiet: bool = False

    @cached_property
    def corpus(self):
        """The text, read when it is first asked for."""
        return read_once(self.data)

    @cached_property
    def peak(self):
        """FLOP/s of the place, and where the number is from."""
        return peak_flops(self.place)


@dataclass(frozen=True)
class Job:
    """A run of an experiment, and where its files are."""

    experiment: object
    run: object
    options: Options

    @property
    def key(self):
        """Names of the experiment and of the run."""
        return self.experiment.name, self.run.name

    @property
    def start(self):
        """Names of the experiment and of the run that this one starts from."""
        return self.experiment.name, self.run.start

    @property
    def csv(self):
        """File of the experiment's rows."""
        return csv_of(self.experiment, self.options)

    def folder(self, run=None):
        """Folder of a run's files."""
        return self.csv.with_suffix("") / (run or self.run.name)

    @property
    def identity(self):
        """JSON of all that decides what a run computes."""
        run, place = self.run, self.options.place
        return {
            "settings": settings_json(run.settings),
            "data": repr(run.data),
            "start": run.start,
            "corpus": self.options.data,
            "precision": place.precision,
        }

    @property
    def digest(self):
        """Short name of the identity, a column of the rows."""
        text = json.dumps(self.identity, sort_keys=True)
        return "x" + hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def finished(self):
        """Whether the rows of this very run are there."""
        rows = results.read(self.csv)
        return any(
            (row["run"], row["digest"]) == (self.run.name, self.digest) for row in rows
        )


@cache
def read_once(data):
    """Read a corpus, the same object whenever it is asked for again."""
    return load_corpus(data)


def csv_of(experiment, options):
    """Return the file of an experiment's rows."""
    return options.out / options.size / f"{experiment.name}.csv"


def jobs_of(experiments, options):
    """List the runs that are asked for, the most important ones first."""
    jobs = []
    for experiment in experiments:
        for run in experiment.runs(options.size):
            if fnmatch(run.name, options.only):
                run = replace(run, settings=capped(run.settings, options.steps))
                jobs.append(Job(experiment, run, options))
    return sorted(jobs, key=lambda job: job.run.priority)


def capped(settings, steps):
    """Return settings whose stages have at most so many steps."""
    if steps is None:
        return settings
    stages = [replace(s, steps=min(s.steps, steps)) for s in settings.stages]
    return replace(settings, stages=tuple(stages))


def run_all(experiments, options):
    """Make the runs that are missing, then draw every experiment's picture.

    A run that fails does not keep the others from being made. Runs that another
    process makes in the same folder are waited for, and taken over if it dies.

    Returns:
        dict from (experiment, run) to what became of it: `loop.FINISHED` and the like,
        "skipped" where its rows were there, or "failed: ..." with the error.
    """
    jobs, states, waited = jobs_of(experiments, options), {}, False
    while loop.INTERRUPTED not in states.values():
        left = [job for job in jobs if job.key not in states]
        if not left:
            break
        if waited:
            time.sleep(POLL_SECONDS)
        waited = True
        for job in left:
            state = attempt(job, f"{jobs.index(job) + 1}/{len(jobs)}", left, states)
            if state is not None:
                states[job.key], waited = state, False
            if state == loop.INTERRUPTED:
                break
    for experiment in experiments:
        draw(experiment, options)
    return states


def attempt(job, number, left, states):
    """Make a run, unless it has to wait for another process.

    Args:
        job: `Job`.
        number: words before the progress bar.
        left: list of the `Job` that were open when the round began.
        states: what became of the others.

    Returns:
        what became of it; None: another process makes it, or what it starts from.
    """
    if job.finished:
        return "skipped"
    if time.monotonic() > job.options.deadline:
        return loop.OUT_OF_TIME
    if any(other.key == job.start and other.key not in states for other in left):
        return None
    try:
        with lock_of(job.folder(), timeout=0):
            if job.finished:
                return "skipped"
            return run_one(job, f"{number} {' '.join(job.key)}")
    except Timeout:
        return None
    except Exception as error:
        traceback.print_exc()
        return f"failed: {error}"


def lock_of(path, timeout=-1):
    """Return the lock on a run's folder or on a file of rows, to be entered.

    Args:
        path: what is locked.
        timeout: seconds until `Timeout` is raised; negative: never.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f"{path.name}.lock"), timeout=timeout)


def run_here(experiment, runs):
    """Make runs in a folder that is gone afterwards, as a notebook does.

    Args:
        experiment: `Experiment`.
        runs: list of `Run`, few and small ones.

    Returns:
        list of Row.
    """
    with TemporaryDirectory() as folder:
        options = Options(out=Path(folder), quiet=True)
        for run in runs:
            run_one(Job(experiment, run, options))
        return results.read(csv_of(experiment, options))


def run_one(job, label=""):
    """Train one run from where it stands, measure it, and keep its rows.

    Returns:
        loop.FINISHED, or why it was stopped.
    """
    options, folder = job.options, job.folder()
    trainer = make_trainer(job)
    saving = loop.Saving(seconds=options.save_seconds, deadline=options.deadline)
    state = loop.run(trainer, folder, saving, label=label, quiet=options.quiet)
    if state != loop.FINISHED:
        return state
    model = trainer.model.eval()
    done = Finished(job.run, model, options.corpus, options.place, trainer)
    rows = job.experiment.measure(done)
    common, machine = describe(job, trainer), machine_of(job)
    weights = {name: x.cpu() for name, x in model.state_dict().items()}
    data = safetensors.torch.save(weights, {"config": config_json(model.config)})
    write_atomically(folder / MODEL, data)
    with lock_of(job.csv):
        results.add(job.csv, [common | row | machine for row in rows])
    (folder / LAST).unlink()
    return state


def make_trainer(job):
    """Return the trainer of a run, at its start or where it was stopped.

    Raises:
        FileNotFoundError: the run that it starts from has not been made.
    """
    run, options = job.run, job.options

    def data(index, stage):
        return run.data(options.corpus, index, stage, run.settings.seed)

    trainer = Trainer(run.settings, data, options.place, job.identity)
    if (job.folder() / LAST).exists():
        trainer.load(job.folder())
    elif run.start:
        path = job.folder(run.start) / MODEL
        if not path.exists():
            raise FileNotFoundError(
                f"expected the weights of run {run.start} at {path}, found none; make "
                f"that run first, --only should let it through"
            )
        trainer.model.load_state_dict(load_file(path))
    return trainer


def describe(job, trainer):
    """Return the columns that say what was trained, how long, and how fast."""
    run, settings = job.run, job.run.settings
    config, steps = settings.config, settings.steps
    tokens, matrices, attention = 0, 0.0, 0.0
    for stage in settings.stages:
        of_stage = stage.steps * stage.batch * stage.context
        per_token = training_flops(config, stage.attention, stage.context)
        tokens += of_stage
        matrices += of_stage * per_token[0]
        attention += of_stage * per_token[1]
    speed, row = trainer.tokens_per_second, {}
    if tokens:
        peak, source = job.options.peak
        row = {
            "tokens_per_s": speed,
            "seconds": tokens / speed,
            "flops_6nd": matrices,
            "flops": matrices + attention,
            "mfu": (matrices + attention) / tokens * speed / peak,
            "peak_flops": peak,
            "peak_from": source,
            "train_loss": float(np.mean(trainer.losses[-max(1, steps // 20) :])),
        }
    return {
        "experiment": job.experiment.name,
        "size": job.options.size,
        "run": run.name,
        "seed": settings.seed,
        **run.labels,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "matrix_parameters": matrix_parameters(config),
        "steps": steps,
        "tokens": tokens,
        **row,
    }


def machine_of(job):
    """Return the columns of hardware, versions, date and command."""
    options, place = job.options, job.options.place
    words = ["python", "-m", "moba_lab.experiments", job.experiment.name]
    words += ["--size", options.size, "--only", job.run.name]
    words += ["--device", place.device, "--precision", place.precision]
    words += ["--compile"] if place.compile else []
    words += ["--data", options.data] if options.data else []
    words += ["--steps", str(options.steps)] if options.steps is not None else []
    return {
        **describe_machine(place.device),
        "numpy": np.__version__,
        "precision": place.precision,
        "compiled": "yes" if place.compile else "no",
        "digest": job.digest,
        "command": shlex.join(words),
    }


def draw(experiment, options):
    """Draw an experiment's picture from the rows that are there, if any."""
    path = csv_of(experiment, options)
    rows = results.read(path)
    if rows:
        with lock_of(path):
            experiment.figure(rows).savefig(path.with_suffix(".png"))

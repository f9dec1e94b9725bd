"""Measure the points that are missing, whatever happens at one of them."""

import gc
import hashlib
import sys
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tokenizers
import torch
import transformers
from tqdm import tqdm

from moba_fast.machine import describe_machine
from moba_fast.measure import failure
from moba_fast.memory import out_of_memory
from moba_fast.timing import attempt
from moba_lab.evaluate import answers, losses, tables, texts
from moba_lab.evaluate.points import digest_of, is_done, plan, run_name, there
from moba_lab.evaluate.prefill import prefill
from moba_lab.evaluate.report import write_report
from moba_lab.evaluate.statuses import FAILED, INTERRUPTED, OK, WRONG
from moba_lab.evaluate.subject import Subject, load
from moba_lab.evaluate.supervise import is_alone, note
from moba_lab.experiments import results
from moba_lab.place import choose_place

FIRST = ("run", "model", "task", "depth", "subtask", "length", "attention", "status")


@dataclass(frozen=True)
class Bench:
    """A model, text, and how much is measured of each point."""

    subject: Subject
    haystack: texts.Haystack
    options: object

    @cached_property
    def machine(self):
        """Columns of hardware and versions."""
        found = describe_machine(self.subject.place.device)
        del found["date"]
        versions = {
            "numpy": np.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "precision": self.subject.place.precision,
        }
        return found | versions

    @cached_property
    def text_name(self):
        """Short name of the haystack's text."""
        return hashlib.sha256(self.haystack.texts[0]).hexdigest()[:12]

    def rng(self, point, number):
        """Return the generator of one example."""
        return np.random.default_rng([self.options.seed, *point.seed, number])

    def progress(self, point):
        """Return a function that shows how far a point's examples are."""
        options = {"desc": point.label, "leave": False, "disable": self.options.quiet}
        return lambda items: tqdm(items, **options)

    def needle(self, point):
        """Score answers about needles at one depth."""
        return self.scores(
            point,
            lambda rng: texts.needle(
                self.subject, self.haystack, rng, point.length, point.part
            ),
        )

    def ruler(self, point):
        """Score answers of one of RULER's tasks."""
        return self.scores(
            point,
            lambda rng: texts.ruler(self.subject, point.part, rng, point.length),
        )

    def scores(self, point, make):
        """Make questions and score the answers."""
        questions = [make(self.rng(point, n)) for n in range(self.options.samples)]
        show = self.progress(point)
        return answers.scores(self.subject, questions, point.length, show)

    def loss(self, point):
        """Measure the loss by position."""
        ids, sizes = losses.text_windows(
            self.subject, self.haystack, point.length, self.options.windows
        )
        show, model = self.progress(point), self.subject.model
        found = [losses.token_losses(model, row[None]) for row in show(ids)]
        return losses.by_position(np.concatenate(found), sizes)

    def prefill(self, point):
        """Measure time and memory of reading the first window."""
        ids, _ = losses.text_windows(self.subject, self.haystack, point.length, 1)
        return prefill(self.subject, ids[0], self.options.repeats)

    def measure(self, point):
        """Return what is found of a point, or how that failed, as columns."""

        def do():
            self.subject.switch(point.attention)
            return getattr(self, point.task)(point)

        begin = time.perf_counter()
        found = attempt(do)
        if isinstance(found, Exception):
            found = failure(found)
            gc.collect()
            if self.subject.place.is_gpu:
                torch.cuda.empty_cache()
        return {"status": OK, **found, "seconds": time.perf_counter() - begin}

    def row(self, point, found):
        """Return the whole row of a point."""
        subject = self.subject
        own = {name: subject.settings[name] for name in subject.settings}
        return {
            "run": run_name(point, subject),
            "model": subject.name,
            "task": point.task,
            "depth": point.part if point.task == "needle" else None,
            "subtask": point.part if point.task == "ruler" else None,
            "length": point.length,
            "attention": point.attention,
            **found,
            **(own if point.attention == "moba" else {}),
            "kernel": subject.config._attn_implementation,
            "parameters": subject.model.num_parameters(),
            "positions": getattr(subject.config, "max_position_embeddings", None),
            "seed": self.options.seed,
            "data": self.options.data or "standard library",
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **self.machine,
            "digest": self.digest(point),
            "command": self.options.command,
        }

    def digest(self, point):
        """Return the short name of what decides a point's row."""
        return digest_of(point, self.options, self.subject, self.text_name)


def work(options):
    """Measure what a command asks for and what is missing, and write the report.

    Args:
        options: `Options`.

    Returns:
        exit status, see `statuses`.
    """
    try:
        place = choose_place(options.device, options.precision)
        bench = Bench(load(options, place), texts.read_haystack(options.data), options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"error: the model does not fit into memory: {error}", file=sys.stderr)
        return FAILED
    warn(bench)
    try:
        statuses = run_all(bench)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    finally:
        rows = rows_of(bench)
        hidden = len(results.read(options.csv)) - len(rows)
        page = write_report(rows, options.out, hidden)
    print(*tables.scores(rows), sep="\n")
    good = statuses.count(OK)
    print(f"{good} of {len(statuses)} points are in {options.csv}, see {page}")
    if hidden:
        print(f"{hidden} more rows there, of other commands, are not on the page")
    return 0 if good == len(statuses) else FAILED


def warn(bench):
    """Print at which lengths MoBA reads everything, if it is measured there."""
    options = bench.options
    warning = tables.whole_texts(options.lengths, bench.subject.settings)
    if warning and "moba" in options.attention:
        print(
            f"warning: {warning} Choose longer --lengths, or a smaller --block-size "
            f"or --topk.",
            file=sys.stderr,
        )


def run_all(bench):
    """Measure the points whose rows are missing, and keep every row at once.

    Args:
        bench: `Bench`.

    Returns:
        list of the status of every point.

    Raises:
        KeyboardInterrupt: also if the process that started this one is gone.
    """
    options, statuses = bench.options, []
    done = there(options)
    for point in tqdm(plan(options), desc="points", disable=options.quiet):
        if is_alone(options):
            raise KeyboardInterrupt
        key = run_name(point, bench.subject), bench.digest(point)
        if not is_done(done.get(key), options.retry):
            done[key] = measure(bench, point)
        statuses.append(done[key])
    return statuses


def measure(bench, point):
    """Measure a point, keep its row, and return its status."""
    note(bench.options, bench.row(point, {}))
    found = bench.measure(point)
    if found["status"] != OK:
        tqdm.write(f"{point.label}: {found['status']}, {found['message']}")
    results.add(bench.options.csv, [bench.row(point, found)], FIRST)
    bench.options.pending.unlink()
    return found["status"]


def rows_of(bench):
    """Return the rows of a command's points that are there, in its order."""
    rows = {(r["run"], r["digest"]): r for r in results.read(bench.options.csv)}
    keys = [
        (run_name(point, bench.subject), bench.digest(point))
        for point in plan(bench.options)
    ]
    return [rows[key] for key in keys if key in rows]

"""Build the runs of experiments that train on tasks, and the batches they read."""

from dataclasses import dataclass, replace

import numpy as np

from moba_lab.experiments.contract import Run
from moba_lab.experiments.statistics import Interval, paired_difference
from moba_lab.model import Config
from moba_lab.settings import Settings, Stage
from moba_lab.tasks.definitions import Definitions
from moba_lab.tasks.example import AnyLength, Mixture, TaskSampler
from moba_lab.tasks.haystack import Haystack
from moba_lab.tasks.needle import Needle
from moba_lab.tasks.recall import Recall
from moba_lab.tasks.ruler import SHORT

# Seeds of runs are small, so no measured example is one of training.
HELD_OUT_SEED = 10**6
# What stands for the attention of runs that others start from.
BASE = "base"


@dataclass(frozen=True)
class TaskPlan:
    """What the runs of an experiment have in common in one size.

    first: (context, batch, steps) of each stage of a run with full attention, on short
        texts at first, in which heads learn within a few hundred steps to look things
        up; the other runs of its seed start from it. Empty: they start from nothing.
    second: the same of the one stage of the other runs, each with its own attention.
    lr: of the first, and of all if there is none.
    tuning: learning rate of those that start from the first, as a share.
    full_layers: last layers with full attention in hybrid runs.
    """

    width: int
    layers: int
    block_size: int
    topk: int
    first: tuple[tuple[int, int, int], ...]
    second: tuple[int, int, int]
    seeds: int
    lr: float
    tuning: float = 0.5
    head_dim: int = 32
    key_conv: int = 3
    rope_dims: int = 8
    full_layers: int = 1
    vocabulary: int = 256
    log_every: int = 10

    @property
    def context(self):
        """Tokens of a sequence in all runs but the first."""
        return self.second[0]

    def kinds(self, kind):
        """Return the attention of every layer: "moba", "full", or "hybrid"."""
        if kind != "hybrid":
            return (kind,) * self.layers
        moba = self.layers - self.full_layers
        return ("moba",) * moba + ("full",) * self.full_layers

    def config(self, kind, **changed):
        """Return the `Config` of a kind, with as many heads for keys as for queries."""
        options = {
            "vocab_size": self.vocabulary,
            "width": self.width,
            "heads": self.width // self.head_dim,
            "kv_heads": self.width // self.head_dim,
            "head_dim": self.head_dim,
            "hidden": 2 * self.width,
            "context": self.context,
            "block_size": self.block_size,
            "topk": self.topk,
            "attention": self.kinds(kind),
            "key_conv": self.key_conv,
            "rope_dims": self.rope_dims,
        }
        return Config(**options | changed)

    def base(self, name, seed, data, labels, **changed):
        """Return the first run of a seed."""
        labels = labels | {"attention": BASE}
        return self._run(name, "full", seed, data, labels, self.first, 1.0, **changed)

    def run(self, name, kind, seed, data, labels, base=None, **changed):
        """Return a run.

        Args:
            name: of the run; its seed is added.
            kind: "moba", "full" or "hybrid".
            seed: of weights and batches.
            data: `Batches`.
            labels: further columns.
            base: run of the same seed to start from, or None.
            changed: of `Config`.
        """
        labels = labels | {"attention": kind}
        share = self.tuning if base else 1.0
        made = self._run(
            name, kind, seed, data, labels, (self.second,), share, **changed
        )
        return replace(made, start=base.name) if base else made

    def _run(self, name, kind, seed, data, labels, sizes, share, **changed):
        steps = sum(size[2] for size in sizes)
        settings = Settings(
            self.config(kind, **changed),
            tuple(Stage(self.kinds(kind), *of) for of in sizes),
            seed,
            lr=share * self.lr,
            warmup=max(1, steps // 8),
            log_every=self.log_every,
        )
        return Run(f"{name}-{seed}", settings, data, labels, priority=min(seed, 1))


def is_base(done):
    """Return whether a `Finished` run is one that others start from."""
    return done.run.labels["attention"] == BASE


@dataclass(frozen=True)
class Batches:
    """Batches of a task in the training text, with only the answers as targets."""

    def task(self, haystack):
        """Return the task in a haystack."""
        raise NotImplementedError

    def __call__(self, corpus, index, stage, seed):
        """Return the `TaskSampler` of a stage, the same for all runs of a seed."""
        task = self.task(Haystack.of_stream(corpus.train))
        return TaskSampler(task, stage.batch, stage.context, 1000 * index + seed)

    def held_out(self, corpus, length, count, first=0):
        """Return examples in the held-out text, the same for every run.

        Args:
            corpus: `Corpus`.
            length: bytes of each, at most.
            count: how many.
            first: number of the first of them.
        """
        task = self.task(Haystack(list(corpus.held_out.values())))
        seeds = ([HELD_OUT_SEED, number] for number in range(first, first + count))
        return [task(np.random.default_rng(seed), length) for seed in seeds]


@dataclass(frozen=True)
class NeedleBatches(Batches):
    """Pass keys; depth None means anywhere.

    shortest: texts have any length from here to the context, so that heads learn on
        short ones what to look for in long ones; None: all fill the context.
    """

    digits: int
    depth: float | None = None
    shortest: int | None = None

    def task(self, haystack):
        """Return the task."""
        task = Needle(haystack, self.digits, self.depth)
        return AnyLength(task, self.shortest) if self.shortest else task


@dataclass(frozen=True)
class DefinitionBatches(Batches):
    """Definitions asked for by name."""

    def task(self, haystack):
        """Return the task."""
        return Definitions(haystack)


@dataclass(frozen=True)
class RulerBatches(Batches):
    """RULER's tasks without a corpus, all of `SHORT` or some."""

    names: tuple[str, ...] = tuple(SHORT)

    def task(self, haystack=None):
        """Return a mixture of the tasks; they make their own text."""
        return Mixture(SHORT[name]() for name in self.names)


@dataclass(frozen=True)
class RecallBatches(Batches):
    """Associative recall, each example in one of the arrangements of pairs."""

    pairs: int
    vocabulary: int
    scattered: tuple[bool, ...] = (False, True)

    def task(self, haystack=None):
        """Return a mixture of the arrangements; they need no text."""
        return Mixture(Recall(self.pairs, s, self.vocabulary) for s in self.scattered)


def paired_shares(first, second):
    """Compare shares of right answers to the same examples, `first` minus `second`.

    Args:
        first: (R, n) share of every seed and example, 0 to 1.
        second: (R, n) likewise.

    Returns:
        `Interval` as `paired_difference` makes it. Where no example differs, nothing is
        known of the spread; then it goes as far as 3 / n, which a share that was never
        seen in n examples stays below at 95 %.

    >>> paired_shares([[1, 1, 1, 1, 0, 1]], [[1, 1, 1, 1, 0, 1]]).high
    0.5
    """
    gap = paired_difference(first, second)
    gap = replace(gap, over=gap.over.replace("files", "texts"))
    if gap.low < gap.high:
        return gap
    half = 3 / np.shape(first)[1]
    return Interval(gap.mean, gap.mean - half, gap.mean + half, gap.over)

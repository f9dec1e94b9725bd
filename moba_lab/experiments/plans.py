"""Build the runs of experiments that train on text, and measure them all alike."""

from dataclasses import dataclass, replace

import numpy as np

from moba_lab.experiments.contract import Run, TextBatches
from moba_lab.experiments.statistics import paired_difference
from moba_lab.flops import matrix_parameters
from moba_lab.model import Config
from moba_lab.settings import Settings, Stage
from moba_lab.trainer import PARTS
from moba_lab.window_loss import file_means, whole_windows, window_losses

HEAD = 64
# Points of a curve of loss against position.
POINTS = 64
FEW_WINDOWS = 64


@dataclass(frozen=True)
class Plan:
    """What the runs of an experiment have in common in one size.

    seeds: number of seeds; run 0 of everything goes first.
    windows: held-out windows that are measured at most; None means all.
    """

    width: int
    layers: int
    context: int
    block_size: int
    batch: int
    steps: int
    seeds: int
    topk: int = 3
    lr: float = 2e-3
    log_every: int = 20
    windows: int | None = None

    def with_tokens(self, per_parameter):
        """Return the plan with the steps that take so many tokens per parameter."""
        tokens = per_parameter * matrix_parameters(self.config())
        return replace(self, steps=round(tokens / (self.batch * self.context)))

    def config(self, **changed):
        """Return the model's `Config`: no convolution of keys, as many heads for them.

        The feed-forward is 8/3 as wide as the model, rounded to 64, so that a layer has
        about 12 width^2 parameters.
        """
        head = min(HEAD, self.width // 2)
        step = min(64, head)
        options = {
            "width": self.width,
            "heads": self.width // head,
            "kv_heads": self.width // head,
            "head_dim": head,
            "hidden": max(step, round(8 * self.width / 3 / step) * step),
            "context": self.context,
            "block_size": self.block_size,
            "topk": self.topk,
            "attention": ("moba",) * self.layers,
            "key_conv": 1,
            "rope_dims": head,
        }
        return Config(**options | changed)

    def run(self, name, kinds, seed, labels, priority=None, **changed):
        """Return a run with a row of attentions, each for its share of the steps.

        Args:
            name: of the run; its seed is added.
            kinds: list of (attention, share of the steps), shares add up to 1.
            seed: also of the data, so that runs of one seed read the same batches.
            labels: further columns.
            priority: None means that of the seed, 0 for the first and 1 for the rest.
            changed: of `config`.
        """
        ends = np.round(np.cumsum([0.0, *(share for _, share in kinds)]) * self.steps)
        stages = tuple(
            Stage(kind, self.context, self.batch, int(steps))
            for (kind, _), steps in zip(kinds, np.diff(ends), strict=True)
        )
        settings = Settings(
            self.config(**changed),
            stages,
            seed,
            lr=self.lr,
            warmup=max(1, self.steps // 20),
            log_every=self.log_every,
        )
        priority = min(seed, 1) if priority is None else priority
        data = OneOrder(whole_files=True)
        if len(stages) > 1:
            read = np.cumsum([0, *(stage.steps * stage.batch for stage in stages)])
            data = ReadOn(whole_files=True, before=tuple(read[:-1].tolist()))
        return Run(f"{name}-{seed}", settings, data, labels, None, priority)


@dataclass(frozen=True)
class OneOrder(TextBatches):
    """Text in an order that the seed alone decides, whatever the stage."""

    def __call__(self, corpus, index, stage, seed):
        """Return the `BatchSampler` of a stage, at its start."""
        return super().__call__(corpus, 0, stage, seed)


@dataclass(frozen=True)
class ReadOn(OneOrder):
    """The same order, in which every stage reads on where the last one stopped.

    So a run of two attentions reads the very batches that runs of one read.

    before: windows that are read before every stage.
    """

    before: tuple[int, ...] = (0,)

    def __call__(self, corpus, index, stage, seed):
        """Return the `BatchSampler` of a stage, at its place in the order."""
        sampler = super().__call__(corpus, index, stage, seed)
        sampler.skip(self.before[index])
        return sampler


def measure_text(done, windows=None):
    """Measure a run on held-out files that are as long as its context.

    Args:
        done: `Finished`.
        windows: to measure at most.

    Returns:
        dict of columns. losses_by_file holds PARTS rows, one for every part of the
        context, of the mean losses of every file in nats, in one list; file_windows
        holds the weights of the files.
    """
    context = done.run.settings.stages[-1].context
    found, files = whole_windows(done.corpus.held_out, context, windows)
    losses = window_losses(done.model, found, done.place)
    parts = losses.reshape(len(losses), PARTS, -1).mean(2)
    by_file, counts = file_means(parts, files)
    points = losses.mean(0).reshape(min(POINTS, context), -1).mean(1)
    return {
        "context": context,
        "loss": float(losses.mean()),
        "trailing_loss": float(parts[:, -1].mean()),
        "position_losses": points.tolist(),
        "file_windows": counts.tolist(),
        "losses_by_file": by_file.T.ravel().tolist(),
    }


def windows_of(done, plans):
    """Return how many windows the plan of a run measures.

    A run with the context of no plan, such as a notebook's, has few of them.
    """
    known = {plan.context: plan.windows for plan in plans}
    return known.get(done.run.settings.config.context, FEW_WINDOWS)


def by_file(rows):
    """Return the losses of rows by seed, part and file.

    Args:
        rows: list of Row with the columns of `measure_text`, one for every seed.

    Returns:
        losses: (R, PARTS, F), in the order of the seeds.
        counts: (F,) windows of every file.
    """
    rows = sorted(rows, key=lambda row: row["seed"])
    losses = np.array([row["losses_by_file"] for row in rows])
    counts = np.atleast_1d(rows[0]["file_windows"])
    return losses.reshape(len(rows), PARTS, -1), counts


def difference(first, second, part=None):
    """Compare two kinds of runs, over the seeds that both have.

    Args:
        first: list of Row, one for every seed.
        second: list of Row likewise.
        part: index of a part of the context, -1 for the last; None means all of it.

    Returns:
        `Interval` of first minus second in nats; None where no seed has both.
    """
    seeds = {row["seed"] for row in first} & {row["seed"] for row in second}
    if not seeds:
        return None
    pair = []
    for rows in (first, second):
        losses, counts = by_file([row for row in rows if row["seed"] in seeds])
        pair.append(losses.mean(1) if part is None else losses[:, part])
    return paired_difference(*pair, counts)

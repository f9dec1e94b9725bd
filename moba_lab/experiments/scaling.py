"""Does loss fall with compute as fast for MoBA as for full attention?"""

import numpy as np

from moba_lab.experiments.contract import Experiment
from moba_lab.experiments.plans import (
    Plan,
    by_file,
    difference,
    measure_text,
    windows_of,
)
from moba_lab.experiments.results import source
from moba_lab.experiments.statistics import claim, fit_power_law
from moba_lab.viz.scaling_laws import scaling_laws

KINDS = ("full", "moba")
# Training bytes for every parameter in a matrix.
TOKENS_PER_PARAMETER = 4
# 16 blocks of which a query reads 3, as 8K in blocks of 512 in the paper. The learning
# rate falls with the root of the width, the same for both kinds of attention.
SMALL = {"context": 512, "block_size": 32, "log_every": 5, "windows": 128}
FULL = {"context": 2048, "block_size": 128, "log_every": 20}
SHAPES = {
    "small": ((24, 2), (40, 2), (64, 2)),
    "full": ((128, 5), (192, 5), (256, 6), (384, 6), (512, 8)),
}
BATCHES = {"small": (2, 4, 8), "full": (8, 8, 8, 16, 16)}
SEEDS = {"small": (3, 3, 3), "full": (3, 3, 3, 1, 1)}
RATES = {"small": 6e-3, "full": 2.8e-3}
# Share by which the held-out loss may lie above that of training. Text is short and the
# largest models read it many times; what they know by heart makes no power law.
BY_HEART = 0.2
# What a plot of loss can have on its x axis: column and name.
AXES = {
    "flops_6nd": "6 N D, FLOPs",
    "flops": "true FLOPs, attention included",
    "seconds": "seconds of training",
}


def plans(size):
    """Return the `Plan` of every model, the smallest one first."""
    found, first = [], SHAPES[size][0][0]
    sizes = zip(SHAPES[size], BATCHES[size], SEEDS[size], strict=True)
    for (width, layers), batch, seeds in sizes:
        rest = {"small": SMALL, "full": FULL}[size]
        rate = RATES[size] * (first / width) ** 0.5
        plan = Plan(width, layers, batch=batch, steps=0, seeds=seeds, lr=rate, **rest)
        found.append(plan.with_tokens(TOKENS_PER_PARAMETER))
    return found


def runs(size):
    """Return every model with both kinds of attention and every seed, small first.

    Models with one seed take longest, so they go after the first seed of the others.
    """
    found = []
    for plan in plans(size):
        for seed in range(plan.seeds):
            priority = max(min(seed, 1), int(plan.seeds == 1))
            for kind in KINDS:
                name, labels = f"{kind}-{plan.width}", {"attention": kind}
                found.append(plan.run(name, [(kind, 1.0)], seed, labels, priority))
    return found


def measure(done):
    """Return one row, with the losses by file."""
    return [measure_text(done, windows_of(done, [*plans("small"), *plans("full")]))]


def figure(rows):
    """Draw loss against compute three times, with fits and intervals."""
    points, apart, laws = {}, {}, {}
    known = by_heart(rows)
    for kind in KINDS:
        models = models_of(rows, kind)
        fitted = [of for of in models if of[0]["parameters"] not in known]
        rest = [of for of in models if of[0]["parameters"] in known]
        for column in AXES:
            points[kind, column] = [point(of, column) for of in fitted]
            apart[kind, column] = [point(of, column) for of in rest]
            if len(fitted) >= 3:
                laws[kind, column] = law(fitted, column)
    said = claims(rows, known)
    return scaling_laws(points, apart, laws, AXES, said, source(rows), BY_HEART)


def by_heart(rows):
    """Return the parameters of models that know their training text by heart."""
    return {
        of[0]["parameters"]
        for kind in KINDS
        for of in models_of(rows, kind)
        if np.mean([row["loss"] / row["train_loss"] for row in of]) > 1 + BY_HEART
    }


def models_of(rows, kind):
    """Return the rows of every model of a kind, a list of seeds, smallest first."""
    rows = [row for row in rows if row["attention"] == kind]
    sizes = sorted({row["parameters"] for row in rows})
    return [[row for row in rows if row["parameters"] == size] for size in sizes]


def point(rows, column):
    """Return (x, mean loss, lowest, highest) of a model's seeds."""
    losses = [row["loss"] for row in rows]
    x = float(np.mean([row[column] for row in rows]))
    return x, float(np.mean(losses)), min(losses), max(losses)


def law(models, column):
    """Fit the loss of models against a column of their rows."""
    pairs = [by_file(of) for of in models]
    x = [point(of, column)[0] for of in models]
    return fit_power_law(x, [losses.mean(1) for losses, _ in pairs], pairs[0][1])


def claims(rows, known):
    """Say for every model how MoBA differs from full attention.

    The largest one that does not know its text by heart goes first.
    """
    found, first = [], None
    pairs = {
        of[0]["parameters"]: of for kind in ("moba",) for of in models_of(rows, kind)
    }
    for full in models_of(rows, "full"):
        moba = pairs.get(full[0]["parameters"])
        gap = difference(moba, full) if moba else None
        if gap is not None:
            size = f"{full[0]['parameters'] / 1e6:.2g}M parameters"
            found.append(claim(gap, f"{size}, MoBA less full attention"))
            if full[0]["parameters"] not in known:
                first = found[-1]
    return sorted(found, key=lambda said: said != first)


EXPERIMENT = Experiment(
    "scaling",
    "Does loss fall with compute as fast for MoBA as for full attention?",
    runs,
    measure,
    figure,
)

"""Does MoBA lose where a context is long: at its end?"""

from functools import partial

import numpy as np

from moba_lab.experiments.contract import Experiment
from moba_lab.experiments.plans import Plan, difference, measure_text
from moba_lab.experiments.results import source
from moba_lab.experiments.statistics import claim
from moba_lab.trainer import PARTS
from moba_lab.viz.positions import position_losses

# Both have 64 blocks, of which a query reads 3.
PLANS = {
    "small": Plan(
        width=48,
        layers=2,
        context=1024,
        block_size=16,
        batch=4,
        steps=60,
        seeds=2,
        lr=8e-3,
        log_every=5,
        windows=96,
    ),
    "full": Plan(
        width=256, layers=6, context=8192, block_size=128, batch=8, steps=500, seeds=3
    ),
}


def runs(size):
    """Return MoBA and full attention with every seed."""
    plan = PLANS[size]
    return [
        plan.run(kind, [(kind, 1.0)], seed, {"attention": kind})
        for seed in range(plan.seeds)
        for kind in ("full", "moba")
    ]


def measure(done):
    """Return one row, the losses by position."""
    return [measure_text(done, PLANS[size_of(done)].windows)]


def size_of(done):
    """Return the size whose plan a run is of, by its context."""
    context = done.run.settings.config.context
    [size] = [size for size, plan in PLANS.items() if plan.context == context]
    return size


def figure(rows):
    """Draw loss against position, and the gap with its interval in every part."""
    kinds = {
        kind: [row for row in rows if row["attention"] == kind]
        for kind in ("full", "moba")
    }
    return draw(kinds, rows, "MoBA minus full attention")


def draw(kinds, rows, what, switches=()):
    """Draw kinds of runs against the full attention among them; see `figure`."""
    kinds = {name: of for name, of in kinds.items() if of}
    curves = {
        name: np.mean([row["position_losses"] for row in of], axis=0)
        for name, of in kinds.items()
    }
    gaps, claims = {}, []
    for name, of in kinds.items():
        if name != "full" and "full" in kinds:
            compare = partial(difference, of, kinds["full"])
            parts = [compare(part) for part in range(PARTS)]
            if parts[0] is not None:
                gaps[name] = [(gap.mean, gap.low, gap.high) for gap in parts]
                claims.append(claim(parts[-1], f"{name}, last sixteenth"))
    return position_losses(curves, gaps, rows[0]["context"], claims, source(rows), what)


EXPERIMENT = Experiment(
    "trailing",
    "At the end of a long context, how much does MoBA lose against full attention?",
    runs,
    measure,
    figure,
)

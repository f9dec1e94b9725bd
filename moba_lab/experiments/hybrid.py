"""Does a short end with full attention repair what training with MoBA left out?"""

import numpy as np

from moba_lab.experiments.contract import Experiment
from moba_lab.experiments.plans import Plan, measure_text, windows_of
from moba_lab.experiments.results import source
from moba_lab.experiments.statistics import claim, mean_interval
from moba_lab.experiments.trailing import gaps_by_part, mean_positions
from moba_lab.viz.hybrid import hybrid_curves

# 16 blocks of which a query reads 3, as in the paper.
PLANS = {
    "small": Plan(
        width=48,
        layers=2,
        context=512,
        block_size=32,
        batch=8,
        steps=60,
        seeds=3,
        lr=8e-3,
        log_every=3,
        windows=192,
    ),
    "full": Plan(
        width=256,
        layers=6,
        context=8192,
        block_size=512,
        batch=8,
        steps=500,
        seeds=3,
        log_every=10,
    ),
}
MOBA_SHARE = 0.9
KINDS = {
    "full": [("full", 1.0)],
    "moba": [("moba", 1.0)],
    "hybrid": [("moba", MOBA_SHARE), ("full", 1 - MOBA_SHARE)],
}


def runs(size):
    """Return full attention, MoBA, and 90 % MoBA then full, with every seed."""
    return runs_of(PLANS[size])


def runs_of(plan):
    """Return the three kinds of a plan; see `runs`."""
    return [
        plan.run(kind, stages, seed, {"attention": kind})
        for seed in range(plan.seeds)
        for kind, stages in KINDS.items()
    ]


def measure(done):
    """Return one row: losses by position, and the curve of the training loss."""
    settings = done.run.settings
    losses, every = done.trainer.losses, settings.log_every
    means = [
        sum(losses[first : first + every]) / len(losses[first : first + every])
        for first in range(0, len(losses), every)
    ]
    return [
        measure_text(done, windows_of(done, PLANS.values()))
        | {
            "curve_every": every,
            "curve": means,
            "switch": settings.stages[0].steps if len(settings.stages) > 1 else None,
        }
    ]


def figure(rows):
    """Draw training loss with the switch, loss by position, and the gaps to full."""
    # What the question is about comes first in the title.
    order = sorted(KINDS, key=lambda kind: kind != "hybrid")
    kinds = {kind: [row for row in rows if row["attention"] == kind] for kind in order}
    kinds = {kind: of for kind, of in kinds.items() if of}
    curves = {kind: [row["curve"] for row in of] for kind, of in kinds.items()}
    switch = next((row["switch"] for row in rows if row["switch"]), None)
    gaps, claims = gaps_by_part(kinds)
    if switch and "moba" in kinds:
        claims = [*jump(kinds, switch), *claims]
    return hybrid_curves(
        curves,
        rows[0]["curve_every"],
        switch,
        mean_positions(kinds),
        gaps,
        rows[0]["context"],
        claims,
        source(rows),
    )


def jump(kinds, switch):
    """Say how the training loss moves at the switch, against that of MoBA alone.

    Both read the same batches and have the same weights up to the switch, so what their
    difference does from one mean of steps to the next is the switch alone.
    """
    curves = [
        {row["seed"]: np.array(row["curve"]) for row in kinds[kind]}
        for kind in ("hybrid", "moba")
    ]
    every = kinds["hybrid"][0]["curve_every"]
    at = switch // every
    gaps = [curves[0][s] - curves[1][s] for s in curves[0].keys() & curves[1].keys()]
    moves = [gap[at] - gap[at - 1] for gap in gaps if len(gap) > at]
    if moves:
        seeds = f"{len(moves)} seeds" if len(moves) > 1 else "1 seed"
        what = "Jump of the training loss at the switch to full"
        yield claim(mean_interval(moves, seeds), what)


EXPERIMENT = Experiment(
    "hybrid",
    "Trained with MoBA for 90 % of the steps and then in full, what is still lost?",
    runs,
    measure,
    figure,
)

"""Does MoBA lose where a context is long: at its end?"""

import numpy as np

from moba_lab.experiments.contract import Experiment
from moba_lab.experiments.plans import Plan, difference, measure_text, windows_of
from moba_lab.experiments.results import source
from moba_lab.experiments.statistics import claim
from moba_lab.trainer import PARTS
from moba_lab.viz.positions import position_losses
from moba_lab.viz.training import LOOKS

# Both have 64 blocks, of which a query reads 3.
PLANS = {
    "small": Plan(
        width=48,
        layers=2,
        context=1024,
        block_size=16,
        batch=4,
        steps=60,
        seeds=3,
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
    return [measure_text(done, windows_of(done, PLANS.values()))]


def figure(rows):
    """Draw loss against position, and the gap with its interval in every part."""
    kinds = {
        kind: [row for row in rows if row["attention"] == kind]
        for kind in ("full", "moba")
    }
    kinds = {kind: of for kind, of in kinds.items() if of}
    gaps, claims = gaps_by_part(kinds)
    context, machine = rows[0]["context"], source(rows)
    return position_losses(mean_positions(kinds), gaps, context, claims, machine)


def mean_positions(kinds):
    """Average over seeds: dict from kind to the losses along the context."""
    return {
        kind: np.mean([row["position_losses"] for row in of], axis=0)
        for kind, of in kinds.items()
    }


def gaps_by_part(kinds):
    """Compare kinds of runs with the full attention among them.

    Args:
        kinds: dict from kind to its rows, one for every seed.

    Returns:
        gaps: dict from kind to (mean, low, high) of every part of the context.
        claims: what is known of the last part and of the whole context, sentences for
            every kind, those of the last part first.
    """
    gaps, claims, whole = {}, [], []
    for kind, of in kinds.items():
        if kind == "full" or "full" not in kinds:
            continue
        parts = [difference(of, kinds["full"], part) for part in range(PARTS)]
        if parts[-1] is not None:
            gaps[kind] = [(gap.mean, gap.low, gap.high) for gap in parts]
            what = f"{LOOKS[kind][0]} less full attention in the last sixteenth"
            claims.append(claim(parts[-1], what))
            gap = difference(of, kinds["full"])
            whole.append(claim(gap, f"{LOOKS[kind][0]} less full, all positions"))
    return gaps, claims + whole


EXPERIMENT = Experiment(
    "trailing",
    "At the end of a long context, how much does MoBA lose against full attention?",
    runs,
    measure,
    figure,
)

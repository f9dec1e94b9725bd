"""Are many small blocks better than a few large ones, at equal sparsity or work?

The paper keeps topk / blocks at 1/4, which is the sparsity of the last token only.
Over a causal pass finer blocks then read more, so a second row of settings has the
topk whose work comes closest to that of the coarsest one.
"""

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
from moba_lab.experiments.statistics import claim, mean_interval
from moba_lab.flops import work_ratio
from moba_lab.viz.granularity import granularity_curves

BLOCKS = (8, 16, 32, 64, 128)
PLANS = {
    "small": Plan(
        width=48,
        layers=2,
        context=1024,
        block_size=128,
        batch=2,
        steps=40,
        seeds=1,
        lr=8e-3,
        log_every=5,
        windows=48,
    ),
    "full": Plan(
        width=256, layers=6, context=8192, block_size=1024, batch=8, steps=400, seeds=3
    ),
}


def matched_topk(context, blocks):
    """Return the topk whose work is closest to that of 2 of 8 blocks.

    >>> [matched_topk(8192, blocks) for blocks in BLOCKS]
    [2, 4, 7, 13, 25]
    """
    work = work_ratio(context, context // BLOCKS[0], 2)
    sizes = range(1, blocks + 1)
    return min(
        sizes, key=lambda topk: abs(work_ratio(context, context // blocks, topk) - work)
    )


def settings_of(context, counts):
    """List (match, blocks, topk); what serves both matches is there once."""
    paper = [("paper", blocks, blocks // 4) for blocks in counts]
    work = [("work", blocks, matched_topk(context, blocks)) for blocks in counts]
    known = {row[1:] for row in paper}
    return paper + [row for row in work if row[1:] not in known]


def runs(size):
    """Return every setting and full attention, with every seed."""
    return runs_of(PLANS[size])


def runs_of(plan, counts=BLOCKS):
    """Return the settings with these numbers of blocks; see `runs`."""
    found = []
    for seed in range(plan.seeds):
        labels = {"attention": "full", "match": "full", "work": 1.0}
        found.append(plan.run("full", [("full", 1.0)], seed, labels))
        for match, blocks, topk in settings_of(plan.context, counts):
            block_size = plan.context // blocks
            labels = {
                "attention": "moba",
                "match": match,
                "blocks": blocks,
                "topk": topk,
                "work": work_ratio(plan.context, block_size, topk),
            }
            sizes = {"block_size": block_size, "topk": topk}
            name = f"moba-{topk}-of-{blocks}"
            found.append(plan.run(name, [("moba", 1.0)], seed, labels, seed, **sizes))
    return found


def measure(done):
    """Return one row, the losses by position."""
    return [measure_text(done, windows_of(done, PLANS.values()))]


def figure(rows):
    """Draw loss against the number of blocks, and against the work done."""
    matches = {
        "paper": [row for row in rows if row["match"] == "paper"],
        "work": [row for row in rows if row["attention"] == "moba" and is_work(row)],
    }
    curves = {name: points(of, rows) for name, of in matches.items() if of}
    claims = [
        finest_less_coarsest(matches[name], words)
        for name, words in (("paper", "topk of a quarter"), ("work", "equal work"))
        if len(curves.get(name, ())) > 1
    ]
    return granularity_curves(curves, claims, source(rows))


def is_work(row):
    """Say whether a row is one of the settings of equal work."""
    return row["topk"] == matched_topk(row["context"], row["blocks"])


def finest_less_coarsest(rows, words):
    """Say how the most and the fewest blocks differ."""
    counts = [row["blocks"] for row in rows]
    most, fewest = max(counts), min(counts)
    gap = difference(
        [row for row in rows if row["blocks"] == most],
        [row for row in rows if row["blocks"] == fewest],
    )
    what = f"{most} blocks less {fewest}, {words}"
    return claim(gap, what) if gap else f"{what}: no seed has both"


def points(rows, all_rows):
    """Summarise settings, each over its seeds.

    Returns:
        list of (blocks, topk, work, loss, low, high) by blocks: the loss less that of
        full attention of the same seeds, or the loss itself where none is there.
    """
    full = [row for row in all_rows if row["attention"] == "full"]
    found = []
    for blocks in sorted({row["blocks"] for row in rows}):
        of = [row for row in rows if row["blocks"] == blocks]
        gap = difference(of, full) if full else None
        if gap is None:
            losses, counts = by_file(of)
            means = losses.mean(1) @ counts / counts.sum()
            gap = mean_interval(np.atleast_1d(means), f"{len(of)} seeds")
        one = of[0]
        found.append((blocks, one["topk"], one["work"], gap.mean, gap.low, gap.high))
    return found


EXPERIMENT = Experiment(
    "granularity",
    "Are many small blocks better than a few large ones?",
    runs,
    measure,
    figure,
)

"""Is a pass key found in a long text, and if not, who failed: gate or reader?"""

from dataclasses import replace

import numpy as np

from moba_lab.experiments.contract import Experiment
from moba_lab.experiments.results import source
from moba_lab.experiments.statistics import claim
from moba_lab.experiments.task_runs import (
    NeedleBatches,
    RulerBatches,
    TaskPlan,
    is_base,
    paired_shares,
)
from moba_lab.tasks.needle import DEPTHS, DIGITS, SHORTEST
from moba_lab.tasks.routing import OUTCOMES, outcome, read_needle
from moba_lab.tasks.ruler import SHORT
from moba_lab.tasks.scoring import exact_matches, greedy, string_recall
from moba_lab.viz.needles import needle_heatmaps

KINDS = ("full", "moba", "hybrid")
# Lengths of the measured texts, in contexts of the training.
FACTORS = {"small": (1, 4, 16), "full": (1, 2, 4, 8, 16)}
# Texts for every depth and length.
REPEATS = {"small": 2, "full": 8}
RULER_EXAMPLES = {"small": 4, "full": 32}
PLANS = {
    "small": TaskPlan(
        width=64,
        layers=2,
        block_size=8,
        topk=5,
        first=((64, 32, 500), (256, 12, 250)),
        second=(256, 12, 100),
        seeds=1,
        lr=1e-2,
        tuning=0.05,
        rope_dims=4,
    ),
    "full": TaskPlan(
        width=256,
        layers=6,
        block_size=64,
        topk=3,
        first=((64, 256, 1000), (1024, 32, 1000)),
        second=(1024, 32, 2000),
        seeds=3,
        lr=2e-3,
        head_dim=64,
        rope_dims=16,
        full_layers=2,
    ),
}


# The first runs on RULER's tasks, whose shortest texts are longer than those of keys.
RULER_FIRST = {"small": ((80, 32, 500), (256, 12, 150)), "full": ((512, 32, 2000),)}
# The small size has time for the tasks of short texts only; all are measured.
RULER_NAMES = {"small": ("single", "multi-key"), "full": tuple(SHORT)}


def runs(size):
    """Return pass keys for every kind and seed, and RULER's tasks for two kinds."""
    needle, made = PLANS[size], []
    ruler = replace(needle, first=RULER_FIRST[size])
    for seed in range(needle.seeds):
        for task, plan, data, kinds in (
            ("needle", needle, NeedleBatches(DIGITS, shortest=SHORTEST), KINDS),
            ("ruler", ruler, RulerBatches(RULER_NAMES[size]), KINDS[:2]),
        ):
            labels = {"task": task}
            base = plan.base(f"{task}-base", seed, data, labels)
            made.append(base)
            for kind in kinds:
                name = f"{task}-{kind}"
                made.append(plan.run(name, kind, seed, data, labels, base))
    return made


def measure(done):
    """Return a row for every length and way of decoding, or for every task of RULER."""
    if is_base(done):
        return [{"length": context_of(done)}]
    if done.run.labels["task"] == "ruler":
        return measure_ruler(done)
    size = size_of(done)
    return [
        row
        for factor in FACTORS[size]
        for row in measure_length(done, factor * context_of(done), REPEATS[size])
    ]


def context_of(done):
    """Return the tokens of a sequence in the runs that are measured."""
    return done.run.settings.config.context


def size_of(done):
    """Return the size whose plan a run is of, by its context."""
    [size] = [size for size, plan in PLANS.items() if plan.context == context_of(done)]
    return size


def needles(corpus, length, repeats):
    """Return held-out texts with a pass key: for every depth, `repeats` of them."""
    found = []
    for depth in DEPTHS:
        data = NeedleBatches(DIGITS, depth)
        found += data.held_out(corpus, length, repeats, first=len(found))
    return found


def measure_length(done, length, repeats):
    """Score pass keys at one length.

    Returns:
        two rows of columns, one where all layers are full. decode: as in
        `scoring.predictions`. depth_scores: share of exact answers at every depth;
        right: 1 or 0 for every text. For the blocks chosen while decoding with MoBA:
        shares of the outcomes, and recall, how often each head of each layer read the
        block of the byte to be written.
    """
    examples = needles(done.corpus, length, repeats)
    found, recalls, in_full = [], [], []
    with done.place.autocast():
        for example in examples:
            said, choices, _ = read_needle(done.model, example)
            found.append(outcome(said, example.answer, choices))
            recalls.append(choices.mean(-1))
            if "moba" in done.model.attention:
                in_full.append(exact_matches(done.model, [example], "full")[0])
    right = np.array(found) == "right"
    shares = {name: found.count(name) / len(found) for name in OUTCOMES}
    routed = {
        "reading_errors": shares["reading error"],
        "routing_errors": shares["routing error"],
        "recall": np.mean(recalls, axis=0).ravel().tolist(),
    }
    return [
        {
            "length": length,
            "decode": decode,
            "score": float(np.mean(of)),
            "depth_scores": np.reshape(of, (len(DEPTHS), -1)).mean(1).tolist(),
            "right": np.asarray(of, dtype=int).tolist(),
            **more,
        }
        for decode, of, more in (("moba", right, routed), ("full", in_full, {}))
        if len(of)
    ]


def measure_ruler(done):
    """Score the free answers to every task, by the share of the references in them."""
    rows, length = [], context_of(done)
    for name in SHORT:
        data = RulerBatches((name,))
        examples = data.held_out(done.corpus, length, RULER_EXAMPLES[size_of(done)])
        scores = []
        for example in examples:
            with done.place.autocast():
                said = greedy(done.model, example.prompt, len(example.answer), b"\n")
            scores.append(string_recall(said, example.references))
        rows.append(
            {
                "ruler": name,
                "length": length,
                "score": float(np.mean(scores)),
                "scores": scores,
            }
        )
    return rows


def figure(rows):
    """Draw the share of exact answers by depth and length, for every kind."""
    rows = [row for row in rows if row["task"] == "needle" and row["decode"]]
    if not rows:
        return needle_heatmaps({}, (), DEPTHS, [], "nothing")
    lengths = sorted({row["length"] for row in rows})
    panels = {}
    for kind in KINDS:
        for decode in ("moba", "full") if kind != "full" else ("moba",):
            of = [r for r in rows if (r["attention"], r["decode"]) == (kind, decode)]
            if of:
                panels[kind, decode] = by_length(of, lengths)
    return needle_heatmaps(panels, lengths, DEPTHS, claims(rows, lengths), source(rows))


def by_length(rows, lengths):
    """Return scores (depths, lengths), recall of the best head, and routing errors."""
    scores, best, errors = [], [], []
    for length in lengths:
        of = [row for row in rows if row["length"] == length]
        scores.append(np.mean([row["depth_scores"] for row in of], axis=0))
        routed = [row for row in of if row["recall"] is not None]
        best.append(np.mean([max(row["recall"]) for row in routed]) if routed else None)
        missed = [row["routing_errors"] for row in routed]
        errors.append(np.mean(missed) if routed else None)
    return np.transpose(scores), best, errors


def claims(rows, lengths):
    """Compare MoBA with full attention at every length, the training length first."""
    said = []
    for length in lengths:
        pair = [
            {
                row["seed"]: row["right"]
                for row in rows
                if (row["attention"], row["decode"], row["length"])
                == (kind, "moba", length)
            }
            for kind in ("moba", "full")
        ]
        seeds = sorted(pair[0].keys() & pair[1].keys())
        if seeds:
            gap = paired_shares(*([of[s] for s in seeds] for of in pair))
            said.append(claim(gap, f"Keys found in {length} bytes, MoBA minus full"))
    return said


EXPERIMENT = Experiment(
    "needle",
    "Is a pass key found at any depth of texts up to 16 times the training length?",
    runs,
    measure,
    figure,
)

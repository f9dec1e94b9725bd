"""How many pairs does MoBA recall, in a row or scattered, with blocks of which size?

Whatever the size of blocks, a query reads as many past tokens: topk falls as they grow.
"""

import numpy as np
import torch

from moba_lab.experiments.contract import Experiment
from moba_lab.experiments.results import source
from moba_lab.experiments.statistics import claim
from moba_lab.experiments.task_runs import (
    RecallBatches,
    TaskPlan,
    is_base,
    paired_shares,
)
from moba_lab.tasks.routing import chose
from moba_lab.viz.recall import recall_curves
from moba_lab.viz.training import LOOKS

BLOCK_SIZES = {"small": (4, 8, 16), "full": (8, 16, 32, 64, 128)}
# Past tokens that a query reads, whatever the size of blocks.
READ = {"small": 16, "full": 128}
PAIRS = {"small": 8, "full": 64}
EXAMPLES = {"small": 60, "full": 400}
ARRANGEMENTS = {"in a row": False, "scattered": True}
PLANS = {
    "small": TaskPlan(
        width=64,
        layers=2,
        block_size=8,
        topk=2,
        first=((64, 32, 300),),
        second=(64, 32, 60),
        seeds=1,
        lr=1e-2,
        rope_dims=16,
        vocabulary=96,
    ),
    "full": TaskPlan(
        width=128,
        layers=2,
        block_size=64,
        topk=2,
        first=(),
        second=(512, 64, 3000),
        seeds=3,
        lr=3e-3,
        head_dim=64,
        rope_dims=16,
        vocabulary=768,
    ),
}


def runs(size):
    """Return full attention and MoBA with every size of blocks, for every seed.

    In the small size all start from one run with full attention, so that it takes
    minutes; in the full size all start from nothing.
    """
    plan, made = PLANS[size], []
    data = RecallBatches(PAIRS[size], plan.vocabulary)
    for seed in range(plan.seeds):
        base = plan.base("base", seed, data, {}) if plan.first else None
        made += [base] if base else []
        made.append(plan.run("full", "full", seed, data, {}, base))
        for block in BLOCK_SIZES[size]:
            changed = {"block_size": block, "topk": 1 + READ[size] // block}
            name = f"moba-{block}"
            made.append(plan.run(name, "moba", seed, data, changed, base, **changed))
    return made


def measure(done):
    """Return one row for each arrangement of the pairs.

    Columns: score, the share of queries answered; scores, the same of every example;
    recall, how often each head of each layer read the block with the wanted value.
    """
    if is_base(done):
        return [{"pairs": done.run.data.pairs}]
    [size] = [
        s for s, p in PLANS.items() if p.context == done.run.settings.config.context
    ]
    rows = []
    for name, scattered in ARRANGEMENTS.items():
        data = RecallBatches(PAIRS[size], PLANS[size].vocabulary, (scattered,))
        context = PLANS[size].context
        examples = data.held_out(done.corpus, context + 1, EXAMPLES[size])
        scores, heads = [], []
        for example in examples:
            right, read = look(done, example, context)
            scores.append(float(right.mean()))
            heads.append(read)
        rows.append(
            {
                "arrangement": name,
                "pairs": PAIRS[size],
                "length": context,
                "score": float(np.mean(scores)),
                "scores": scores,
                "recall": np.mean(heads, axis=0).ravel().tolist(),
            }
        )
    return rows


@torch.no_grad()
def look(done, example, context):
    """Return which queries were answered, (n,), and recall of heads, (layers, H)."""
    tokens, _ = example.row(context)
    with done.place.autocast():
        logits, aux = done.model(done.place.put(tokens), return_aux=True)
    said = logits.argmax(-1).cpu().numpy()[example.queries]
    read = [chose(layer, example.queries, example.places).mean(-1) for layer in aux]
    return said == example.values, np.stack(read)


def figure(rows):
    """Draw the share of answered queries against the size of blocks."""
    full, curves, said = {}, {}, list(extent(rows))
    for name in ARRANGEMENTS:
        of = [row for row in rows if row["arrangement"] == name]
        dense = {r["seed"]: r for r in of if r["attention"] == "full"}
        full[name] = [row["score"] for row in dense.values()]
        sparse = [row for row in of if row["attention"] == "moba"]
        curves[name] = [
            (
                block,
                [r["score"] for r in sparse if r["block_size"] == block],
                [max(r["recall"]) for r in sparse if r["block_size"] == block],
            )
            for block in sorted({row["block_size"] for row in sparse})
        ]
        said += compare(name, sparse, dense)
    return recall_curves(curves, full, rows[0]["pairs"], said, source(rows))


def extent(rows):
    """Say between which shares of answers the runs with MoBA and in full lie."""
    shares = {
        kind: [100 * row["score"] for row in rows if row["attention"] == kind]
        for kind in ("full", "moba")
    }
    words = [
        f"{LOOKS[kind][0]} answers {reach(of)} of the queries"
        for kind, of in shares.items()
        if of
    ]
    if words:
        said = ", ".join(words)
        yield said[0].upper() + said[1:]


def reach(shares):
    """Write the least and the largest of shares in percent.

    >>> reach([1.2, 99.6]), reach([100.0, 100.0])
    ('1 to 100 %', '100 %')
    """
    low, high = round(min(shares)), round(max(shares))
    return f"{high} %" if low == high else f"{low} to {high} %"


def compare(name, sparse, dense):
    """Say how the smallest and the largest blocks differ from full attention.

    Of two seeds the gaps are named: an interval over texts would hide how much seeds
    differ, of which one has learnt to answer and another has not.
    """
    sizes = sorted({row["block_size"] for row in sparse})
    for block in dict.fromkeys([*sizes[:1], *sizes[-1:]]):
        of = {r["seed"]: r for r in sparse if r["block_size"] == block}
        seeds = sorted(of.keys() & dense.keys())
        if seeds:
            pair = ([rows[s]["scores"] for s in seeds] for rows in (of, dense))
            what = f"Pairs {name}, blocks of {block}, MoBA minus full"
            if len(seeds) == 2:
                gaps = (f"{of[s]['score'] - dense[s]['score']:+.2f}" for s in seeds)
                yield f"{what}: {' and '.join(gaps)}, a seed each"
            else:
                yield claim(paired_shares(*pair), what)


EXPERIMENT = Experiment(
    "recall",
    "How much associative recall does MoBA keep, with blocks of which size?",
    runs,
    measure,
    figure,
)

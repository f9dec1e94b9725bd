"""Does the signal-to-noise ratio of the gate say what it finds, and what raises it?"""

import numpy as np

from moba_lab.experiments.contract import Experiment, Run
from moba_lab.experiments.needle import needles
from moba_lab.experiments.plans import Plan, difference, measure_text
from moba_lab.experiments.results import source
from moba_lab.experiments.statistics import claim
from moba_lab.experiments.task_runs import (
    NeedleBatches,
    TaskPlan,
    is_base,
    paired_shares,
)
from moba_lab.model import Config
from moba_lab.router import measured_snr, predicted_recall, simulate_recall, snr
from moba_lab.settings import Settings
from moba_lab.tasks.needle import DIGITS, SHORTEST
from moba_lab.tasks.routing import outcome, read_needle
from moba_lab.viz.router import router_recall

WIDTHS = (1, 3, 5)
BLOCKS = 32
TRIALS = {"small": 300, "full": 4000}
HEAD_DIMS = (32, 64, 128)
BLOCK_SIZES = {"small": (16, 64, 128), "full": (16, 32, 64, 128, 256, 512)}
# Sum of q·k over the wanted keys, and how many keys share it.
GAPS = ((0.5, 1), (1.0, 1), (1.8, 2))
TOPKS = (2, 4)
# Contexts of the training in which pass keys are looked for.
FACTORS = (1, 4)
REPEATS = {"small": 2, "full": 8}
TEXT = {
    "small": Plan(
        width=48,
        layers=2,
        context=1024,
        block_size=32,
        batch=4,
        steps=60,
        seeds=1,
        lr=8e-3,
        windows=64,
    ),
    "full": Plan(
        width=256, layers=6, context=2048, block_size=128, batch=32, steps=1500, seeds=3
    ),
}
NEEDLE = {
    "small": TaskPlan(
        width=64,
        layers=2,
        block_size=8,
        topk=5,
        first=((64, 32, 300),),
        second=(128, 24, 40),
        seeds=1,
        lr=1e-2,
        tuning=0.05,
        rope_dims=4,
    ),
    "full": TaskPlan(
        width=256,
        layers=4,
        block_size=64,
        topk=3,
        first=((64, 256, 1000), (1024, 32, 1000)),
        second=(1024, 32, 1000),
        seeds=3,
        lr=2e-3,
        head_dim=64,
        rope_dims=16,
    ),
}


def runs(size):
    """Return the gate alone, then text and pass keys with every width, by MoBA."""
    text, needle = TEXT[size], NEEDLE[size]
    # The gate needs no weights, so the smallest model stands for it.
    tiny = Config(width=8, heads=1, kv_heads=1, head_dim=8, hidden=8, attention=())
    made = [Run(f"gate-{size}", Settings(tiny, ()), labels={"what": "gate"})]
    data, kinds = NeedleBatches(DIGITS, shortest=SHORTEST), [("moba", 1.0)]
    for seed in range(text.seeds):
        for width in WIDTHS:
            labels, changed = {"what": "text", "key_conv": width}, {"key_conv": width}
            made.append(text.run(f"text-{width}", kinds, seed, labels, **changed))
            labels = {"what": "needle", "key_conv": width}
            base = needle.base(f"base-{width}", seed, data, labels, **changed)
            name = f"needle-{width}"
            made.append(base)
            made.append(needle.run(name, "moba", seed, data, labels, base, **changed))
    return made


def measure(done):
    """Return rows of the gate, of text, or of pass keys."""
    what, context = done.run.labels["what"], done.run.settings.config.context
    if what == "gate":
        return measure_gate(done.run.name.removeprefix("gate-"))
    plans = {"text": TEXT, "needle": NEEDLE}[what]
    [size] = [size for size, plan in plans.items() if plan.context == context]
    if what == "needle" and is_base(done):
        return [{"length": context}]
    if what == "text":
        return [measure_text(done, plans[size].windows)]
    return [measure_heads(done, factor * context, REPEATS[size]) for factor in FACTORS]


def measure_gate(size):
    """Compare prediction and simulation for every setting.

    Columns: hits of trials in which the block was chosen, and the predicted share.
    """
    rows = []
    for head_dim in HEAD_DIMS:
        for block_size in BLOCK_SIZES[size]:
            for gap, related in GAPS:
                for topk in TOPKS:
                    shape = head_dim, block_size, BLOCKS, topk, gap, related
                    found = simulate_recall(*shape, trials=TRIALS[size])
                    ratio = snr(gap, head_dim, block_size)
                    rows.append(
                        {
                            "head_dim": head_dim,
                            "block_size": block_size,
                            "blocks": BLOCKS,
                            "topk": topk,
                            "gap": gap,
                            "related": related,
                            "snr": ratio,
                            "predicted": predicted_recall(ratio, BLOCKS - 1, topk - 1),
                            "hits": int(found.sum()),
                            "trials": len(found),
                        }
                    )
    return rows


def measure_heads(done, length, repeats):
    """Measure what a trained gate finds, and what its scores predict.

    Columns, the lists with one value for every head of every layer: head_snr, measured
    from the scores; predicted and recall, the shares of wanted blocks that this ratio
    predicts and that were chosen, where the block was not the current one.
    """
    examples = needles(done.corpus, length, repeats)
    found, looks = [], []
    for example in examples:
        with done.place.autocast():
            said, choices, aux = read_needle(done.model, example)
        found.append(outcome(said, example.answer, choices))
        looks.append(
            look(example, choices, aux, length // aux[0].blocks.block_size + 1)
        )
    scores, wanted, chosen = (
        np.concatenate(x, axis=-1) for x in zip(*looks, strict=True)
    )
    config = done.run.settings.config
    # Texts are a line or so shorter than the length, so blocks vary by a few.
    others = int(np.isfinite(scores[0, 0]).sum(0).mean()) - 1
    ratios = [measured_snr(head.T, wanted) for layer in scores for head in layer]
    return {
        "length": length,
        "score": found.count("right") / len(found),
        "right": [int(name == "right") for name in found],
        "routing_errors": found.count("routing error") / len(found),
        "head_snr": ratios,
        "predicted_heads": [
            predicted_recall(ratio, others, config.topk - 1) for ratio in ratios
        ],
        "recall": chosen.mean(-1).ravel().tolist(),
    }


def look(example, choices, aux, blocks):
    """Return the scores of past blocks at the queries whose wanted block is past.

    Returns:
        scores: (layers, H, blocks, n), -inf for what is no past block.
        wanted: (n,) the block that each query looks for.
        chosen: (layers, H, n) bool.
    """
    first, end = example.needles[0]
    size = aux[0].blocks.block_size
    wanted = np.arange(first, end) // size
    queries = len(example.prompt) - 1 + np.arange(end - first)
    past = wanted < queries // size
    scores = np.full((len(aux), choices.shape[1], blocks, past.sum()), -np.inf)
    for layer, one in enumerate(aux):
        of = one.scores[queries[past]].float().cpu().numpy().transpose(1, 2, 0)
        scores[layer, :, : of.shape[1]] = np.where(np.isposinf(of), -np.inf, of)
    return scores, wanted[past], choices[:, :, past]


def figure(rows):
    """Draw prediction against measurement, and what the convolution changes."""
    gate = [row for row in rows if row["what"] == "gate"]
    heads = [row for row in rows if row["what"] == "needle" and row["recall"]]
    text = [row for row in rows if row["what"] == "text"]
    return router_recall(gate, heads, claims(text, heads), source(rows))


def claims(text, heads):
    """Say what widths 3 and 5 change, against no convolution."""
    said = []
    for width in WIDTHS[1:]:
        pair = ([r for r in text if r["key_conv"] == w] for w in (width, 1))
        gap = difference(*pair)
        if gap is not None:
            said.append(claim(gap, f"loss on text, width {width} minus none"))
        for length in sorted({row["length"] for row in heads}):
            of = [
                {
                    row["seed"]: row["right"]
                    for row in heads
                    if (row["key_conv"], row["length"]) == (w, length)
                }
                for w in (width, 1)
            ]
            seeds = sorted(of[0].keys() & of[1].keys())
            if seeds:
                gap = paired_shares(*([x[s] for s in seeds] for x in of))
                what = f"keys found in {length} bytes, width {width} minus none"
                said.append(claim(gap, what))
    return said


EXPERIMENT = Experiment(
    "router",
    "Does the gate find what its signal-to-noise ratio predicts, and do convolved keys "
    "help?",
    runs,
    measure,
    figure,
)

"""Does fine-tuning with the prompt masked need full attention in the last layers?"""

import numpy as np
import torch

from moba_lab.experiments.contract import Experiment, Run
from moba_lab.experiments.plans import Plan
from moba_lab.experiments.results import source
from moba_lab.experiments.statistics import claim, paired_difference
from moba_lab.experiments.task_runs import DefinitionBatches
from moba_lab.settings import Settings, Stage
from moba_lab.tasks.example import IGNORED
from moba_lab.viz.layerwise import layerwise_losses

PLANS = {
    "small": Plan(
        width=48,
        layers=6,
        context=512,
        block_size=16,
        batch=4,
        steps=80,
        seeds=1,
        lr=6e-3,
    ),
    "full": Plan(
        width=256, layers=8, context=2048, block_size=64, batch=16, steps=3000, seeds=3
    ),
}
# Of the steps on text, and of its learning rate.
TUNING = {"small": (30, 0.5), "full": (1000, 0.3)}
EXAMPLES = {"small": 48, "full": 400}
LAST = (0, 1, 2, 3, 5)


def runs(size):
    """Return training on text by MoBA, then fine-tuning from it, for every seed."""
    plan = PLANS[size]
    made = []
    for seed in range(plan.seeds):
        base = plan.run("text", [("moba", 1.0)], seed, {"full_layers": -1}, **CHANGED)
        made.append(base)
        for last in (*LAST, plan.layers):
            made.append(tuning(size, base, last))
    return made


# A convolution of keys, without which so little training finds no names again.
CHANGED = {"key_conv": 3}


def tuning(size, base, last):
    """Return the run that goes on from another with its last layers in full."""
    plan, (steps, share) = PLANS[size], TUNING[size]
    kinds = ("moba",) * (plan.layers - last) + ("full",) * last
    settings = Settings(
        plan.config(**CHANGED, attention=kinds),
        (Stage(kinds, plan.context, plan.batch, steps),),
        base.settings.seed,
        lr=share * plan.lr,
        warmup=max(1, steps // 10),
        log_every=plan.log_every,
    )
    return Run(
        f"last-{last}-{base.settings.seed}",
        settings,
        DefinitionBatches(),
        {"full_layers": last},
        base.name,
        base.priority,
    )


@torch.no_grad()
def measure(done):
    """Return one row: loss of the answers' bytes, and how many answers are exact.

    Columns: losses, nats per byte of every held-out answer; right, 1 or 0 for each.
    """
    context = done.run.settings.config.context
    [size] = [size for size, plan in PLANS.items() if plan.context == context]
    examples = DefinitionBatches().held_out(done.corpus, context + 1, EXAMPLES[size])
    losses, right = [], []
    for example in examples:
        tokens, targets = (done.place.put(x[None]) for x in example.row(context))
        with done.place.autocast():
            logits = done.model(tokens).float()[0]
        counted = targets[0] != IGNORED
        logits, wanted = logits[counted], targets[0][counted]
        losses.append(float(torch.nn.functional.cross_entropy(logits, wanted)))
        right.append(int((logits.argmax(-1) == wanted).all()))
    return [
        {
            "context": context,
            "loss": float(np.mean(losses)),
            "score": float(np.mean(right)),
            "losses": losses,
            "right": right,
        }
    ]


def figure(rows):
    """Draw the loss against the number of last layers in full."""
    tuned = [row for row in rows if row["full_layers"] >= 0]
    before = [row["loss"] for row in rows if row["full_layers"] < 0]
    counts = sorted({row["full_layers"] for row in tuned})
    losses = {n: {r["seed"]: r for r in tuned if r["full_layers"] == n} for n in counts}
    gaps, said = {}, []
    for n in counts:
        seeds = sorted(losses[n].keys() & losses[counts[-1]].keys())
        if n == counts[-1] or not seeds:
            continue
        pair = (
            [of[s]["losses"] for s in seeds] for of in (losses[n], losses[counts[-1]])
        )
        gaps[n] = paired_difference(*pair)
        which = {0: "No layer", 1: "Last layer"}.get(n, f"Last {n} layers")
        what = f"{which} full, loss minus that of all {counts[-1]}"
        said.append(claim(gaps[n], what).replace("files", "answers"))
    means = {n: [row["loss"] for row in of.values()] for n, of in losses.items()}
    scores = {n: [row["score"] for row in of.values()] for n, of in losses.items()}
    return layerwise_losses(means, scores, before, gaps, said, source(rows))


EXPERIMENT = Experiment(
    "layerwise",
    "In fine-tuning with the prompt masked, what do full attention's last layers gain?",
    runs,
    measure,
    figure,
)

"""Measure held-out losses with MoBA and in full, to tell when to stop.

What counts is the end of a long text, where a query has the most blocks to choose from:
the paper looks at the last 2K of 32K tokens, a sixteenth. Full attention on the *same*
weights says what reading fewer blocks costs; the model before the switch says whether
the weights themselves got worse.
"""

import numpy as np

from moba_lab.convert.model import evaluating
from moba_lab.evaluate.losses import PARTS, token_losses

# The paper's "last 2K of 32K tokens".
TRAILING = 16


def measure(model, windows, settings, restore):
    """Measure a model on held-out windows, in full and with MoBA.

    Args:
        model: causal language model of transformers, or within PEFT's.
        windows: (W, S) token ids.
        settings: of its MoBA, see `moba_lab.convert.model.switch`.
        restore: settings that it has now, None for full attention.

    Returns:
        dict of columns, see `columns`.
    """
    losses = {}
    for kind, now in (("full", None), ("moba", settings)):
        with evaluating(model, now, restore):
            losses[kind] = token_losses(inner(model), windows)
    return columns(losses)


def inner(model):
    """Return the library's model within PEFT's, adapters in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def columns(losses):
    """Sum up the losses of both kinds of attention on the same windows.

    Args:
        losses: "full" and "moba" -> (W, S - 1) nats.

    Returns:
        dict: for either kind `loss_KIND`, `trailing_KIND` (the last sixteenth),
        `ends_KIND` (the same of every window) and `parts_KIND` (means over equal parts
        of the text); `gap`, by how much MoBA's trailing loss is above full attention's,
        and `gap_se`, its standard error over windows, which are the same for both.

    >>> found = columns({"full": np.zeros((2, 32)), "moba": np.ones((2, 32))})
    >>> found["trailing_moba"], found["gap"], found["gap_se"]
    (1.0, 1.0, 0.0)
    """
    found = {}
    for kind, of_kind in losses.items():
        count = of_kind.shape[1]
        ends = of_kind[:, -max(1, count // TRAILING) :].mean(1)
        cuts = np.array_split(np.arange(count), min(PARTS, count))
        found[f"loss_{kind}"] = float(of_kind.mean())
        found[f"trailing_{kind}"] = float(ends.mean())
        found[f"ends_{kind}"] = ends.tolist()
        found[f"parts_{kind}"] = [float(of_kind[:, cut].mean()) for cut in cuts]
    found["gap"], found["gap_se"] = paired(found["ends_moba"], found["ends_full"])
    return found


def paired(ends, others):
    """Return the mean difference of losses on the same windows, and its standard error.

    Args:
        ends: (W,) losses.
        others: (W,) those to subtract.

    Returns:
        mean, and its standard error, None for one window.

    >>> paired([3.0, 5.0], [2.0, 2.0])
    (2.0, 1.0)
    """
    gaps = np.subtract(ends, others)
    count = len(gaps)
    error = float(np.std(gaps, ddof=1) / count**0.5) if count > 1 else None
    return float(gaps.mean()), error


def may_stop(rows, gap):
    """Say whether the last two checks of a stage were both at most `gap` nats.

    >>> may_stop([{"gap": 0.3}, {"gap": 0.01}, {"gap": 0.02}], 0.02)
    True
    """
    return len(rows) > 1 and all(row["gap"] <= gap for row in rows[-2:])


def verdict(rows):
    """Say in a sentence how far a stage of MoBA has come.

    Args:
        rows: of its checks, the first one right after the switch.

    >>> row = {"gap": 0.5, "gap_se": 0.01, "trailing_full": 1.0}
    >>> print(verdict([row, row | {"gap": 0.2}]))
    trailing loss above that of full attention on the same weights:
      0.500 nats after the switch, 0.200 +- 0.010 now, still falling;
      in full 1.000 before, 1.000 now
    """
    first, last = rows[0], rows[-1]
    error = last["gap_se"] or 0.0
    known = f" +- {error:.3f}" if last["gap_se"] is not None else ""
    before = rows[-2]["gap"] if len(rows) > 1 else last["gap"]
    trend = "still falling" if before - last["gap"] > error else "no longer falling"
    return (
        "trailing loss above that of full attention on the same weights:\n"
        f"  {first['gap']:.3f} nats after the switch, {last['gap']:.3f}{known} now, "
        f"{trend};\n"
        f"  in full {first['trailing_full']:.3f} before, "
        f"{last['trailing_full']:.3f} now"
    )


def summary(rows, control=()):
    """Say what the stages of a run have reached.

    Args:
        rows: of all checks of a run.
        control: of all checks of its control; none: there is none.

    >>> rows = [{"stage": 1, "trained": "full", "length": 64, "trailing_full": 2.0}]
    >>> print(summary([*rows, rows[0] | {"trailing_full": 1.5}]))
    stage 1, 64 tokens, full: trailing loss 2.000, then 1.500
    """
    lines = []
    for stage in sorted({row["stage"] for row in rows}):
        first, *_, last = [row for row in rows if row["stage"] == stage] * 2
        column = "trailing_full" if last["trained"] == "full" else "trailing_moba"
        lines.append(
            f"stage {stage}, {last['length']:,} tokens, {last['trained']}: trailing "
            f"loss {first[column]:.3f}, then {last[column]:.3f}"
        )
    sparse = last_stage(rows)
    if sparse:
        lines.append(verdict(sparse))
    if sparse and control:
        stage = sparse[0]["stage"]
        lines.append(compared(sparse, [r for r in control if r["stage"] == stage]))
    return "\n".join(lines)


def last_stage(rows):
    """Return the rows of the last stage with MoBA; none where there is no such stage.

    >>> last_stage([{"stage": 1, "trained": "moba"}, {"stage": 2, "trained": "full"}])
    [{'stage': 1, 'trained': 'moba'}]
    """
    stages = [row["stage"] for row in rows if row["trained"] != "full"]
    return [row for row in rows if stages and row["stage"] == stages[-1]]


def recovery(rows, control):
    """Compare a stage of MoBA with the same training in full.

    What counts in the end is not what MoBA costs on its own weights, but on which loss
    a model ends that was trained with it, beside one that never was. A switch costs
    less where a text is familiar, so the control is switched after its training, too.

    Args:
        rows: of the stage's checks.
        control: of the same stage of the control. Compared is the last step of both.

    Returns:
        lost: by how much the control's trailing loss by MoBA is above its own in full,
            nats per token.
        left: by how much MoBA's model, by MoBA, ends above the control in full.
        error: standard error of `left` over windows, None for one window.

    >>> rows = [{"step": 9, "ends_moba": [1.1, 1.3]}, {"step": 10}]
    >>> recovery(rows, [{"step": 9, "gap": 0.2, "ends_full": [1.0, 1.2]}])
    (0.2, 0.10000000000000009, 0.0)
    """
    last = max({row["step"] for row in rows} & {row["step"] for row in control})
    [row], [beside] = ([r for r in x if r["step"] == last] for x in (rows, control))
    left, error = paired(row["ends_moba"], beside["ends_full"])
    return beside["gap"], left, error


def compared(rows, control):
    """Say in a sentence what `recovery` found.

    >>> rows = [{"step": 9, "ends_moba": [1.1, 1.3]}]
    >>> print(compared(rows, [{"step": 9, "gap": 0.2, "ends_full": [1.0, 1.3]}]))
    trailing loss by MoBA above that of the control, trained on in full, in full:
      0.200 nats when the control is switched now;
      0.050 +- 0.050 of the model that was trained on with MoBA, 75 % less
    """
    lost, left, error = recovery(rows, control)
    less = f", {100 * (1 - left / lost):.0f} % less" if lost > 0 else ""
    known = "" if error is None else f" +- {error:.3f}"
    return (
        "trailing loss by MoBA above that of the control, trained on in full, in full:"
        f"\n  {lost:.3f} nats when the control is switched now;"
        f"\n  {left:.3f}{known} of the model that was trained on with MoBA{less}"
    )

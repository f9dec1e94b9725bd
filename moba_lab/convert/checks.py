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
        dict: for either kind `loss_KIND`, `trailing_KIND` (the last sixteenth) and
        `parts_KIND` (means over equal parts of the text); `gap`, by how much MoBA's
        trailing loss is above full attention's, and `gap_se`, its standard error over
        windows, which are the same for both.

    >>> found = columns({"full": np.zeros((2, 32)), "moba": np.ones((2, 32))})
    >>> found["trailing_moba"], found["gap"], found["gap_se"]
    (1.0, 1.0, 0.0)
    """
    found, ends = {}, {}
    for kind, of_kind in losses.items():
        count = of_kind.shape[1]
        ends[kind] = of_kind[:, -max(1, count // TRAILING) :].mean(1)
        cuts = np.array_split(np.arange(count), min(PARTS, count))
        found[f"loss_{kind}"] = float(of_kind.mean())
        found[f"trailing_{kind}"] = float(ends[kind].mean())
        found[f"parts_{kind}"] = [float(of_kind[:, cut].mean()) for cut in cuts]
    gaps = ends["moba"] - ends["full"]
    spread = np.std(gaps, ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    found["gap"] = float(gaps.mean())
    found["gap_se"] = None if spread is None else float(spread)
    return found


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
    before = rows[-2]["gap"] if len(rows) > 1 else last["gap"]
    trend = "still falling" if before - last["gap"] > error else "no longer falling"
    return (
        "trailing loss above that of full attention on the same weights:\n"
        f"  {first['gap']:.3f} nats after the switch, {last['gap']:.3f} +- "
        f"{error:.3f} now, {trend};\n"
        f"  in full {first['trailing_full']:.3f} before, "
        f"{last['trailing_full']:.3f} now"
    )

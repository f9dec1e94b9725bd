"""Make the figure of a conversion from its recorded rows."""

import numpy as np

from moba_lab import viz
from moba_lab.experiments import results


def figure(rows):
    """Draw losses over continued training and along the context.

    Args:
        rows: of `checks.csv`, from `moba_lab.experiments.results.read`. Of several
            stages the last one of MoBA is drawn, and the control's at the same place.

    Returns:
        Figure.

    Raises:
        ValueError: there is no row of a stage of MoBA.
    """
    sparse = [row for row in rows if row["trained"] == "moba"]
    if not sparse:
        raise ValueError("expected rows of a stage of MoBA, got none")
    stage = sparse[-1]["stage"]
    moba, full = (
        [row for row in rows if (row["run"], row["stage"]) == (run, stage)]
        for run in ("moba", "full")
    )
    trailing = {
        "moba": series(moba, "trailing_moba"),
        "moba in full": series(moba, "trailing_full"),
    }
    positions = {
        "before": moba[0]["parts_full"],
        "switched": moba[0]["parts_moba"],
        "moba": moba[-1]["parts_moba"],
    }
    if full:
        trailing["full"] = series(full, "trailing_full")
        trailing["full by moba"] = series(full, "trailing_moba")
        positions["full"] = full[-1]["parts_full"]
    source = f"{results.source(rows)}, transformers {rows[0]['transformers']}"
    return viz.conversion_curves(trailing, positions, moba[0]["length"], source)


def by_position(found, length, bytes_per_token, source):
    """Draw the losses of a switched model along the context, by MoBA and in full.

    Args:
        found: from `moba_lab.convert.checks.measure`.
        length: tokens of the windows.
        bytes_per_token: of their text.
        source: what was measured on.

    Returns:
        Figure.
    """
    nats = {kind: np.array(found[f"parts_{kind}"]) for kind in ("full", "moba")}
    bit = np.log(2) * bytes_per_token
    curves = {(length, kind): (x, x / bit) for kind, x in nats.items()}
    return viz.loss_curves(curves, source)


def series(rows, column):
    """Return the tokens that a stage has trained on so far, and a column."""
    first = rows[0]["tokens"]
    return [row["tokens"] - first for row in rows], [row[column] for row in rows]

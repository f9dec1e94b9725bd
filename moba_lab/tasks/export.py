"""Ship a run's model with its card: `python -m moba_lab.tasks.export CSV RUN PATH`.

The shipped `checkpoints/needle.safetensors` was made so from the experiment "needle";
its card names both commands.
"""

import json
import shlex
import sys
from pathlib import Path

import safetensors.torch
from safetensors import safe_open

from moba_lab.card import write_atomically
from moba_lab.experiments.results import read

# Columns of a row that say how the model was made, the same in all rows of a run.
MADE = (
    *("command", "experiment", "size", "run", "seed", "parameters", "steps", "tokens"),
    *("seconds", "train_loss", "device", "cpu", "threads", "python", "torch", "numpy"),
    *("precision", "date"),
)
# And those that say what was measured, one row for each.
MEASURED = ("length", "decode", "score", "reading_errors", "routing_errors", "recall")


def export(csv, run, path):
    """Write a run's weights as bfloat16, and a card beside them.

    Args:
        csv: rows of the experiment; the folder of the same name holds the runs.
        run: name of the run.
        path: the file to write, for `moba_lab.model.load_checkpoint`; the card gets the
            same name and ends in `.json`.

    Returns:
        dict, the card.

    Raises:
        ValueError: the rows of that run are not there.
    """
    csv, path = Path(csv), Path(path)
    rows = [row for row in read(csv) if row["run"] == run]
    if not rows:
        raise ValueError(f"expected rows of run {run} in {csv}, found none; make it")
    source = csv.with_suffix("") / run / "model.safetensors"
    with safe_open(source, framework="pt") as file:
        config = file.metadata()["config"]
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    export_command = ["python", "-m", "moba_lab.tasks.export", csv.name, run, path.name]
    card = {
        **{name: rows[0][name] for name in MADE},
        "exported by": shlex.join(export_command),
        "starts from": commands_before(csv, rows[0]),
        "config": json.loads(config),
        "measured": [
            {name: row[name] for name in MEASURED if row[name] is not None}
            for row in rows
        ],
    }
    write_atomically(path, safetensors.torch.save(weights, {"config": config}))
    write_atomically(
        path.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode()
    )
    return card


def commands_before(csv, row):
    """Return the command of the run from which a run of a seed starts."""
    base = (
        other["command"]
        for other in read(csv)
        if other["attention"] == "base"
        and (other["task"], other["seed"]) == (row["task"], row["seed"])
    )
    return next(base, None)


if __name__ == "__main__":
    print(json.dumps(export(*sys.argv[1:]), indent=1))

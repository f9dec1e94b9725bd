"""Keep the rows of an experiment in one CSV, which is whole at any moment."""

import csv
import io
from pathlib import Path

from moba_lab.card import write_atomically

RECORDED = Path(__file__).resolve().parent.parent / "results"
# First columns of every file; the others follow in the order in which they came.
FIRST = ("experiment", "size", "run", "seed")


class Row(dict):
    """Hold the columns of one row; one that is not there is None."""

    def __missing__(self, column):
        return None


def read(path):
    """Read the rows of an experiment.

    Args:
        path: the CSV file; a name without a folder is one of `moba_lab/results/`.

    Returns:
        list of Row; cells are numbers, tuples of numbers where several stand in one,
        texts, or None where empty. No file gives no rows.
    """
    path = Path(path)
    path = path if path.parent.name else RECORDED / path
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row({name: parse(text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def parse(text):
    """Turn the text of a cell into what it means.

    >>> parse("3"), parse("0.5"), parse("1 2.5"), parse("7 "), parse("moba"), parse("")
    (3, 0.5, (1, 2.5), (7,), 'moba', None)
    """
    if not text:
        return None
    try:
        numbers = tuple(map(number, text.split()))
    except ValueError:
        return text
    return numbers if " " in text else numbers[0]


def number(text):
    """Return an int or a float.

    Raises:
        ValueError: the text is neither, as versions and names are.
    """
    return int(text) if text.lstrip("-").isdecimal() else float(text)


def cell(value):
    """Write a value so that `parse` reads it.

    >>> cell([0.25, 1]), cell([7]), cell(None), cell(1 / 3), cell("moba")
    ('0.25 1', '7 ', '', '0.333333', 'moba')
    """
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        # A list of one is told from a number by the space behind it.
        return " ".join(map(cell, value)) + " " * (len(value) == 1)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def add(path, rows, first=FIRST):
    """Put the rows of one run into a file, in place of those it had of that run.

    Args:
        path: of the CSV file, there or not.
        rows: list of dicts with a column "run", all of the same run.
        first: the first columns.
    """
    run = rows[0]["run"]
    kept = [row for row in read(path) if row["run"] != run]
    write(path, [*kept, *rows], first)


def write(path, rows, first=FIRST):
    """Write rows as CSV, all of them or none."""
    columns = dict.fromkeys([*first, *(name for row in rows for name in row)])
    out = io.StringIO()
    file = csv.DictWriter(out, columns, lineterminator="\n", restval="")
    file.writeheader()
    file.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    write_atomically(Path(path), out.getvalue().encode())


def recorded(name, kinds=("h200", "h100", "small")):
    """Return the rows of `moba_lab/results/train_NAME_KIND.csv`.

    Args:
        name: of an experiment.
        kinds: the first of which there is such a file counts; the full size on a GPU
            goes before the small size on a CPU.

    Returns:
        list of Row, empty where nothing was recorded.

    >>> recorded("scaling", ["nowhere"])
    []
    """
    found = (read(f"train_{name}_{kind}.csv") for kind in kinds)
    return next(filter(None, found), [])


def source(rows):
    """Say on what hardware, with which versions and when rows were measured.

    >>> row = Row(device="H100", torch="2.11.0", precision="bf16", date="2026-11-24T1")
    >>> source([row, row])
    'H100, PyTorch 2.11.0, bf16, 2026-11-24'
    """
    parts = [
        dict.fromkeys(
            row["cpu"] if row["device"] == "CPU" else row["device"] for row in rows
        ),
        dict.fromkeys(f"PyTorch {row['torch']}" for row in rows),
        dict.fromkeys(row["precision"] for row in rows),
        sorted({row["date"].partition("T")[0] for row in rows}),
    ]
    return ", ".join(" and ".join(map(str, part)) for part in parts)

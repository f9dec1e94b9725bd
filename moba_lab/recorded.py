"""Read what `python -m moba_fast.bench` recorded, and say on what machine.

A row is a dict of the file's columns. Numbers are numbers, and a column that is empty,
or that an older file does not have, is None.
"""

import csv
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent / "results"
TEXTS = {
    *("dtype", "direction", "backend", "kernel", "status", "message", "peak_how"),
    *("dense_kernel", "dense_notes", "workload", "routing"),
    *("date", "device", "driver", "cpu", "python"),
    *("torch", "triton", "flash-attn", "flash-attn-4"),
}
# Measurements are compared only where all of these are equal.
MACHINE = ("device", "driver", "torch", "triton", "flash-attn", "flash-attn-4")
NAMES = {"torch": "PyTorch", "triton": "Triton"}


class Row(dict):
    """Hold the columns of one measurement; one that is not there is None."""

    def __missing__(self, column):
        return None


class Curve(NamedTuple):
    """Hold how a measured value grows with the length.

    Attributes:
        tokens: lengths of a sequence, ascending.
        middle: medians.
        low: lower quartiles.
        high: upper quartiles.
    """

    tokens: tuple
    middle: tuple
    low: tuple
    high: tuple


def read(path):
    """Read a recorded file.

    Args:
        path: the CSV file; a name without a folder is one of `moba_lab/results/`.

    Returns:
        list of Row, in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file; the message says how to make one.
        ValueError: if a column that must hold numbers holds something else, or the file
            has no row.

    Example:
        >>> read("bench_nowhere.csv")
        Traceback (most recent call last):
        FileNotFoundError: no measurements in bench_nowhere.csv; on a GPU, record them \
with python -m moba_fast.bench --suite h200 --csv PATH
    """
    path = Path(path)
    path = path if path.parent.name else FOLDER / path
    if not path.exists():
        raise FileNotFoundError(
            f"no measurements in {path.name}; on a GPU, record them with "
            f"python -m moba_fast.bench --suite h200 --csv PATH"
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            Row({name: parse(name, text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]
    if not rows:
        raise ValueError(f"{path.name} has no row: the run that wrote it was cut off")
    return rows


def parse(column, text):
    """Turn the text of a cell into a number, unless the column holds texts.

    Example:
        >>> parse("S", "8192"), parse("total_median_s", "0.25"), parse("gate_s", "")
        (8192, 0.25, None)
        >>> parse("triton", "3.6")
        '3.6'
    """
    if text in ("", None):
        return None
    if column in TEXTS:
        return text
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{column} must hold numbers, got {text!r}") from None
    return int(text) if text.lstrip("-").isdecimal() else number


def pick(rows, **wanted):
    """Return the rows that have these values in these columns.

    Example:
        >>> pick([Row(S=1, workload="A"), Row(S=2, workload="B")], workload="B")
        [{'S': 2, 'workload': 'B'}]
    """
    return [row for row in rows if all(row[x] == y for x, y in wanted.items())]


def program(row):
    """Name what a row measures: "triton", "torch", or "flash" for the rest.

    Example:
        >>> program(Row(kernel="aten", backend="auto"))
        'flash'
    """
    known = (row["kernel"], row["backend"])
    return next((name for name in ("triton", "torch") if name in known), "flash")


def source(rows):
    """Say on what hardware, with which versions and when rows were measured.

    Args:
        rows: list of Row.

    Raises:
        ValueError: if there are no rows, or they come from more than one machine.

    Example:
        >>> row = Row(device="H100", driver="580.1", torch="2.11", date="2026-11-24T13")
        >>> source([row, row])
        'H100, driver 580.1, PyTorch 2.11, 2026-11-24'
    """
    machines = {tuple(row[column] for column in MACHINE) for row in rows}
    if len(machines) != 1:
        raise ValueError(
            f"expected measurements from one machine, got {len(machines)}: "
            f"{sorted(map(str, machines))}; compare times of one run only"
        )
    [machine] = machines
    device, driver, *versions = machine
    words = [device, f"driver {driver}" if driver else rows[0]["cpu"]]
    words += [
        f"{NAMES.get(name, name)} {version}"
        for name, version in zip(MACHINE[2:], versions, strict=True)
        if version and (driver or name == "torch")
    ]
    days = sorted({row["date"].partition("T")[0] for row in rows})
    words.append(" to ".join(dict.fromkeys([days[0], days[-1]])))
    return ", ".join(word for word in words if word)


def curves(rows, what="time"):
    """Arrange rows as one curve per program, dense attention among them.

    Values are divided by the heads, and by the sequences of a pack, because lengths may
    have been measured with different numbers of them: both programs do the same for
    every head. Where a length was measured more than once the last row counts.

    Args:
        rows: list of Row of one direction; what has no result is left out.
        what: "time" in seconds, "graph", the seconds of a replay of a CUDA graph, or
            "memory" in bytes; the last two have no spread.

    Returns:
        dict from "dense" and the names of `program` to Curve, slowest to build first.

    Example:
        >>> row = Row(S=64, H=2, status="ok", kernel="triton", peak_bytes=10)
        >>> curves([row], "memory")["triton"]
        Curve(tokens=(64,), middle=(5.0,), low=(5.0,), high=(5.0,))
    """
    found = defaultdict(dict)
    for row in rows:
        # Dense attention may have gone well where the other call did not.
        for name in ("dense", program(row)) if row["status"] == "ok" else ("dense",):
            values = measured(row, name, what)
            if values[0] is not None:
                share = row["H"] * (row["batch"] or 1)
                found[name][row["S"]] = [value / share for value in values]
    order = [name for name in ("dense", "flash", "triton", "torch") if name in found]
    return {name: as_curve(found[name]) for name in order}


def measured(row, name, what):
    """Return median and quartiles of what a row holds about a program."""
    dense = name == "dense"
    if what != "time":
        column = {"memory": "peak_bytes", "graph": "graph_s"}[what]
        return [row[f"dense_{column}" if dense else column]] * 3
    prefix = "dense" if dense else "total"
    return [row[f"{prefix}_{x}_s"] for x in ("median", "quartile1", "quartile3")]


def as_curve(points):
    """Sort {tokens: (middle, low, high)} by length."""
    tokens = sorted(points)
    return Curve(tuple(tokens), *zip(*(points[n] for n in tokens), strict=True))


def faster_from(slow, fast):
    """Return the shortest measured length from which on a program is never slower.

    Nothing is said about lengths that were not measured, for either of the two.

    Args:
        slow: Curve.
        fast: Curve.

    Returns:
        tokens; None where the longest common length is slower, or there is none.

    Example:
        >>> dense = Curve((1, 2, 4), (1, 4, 16), (1, 4, 16), (1, 4, 16))
        >>> ours = Curve((1, 2, 4, 8), (3, 4, 5, 6), (3, 4, 5, 6), (3, 4, 5, 6))
        >>> faster_from(dense, ours)
        2
    """
    slow, fast = (dict(zip(*curve[:2], strict=True)) for curve in (slow, fast))
    result = None
    for tokens in sorted(slow.keys() & fast.keys(), reverse=True):
        if fast[tokens] > slow[tokens]:
            break
        result = tokens
    return result

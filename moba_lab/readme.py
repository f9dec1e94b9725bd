"""Write the README's tables: `python -m moba_lab.readme`, or `--check`."""

import argparse
import sys
from pathlib import Path

from moba_fast import backends
from moba_fast.backends import dtype_names
from moba_lab import recorded
from moba_lab.viz.words import SECONDS, length, scaled

RECORDED, ON_CPU = "bench_h100.csv", "bench_cpu.csv"
PATH = Path(__file__).resolve().parents[1] / "README.md"
FIRST = "<!-- {} written by python -m moba_lab.readme -->"
LAST = "<!-- end of {} -->"
HEADER = (
    *("backend", "needs", "dtypes", "largest D", "backward", "bit-identical"),
    *("`PagedKVCache`", "what attends"),
)


MEASURED = (
    *("workload", "tokens", "heads", "blocks", "topk", "fastest dense"),
    *('`"triton"`', "faster", "pairs promise", '`"flash"`'),
)


MEASURED_ON_CPU = (
    *("direction", "tokens", "heads", "blocks", "topk", "dense flash"),
    *("C++ kernels", "faster", "pairs promise", "flash operator"),
)


def measured(rows):
    """Lay out recorded workloads as a table in Markdown, times of lone calls.

    Args:
        rows: list of Row, see `moba_lab.recorded.read`. Random choices are shown, and
            of workload F, which has many lengths, 8K tokens with blocks of 512.

    Example: a workload that was recorded for one direction has one row.
        >>> row = recorded.Row(workload="A", routing="random", status="ok", S=2048)
        >>> row |= {"H": 4, "HK": 4, "block_size": 128, "topk": 3, "kernel": "triton"}
        >>> row |= {"direction": "forward", "dense_kernel": "cudnn", "work_ratio": 5}
        >>> row |= {"dense_median_s": 1, "total_median_s": 0.25, "speedup": 4.0}
        >>> measured([recorded.Row(row)]).splitlines()[-1]
        '| A forward | 2K | 4 | 128 | 3 | cudnn 1 s | 250 ms | 4.0x | 5.0x |  |'
    """
    lines = [MEASURED, ["---"] * len(MEASURED)]
    shown = [
        row
        for row in recorded.pick(rows, routing="random", kernel="triton", status="ok")
        if row["workload"] in (*"ABCDE", "F")
        and (row["workload"] != "F" or (row["S"], row["block_size"]) == (8192, 512))
    ]
    for row in sorted(shown, key=lambda row: (row["workload"], row["direction"])):
        lines.append(measured_cells(row, rows))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measured_cells(row, rows):
    """Return the cells of one row; `rows` may hold the other backend's, too."""
    shape = ("workload", "S", "direction", "routing", "block_size", "topk")
    other = recorded.pick(rows, **{x: row[x] for x in shape}, status="ok")
    flash = [r for r in other if recorded.program(r) == "flash"]
    grouped = "" if row["H"] == row["HK"] else f", {row['HK']} for keys"
    batch = f"{row['batch']} x " if (row["batch"] or 1) > 1 else ""
    return [
        f"{row['workload']} {row['direction']}",
        f"{batch}{length(row['S'])}",
        f"{row['H']}{grouped}",
        f"{row['block_size']:,}",
        str(row["topk"]),
        f"{row['dense_kernel']} {scaled(row['dense_median_s'], SECONDS)}",
        scaled(row["total_median_s"], SECONDS),
        f"{row['speedup']:.1f}x",
        f"{row['work_ratio']:.1f}x",
        scaled(flash[0]["total_median_s"], SECONDS) if flash else "",
    ]


def measured_on_cpu(rows):
    """Lay out what was recorded on a CPU as a table in Markdown.

    Args:
        rows: list of Row, see `moba_lab.recorded.read`.

    Example:
        >>> row = recorded.Row(status="ok", S=2048, H=4, block_size=128, topk=3)
        >>> row |= {"direction": "forward", "dense_median_s": 1, "speedup": 4.0}
        >>> row |= {"total_median_s": 0.25, "work_ratio": 5, "kernel": "compiled"}
        >>> measured_on_cpu([recorded.Row(row)]).splitlines()[-1]
        '| forward | 2K | 4 | 128 | 3 | 1 s | 250 ms | 4.0x | 5.0x |  |'
    """
    lines = [MEASURED_ON_CPU, ["---"] * len(MEASURED_ON_CPU)]
    for row in recorded.pick(rows, kernel="compiled", status="ok"):
        shape = {x: row[x] for x in ("direction", "S", "block_size", "topk")}
        other = recorded.pick(rows, **shape, kernel="cpu", status="ok")
        lines.append(
            [
                *(row["direction"], length(row["S"]), str(row["H"])),
                *(f"{row['block_size']:,}", str(row["topk"])),
                scaled(row["dense_median_s"], SECONDS),
                scaled(row["total_median_s"], SECONDS),
                *(f"{row['speedup']:.1f}x", f"{row['work_ratio']:.1f}x"),
                scaled(other[0]["total_median_s"], SECONDS) if other else "",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(found):
    """Lay out what every backend takes as a table in Markdown.

    Args:
        found: dict from name to Backend, as from `backends()`. What runs on this
            machine makes no difference.

    Example: a backend without support has a row that says so.
        >>> from moba_fast import Backend
        >>> rows = table({"next": Backend("next", False, "", ())}).splitlines()
        >>> rows[-1]
        '| `"next"` | not in this version |  |  |  |  |  |  |'
    """
    rows = [HEADER, ["---"] * len(HEADER)]
    for name, backend in found.items():
        for support in backend.support:
            rows.append([f'`"{name}"`', *cells(support)])
        if not backend.support:
            rows.append([f'`"{name}"`', "not in this version", *[""] * 6])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cells(support):
    """Return the cells of one row, all but the name of the backend."""
    return [
        support.needs,
        ", ".join(dtype_names(support)),
        str(support.largest_head or "any"),
        "yes" if support.backward else "no",
        support.deterministic,
        support.decoding,
        support.attends,
    ]


def with_table(text, name, written):
    """Put a table between the two markers of a text that name it.

    Raises:
        ValueError: if the text does not have each marker once, in this order.

    Example:
        >>> text = f"a {FIRST.format('x')}old{LAST.format('x')} b"
        >>> with_table(text, "x", "new").count("old")
        0
    """
    first, last = (marker.format(name) for marker in (FIRST, LAST))
    before, found, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (found and end) or first in rest or last in before + after:
        raise ValueError(f"expected {first!r}, then {last!r}, each once")
    return f"{before}{first}\n\n{written}\n{last}{after}"


def with_tables(text):
    """Put all tables into the text of the README."""
    text = with_table(text, "backends", table(backends()))
    tables = ("measurements", measured, RECORDED), ("cpu", measured_on_cpu, ON_CPU)
    for name, lay_out, file in tables:
        rows = recorded.read(file)
        source = f"\nMeasured on {recorded.source(rows)}.\n"
        text = with_table(text, name, lay_out(rows) + source)
    return text


def main(arguments=None, path=PATH):
    """Run the command line; return 1 where `--check` finds other tables."""
    parser = argparse.ArgumentParser(
        prog="python -m moba_lab.readme",
        description="Write the tables of backends and measurements into README.md.",
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args(arguments).check
    text = path.read_text(encoding="utf-8")
    expected = with_tables(text)
    if not check:
        path.write_text(expected, encoding="utf-8")
    elif text != expected:
        print(
            f"{path.name} does not have the tables of backends() and {RECORDED}; "
            f"run python -m moba_lab.readme",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

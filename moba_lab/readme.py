"""Write the README's table of backends: `python -m moba_lab.readme`, or `--check`."""

import argparse
import sys
from pathlib import Path

from moba_fast import backends
from moba_fast.backends import dtype_names

PATH = Path(__file__).resolve().parents[1] / "README.md"
FIRST = "<!-- written by python -m moba_lab.readme -->"
LAST = "<!-- end of what python -m moba_lab.readme writes -->"
HEADER = (
    *("backend", "needs", "dtypes", "largest D", "backward", "bit-identical"),
    *("`PagedKVCache`", "what attends"),
)


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


def with_table(text, written):
    """Put a table between the two markers of a text.

    Raises:
        ValueError: if the text does not have each marker once, in this order.

    Example:
        >>> with_table(f"a {FIRST}old{LAST} b", "new").count("old")
        0
    """
    before, first, rest = text.partition(FIRST)
    _, last, after = rest.partition(LAST)
    if not (first and last) or FIRST in rest or LAST in before + after:
        raise ValueError(f"expected {FIRST!r}, then {LAST!r}, each once")
    return f"{before}{first}\n\n{written}\n{last}{after}"


def main(arguments=None, path=PATH):
    """Run the command line; return 1 where `--check` finds another table."""
    parser = argparse.ArgumentParser(
        prog="python -m moba_lab.readme",
        description="Write the table of backends into README.md.",
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args(arguments).check
    text = path.read_text(encoding="utf-8")
    expected = with_table(text, table(backends()))
    if not check:
        path.write_text(expected, encoding="utf-8")
    elif text != expected:
        print(
            f"{path.name} does not have the table that backends() gives; "
            f"run python -m moba_lab.readme",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

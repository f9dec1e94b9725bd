"""Write the pictures and the page of what was measured, from the rows alone."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined

from moba_lab.card import write_atomically
from moba_lab.evaluate import tables
from moba_lab.evaluate.statuses import OK
from moba_lab.experiments.results import source
from moba_lab.viz.evaluations import loss_curves, needle_scores

TEMPLATE = Path(__file__).with_name("report.html")
NAMES = {"moba": "MoBA", "full": "full attention"}


@dataclass(frozen=True)
class Part:
    """A section of the page: what was measured, a picture or none, and a table."""

    title: str
    what: str
    table: tables.Table
    image: str = ""
    alt: str = ""


def write_report(rows, folder, hidden=0):
    """Write `report.html` and its pictures into a folder.

    Args:
        rows: list of `moba_lab.experiments.results.Row`, of one model; none, no page.
        folder: path.
        hidden: how many more rows the file holds, which are not on the page.

    Returns:
        path of the page, or None.
    """
    if not rows:
        return None
    figures = {"needle": needle_figure(rows), "loss": loss_figure(rows)}
    pictures = {
        name: (png(figure), figure.alt)
        for name, figure in figures.items()
        if figure is not None
    }
    for name, (data, _) in pictures.items():
        write_atomically(Path(folder) / f"{name}.png", data)
    page = Path(folder) / "report.html"
    write_atomically(page, report(rows, pictures, hidden).encode())
    return page


def report(rows, pictures, hidden=0):
    """Return the page as HTML that asks for nothing else.

    Args:
        rows: list of `Row`.
        pictures: dict from task to (bytes of a PNG file, its text).
        hidden: see `write_report`.
    """
    parts = [
        Part(title, what, table(of_task), *inline(*pictures.get(task, (b"", ""))))
        for task, (title, what, table) in tables.TASKS.items()
        if (of_task := [r for r in rows if r["task"] == task and r["status"] == OK])
    ]
    kinds = " and ".join(NAMES[kind] for kind in dict.fromkeys(tables.kinds(rows)))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=f"{Path(str(rows[0]['model'])).name}: {kinds}",
        summary=tables.summary(rows, hidden),
        parts=parts,
        problems=tables.problems(rows),
        answers=tables.answers(rows),
        facts=tables.facts(rows),
        commands=list(dict.fromkeys(row["command"] for row in rows)),
        footer=f"Measured {tables.dates(rows)}. The rows are in rows.csv beside this "
        f"page, with these facts in each of them.",
    )


def needle_figure(rows):
    """Draw the needles; None where there is none."""
    rows = [row for row in rows if row["task"] == "needle"]
    found = [row for row in rows if row["status"] == OK]
    if not found:
        return None
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    panels = {}
    for kind in dict.fromkeys(tables.kinds(rows)):
        scores = np.full((len(depths), len(lengths)), np.nan)
        for row in found:
            if row["attention"] == kind:
                at = depths.index(row["depth"]), lengths.index(row["length"])
                scores[at] = row["score"]
        panels[kind] = scores
    return needle_scores(panels, lengths, depths, about(found))


def loss_figure(rows):
    """Draw the loss by position; None where there is none."""
    rows = [row for row in rows if row["task"] == "loss" and row["status"] == OK]
    if not rows:
        return None
    curves = {
        (row["length"], row["attention"]): (row["part_losses"], row["part_bits"])
        for row in rows
    }
    return loss_curves(curves, about(rows))


def about(rows):
    """Name the model, the hardware and the versions."""
    return f"{Path(str(rows[0]['model'])).name}, {source(rows)}"


def inline(data, text):
    """Return the address that holds a picture, and its text; empty without one."""
    code = base64.b64encode(data).decode()
    return (f"data:image/png;base64,{code}" if data else ""), text


def png(figure):
    """Return a Figure as the bytes of a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()

"""Say what is to be measured, one row each, and which rows are there."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from moba_lab.evaluate.statuses import OK, OUT_OF_MEMORY
from moba_lab.experiments import results
from moba_lab.tasks.ruler import TASKS as RULER


@dataclass(frozen=True)
class Point:
    """One row.

    part: the depth of a needle, 0 to 1; the name of a RULER task; else empty.
    """

    task: str
    length: int
    attention: str
    part: str | float = ""

    @property
    def label(self):
        """Name for a progress bar."""
        part = f"{self.part:.2f}" if isinstance(self.part, float) else self.part
        words = self.task, part, self.attention, f"{self.length:,}"
        return " ".join(filter(None, words))

    @property
    def seed(self):
        """Numbers that tell its texts from others; attention is not among them."""
        name = hashlib.sha256(f"{self.task} {self.part}".encode()).digest()[:4]
        return [int.from_bytes(name, "big"), self.length]


def plan(options):
    """List the points of a command, short texts first.

    >>> from moba_lab.evaluate.options import Options
    >>> [p.label for p in plan(Options("m", ("loss",), (64,), ("full",)))]
    ['prefill full 64', 'loss full 64']
    """
    depths = np.linspace(0, 1, options.depths).tolist() if options.depths > 1 else [0.5]
    parts = {"prefill": [""], "loss": [""], "needle": depths, "ruler": list(RULER)}
    tasks = [task for task in parts if task in options.tasks or task == "prefill"]
    if not options.repeats:
        tasks.remove("prefill")
    return [
        Point(task, length, attention, part)
        for length in options.lengths
        for task in tasks
        for part in parts[task]
        for attention in options.attention
    ]


def digest_of(point, options, subject, haystack):
    """Return the short name of all that decides a row.

    Args:
        point: `Point`.
        options: `Options`.
        subject: `Subject`.
        haystack: name of the haystack's text.
    """
    how_many = {
        "needle": options.samples,
        "ruler": options.samples,
        "loss": options.windows,
        "prefill": options.repeats,
    }
    deciding = {
        "point": repr(point),
        "weights": subject.fingerprint,
        "tokenizer": len(subject.tokenizer),
        "precision": subject.place.precision,
        "device": subject.place.device,
        "settings": subject.settings if point.attention == "moba" else None,
        "how many": how_many[point.task],
        "seed": options.seed,
        "text": None if point.task == "ruler" else haystack,
    }
    text = json.dumps(deciding, sort_keys=True, default=list)
    return "x" + hashlib.sha256(text.encode()).hexdigest()[:12]


def run_name(point, subject):
    """Name a row, so that another model or other settings give another row."""
    words = [subject.name, point.label]
    if point.attention == "moba":
        s = subject.settings
        full = ",".join(map(str, s["full_layers"])) or "none"
        words += [f"{s['block_size']}x{s['topk']}", f"full:{full}", s["decode"]]
    return " ".join(words)


def there(options):
    """Return the statuses of the rows that are there, by (run, digest)."""
    rows = results.read(options.csv)
    return {(row["run"], row["digest"]): row["status"] for row in rows}


def is_done(status, retry):
    """Say whether a point need not be measured: it went well, or had no memory."""
    return status == OK or (status == OUT_OF_MEMORY and not retry)

"""Put rows into the tables and sentences of the page."""

from dataclasses import dataclass

from moba_lab.evaluate.options import SETTINGS
from moba_lab.evaluate.statuses import OK
from moba_lab.viz.words import BYTES, SECONDS, count, length, listed, scaled

KIND = {"moba": "MoBA", "full": "full"}
NONE = "–"


@dataclass(frozen=True)
class Table:
    """Heads of columns, and rows of cells; text: cells are words, not numbers."""

    heads: list
    rows: list
    text: bool = False


def kinds(rows):
    """List the ways to attend of rows, MoBA first."""
    return sorted({row["attention"] for row in rows}, reverse=True)


def pairs(rows):
    """Return the rows of every (length, attention), short texts and MoBA first."""
    found = {}
    for row in sorted(rows, key=lambda r: (r["length"], r["attention"] == "full")):
        found.setdefault((row["length"], row["attention"]), []).append(row)
    return found


def percent(rows, column="score"):
    """Return the mean of a column in percent."""
    values = [row[column] for row in rows if row[column] is not None]
    return f"{100 * sum(values) / len(values):.0f} %" if values else NONE


def needle(rows):
    """Tabulate the keys found and the exact answers."""
    heads = ["tokens", "attention", "keys found", "exact answers", "texts"]
    lines = []
    for (n, kind), found in pairs(rows).items():
        texts = sum(row["samples"] for row in found)
        shares = percent(found), percent(found, "exact")
        lines.append([length(n), KIND[kind], *shares, texts])
    return Table(heads, lines)


def ruler(rows):
    """Tabulate the scores of RULER's tasks and their mean."""
    columns = pairs(rows)
    heads = ["task", *(f"{length(n)} {KIND[kind]}" for n, kind in columns)]
    lines = []
    for name in dict.fromkeys(row["subtask"] for row in rows):
        of_task = [[r for r in x if r["subtask"] == name] for x in columns.values()]
        lines.append([name, *map(percent, of_task)])
    return Table(heads, [*lines, ["mean", *map(percent, columns.values())]])


def loss(rows):
    """Tabulate the loss per token and per byte."""
    heads = ["tokens", "attention", "nats per token", "perplexity", "bits per byte"]
    heads += ["in the first part", "in the last part", "windows"]
    lines = []
    for (n, kind), found in pairs(rows).items():
        for row in found:
            bits = row["bits_per_byte"], row["part_bits"][0], row["part_bits"][-1]
            nats = f"{row['loss']:.4f}{within(row['loss_se'])}"
            cells = nats, f"{row['perplexity']:.4g}", *map("{:.4g}".format, bits)
            lines.append([length(n), KIND[kind], *cells, row["windows"]])
    return Table(heads, lines)


def within(error):
    """Write a standard error behind a number."""
    return "" if error is None else f" ± {error:.4f}"


def prefill(rows):
    """Tabulate time and memory of the prefill, and how much faster MoBA is."""
    heads = ["tokens", "attention", "median", "middle half", "tokens/s"]
    heads += ["times as fast as full", "largest memory", "repeats"]
    lines, columns = [], pairs(rows)
    for (n, kind), found in columns.items():
        for row in found:
            low, high = (row[f"prefill_quartile{i}_s"] for i in (1, 3))
            cells = [
                scaled(row["prefill_median_s"], SECONDS),
                f"{scaled(low, SECONDS)} to {scaled(high, SECONDS)}",
                f"{row['tokens_per_s']:,.0f}",
                faster(row, columns.get((n, "full"))),
                scaled(row["peak_bytes"], BYTES) if row["peak_bytes"] else NONE,
            ]
            lines.append([length(n), KIND[kind], *cells, row["prefill_repeats"]])
    return Table(heads, lines)


def faster(row, full):
    """Say how many times as fast MoBA is as full attention, where both are there."""
    if row["attention"] == "full" or not full:
        return NONE
    return f"{full[0]['prefill_median_s'] / row['prefill_median_s']:.2f}"


def answers(rows):
    """Show what was wanted and written in the longest texts, one of each kind.

    Of needles the one that was found least often.
    """
    rows = [row for row in rows if row["status"] == OK and row["said"] is not None]
    shown = {}
    for row in sorted(rows, key=lambda r: (-r["length"], r["score"])):
        shown.setdefault((row["subtask"] or row["task"], row["attention"]), row)
    lines = [
        [task, length(row["length"]), KIND[kind], row["wanted"], row["said"]]
        for (task, kind), row in shown.items()
    ]
    heads = ["task", "tokens", "attention", "wanted", "written"]
    return Table(heads, sorted(lines, key=lambda line: line[0]), text=True)


def problems(rows):
    """List the points without a result, and why."""
    bad = [row for row in rows if row["status"] != OK]
    heads = ["task", "tokens", "attention", "status", "message"]
    lines = []
    for row in bad:
        part = row["subtask"] or ("" if row["depth"] is None else row["depth"])
        task = f"{row['task']} {part}".strip()
        kind = KIND[row["attention"]]
        lines.append([task, length(row["length"]), kind, row["status"], row["message"]])
    return Table(heads, lines, text=True)


def summary(rows, hidden=0):
    """Return sentences on the page's top; `hidden` rows are not on it."""
    good = [row for row in rows if row["status"] == OK]
    sizes = listed([length(n) for n in sorted({row["length"] for row in rows})])
    sentences = [
        f"{len(good)} of {len(rows)} points were measured, on texts of {sizes} tokens."
    ]
    moba = next((row for row in rows if row["attention"] == "moba"), None)
    if moba is not None:
        sentences.append(
            f"MoBA reads {moba['topk']} blocks of {moba['block_size']:,} tokens"
            f"{in_full(moba)}; generated tokens attend "
            f"{'in full' if moba['decode'] == 'full' else 'by MoBA'}."
        )
        warning = whole_texts([row["length"] for row in rows], moba)
        sentences += [f"Warning: {warning}"] if warning else []
    if hidden:
        sentences.append(
            f"rows.csv also holds {count(hidden, 'row')} of other commands, such as "
            f"those of other settings; they are not on this page."
        )
    return sentences


def whole_texts(lengths, settings):
    """Say at which lengths a query reads every block before it.

    Args:
        lengths: tokens.
        settings: block_size and topk of MoBA.

    Returns:
        a sentence; empty where no length is so short.

    >>> whole_texts([64, 4096], {"block_size": 32, "topk": 3})
    'in 64 tokens MoBA equals full attention, for 3 blocks of 32 hold the whole text.'
    """
    size, topk = settings["block_size"], settings["topk"]
    short = [length(n) for n in sorted(set(lengths)) if n <= size * topk]
    if not short:
        return ""
    return (
        f"in {listed(short)} tokens MoBA equals full attention, for {topk} blocks of "
        f"{size:,} hold the whole text."
    )


def scores(rows):
    """List one line for every task and length, its result for either attention."""
    good, lines = [row for row in rows if row["status"] == OK], []
    for task in TASKS:
        by_length = {}
        for (n, kind), found in pairs([r for r in good if r["task"] == task]).items():
            by_length.setdefault(n, []).append(f"{KIND[kind]} {score(task, found)}")
        lines += [f"{task}, {length(n)} tokens: {', '.join(x)}"
                  for n, x in by_length.items()]  # fmt: skip
    return lines


def score(task, rows):
    """Write the result of one task, length and attention."""
    if task == "loss":
        return f"{rows[0]['loss']:.4f}{within(rows[0]['loss_se'])} nats per token"
    if task == "prefill":
        return scaled(rows[0]["prefill_median_s"], SECONDS)
    return percent(rows)


def in_full(row):
    """Say which layers attend in full."""
    layers = row["full_layers"] or ()
    return f", and in full in layers {listed(layers)}" if layers else ""


def facts(rows):
    """Tabulate what the numbers depend on."""
    names = {
        "model": "model",
        "parameters": "parameters",
        "positions": "positions",
        "precision": "precision",
        "kernel": "attention in transformers",
        **{name: f"MoBA's {name.replace('_', ' ')}" for name in SETTINGS},
        "data": "text",
        "seed": "seed",
        "device": "device",
        "driver": "driver",
        "cpu": "processor",
        "cores": "cores",
        "threads": "threads",
        "python": "Python",
        "torch": "PyTorch",
        "transformers": "transformers",
        "tokenizers": "tokenizers",
        "triton": "Triton",
        "flash-attn": "flash-attn",
        "numpy": "NumPy",
        "peak_how": "memory",
    }
    lines = []
    for column, name in names.items():
        values = [row[column] for row in rows if row[column] is not None]
        if values:
            lines.append([name, listed(dict.fromkeys(map(shown, values)))])
    return Table([], lines, text=True)


def shown(value):
    """Write a value of a row."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def dates(rows):
    """Return the days on which rows were measured."""
    days = sorted({row["date"].partition("T")[0] for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


# Task: title, what was measured, table; in the order of the page.
TASKS = {
    "needle": (
        "Needle in a haystack",
        "A pass key stands in a line of its own at some depth of a real text, and the "
        "prompt ends with the beginning of that line. Found means that the greedy "
        "answer holds the key, exact that it begins with it as a whole word.",
        needle,
    ),
    "ruler": (
        "RULER's synthetic tasks",
        "Scores are RULER's: the share of the wanted strings that the greedy answer "
        "holds. The words are not RULER's, so compare scores with each other only. "
        "Below 4K tokens lists and chains are shorter.",
        ruler,
    ),
    "loss": (
        "Loss by position",
        "Windows of a text as it is. Per token says how well a model predicts its own "
        "tokens; bits per byte compares models whose tokenizers differ. Errors are "
        "standard errors over windows; parts are sixteenths of the context.",
        loss,
    ),
    "prefill": (
        "Prefill",
        "Reading a prompt of one text into an empty cache, with the logits of its last "
        "token. Times are medians after a call that warms up; the middle half lies "
        "between the quartiles.",
        prefill,
    ),
}

"""Measure moba_attention against PyTorch's dense attention, in one run.

python -m moba_fast.bench                    the suite of this machine
python -m moba_fast.bench --quick            the same with short inputs
python -m moba_fast.bench --csv PATH         where the numbers go

Inputs are random, so that queries choose blocks all over their past. "share" is the
speed-up over the fastest dense kernel, as a share of the work ratio: the (query, key)
pairs that causal attention reads over those that the chosen blocks have.
"""

import argparse
import csv
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from moba_fast.backends import kernel_of
from moba_fast.machine import describe_machine
from moba_fast.measure import Point, measure
from moba_fast.memory import out_of_memory
from moba_fast.timing import STAGES
from moba_fast.workspace import DEFAULT

SPREAD = ("median_s", "min_s", "quartile1_s", "quartile3_s", "repeats")
COLUMNS = (
    *("S", "H", "HK", "D", "block_size", "topk", "dtype", "direction"),
    *("backend", "kernel", "status", "message"),
    *(f"total_{name}" for name in SPREAD),
    *(f"{name}_s" for name in (*STAGES, "other", "backward")),
    *("peak_bytes", "peak_how", "pairs_full", "pairs_moba", "work_ratio"),
    *("dense_kernel", *(f"dense_{name}" for name in SPREAD), "dense_notes"),
    *("speedup", "share_of_work_ratio"),
    *("date", "device", "driver", "cpu", "cores", "threads", "python"),
    *("torch", "triton", "flash-attn", "flash-attn-4"),
)
ON_CPU = {"H": 4, "HK": 4, "D": 64, "dtype": "float32"}
ON_GPU = {"D": 128, "dtype": "bfloat16"}
KIBI, MEBI = 2**10, 2**20


def both(*points):
    """List every point forward, then forward and backward."""
    return [replace(p, backward=b) for p in points for b in (False, True)]


SUITES = {
    "cpu": [
        Point(32 * KIBI, block_size=512, topk=3, **ON_CPU),
        Point(64 * KIBI, block_size=512, topk=3, **ON_CPU),
        Point(32 * KIBI, block_size=128, topk=8, **ON_CPU),
        Point(32 * KIBI, block_size=512, topk=3, **ON_CPU, backward=True),
    ],
    "flash": both(
        *(
            Point(n * KIBI, 16, 16, block_size=512, topk=3, **ON_GPU)
            for n in (8, 16, 32, 64, 128)
        ),
        Point(32 * KIBI, 32, 8, block_size=512, topk=3, **ON_GPU),
        Point(128 * KIBI, 32, 8, block_size=2048, topk=8, **ON_GPU),
        Point(512 * KIBI, 16, 16, block_size=4096, topk=8, **ON_GPU),
        Point(MEBI, 32, 8, block_size=4096, topk=12, **ON_GPU),
    ),
}
# The same shapes, short: to see that everything runs, not to quote.
QUICK = {
    "cpu": [replace(p, S=p.S // 8) for p in SUITES["cpu"]],
    "flash": [replace(p, S=p.S // 8) for p in SUITES["flash"]],
}


def main(arguments=None):
    """Run the command line; return 0, or 2 where an argument does not fit."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    suite = options.suite or ("flash" if torch.cuda.is_available() else "cpu")
    device = "cpu" if suite == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"suite {suite!r} needs a CUDA device; there is none, so try cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    points = (QUICK if options.quick else SUITES)[suite]
    settings = options.backend, options.repeats, options.workspace_bytes
    try:
        kernel_for(points[0], device, options.backend)
    except ValueError as error:
        parser.error(str(error))
    rows = run(points, device, *settings, options.csv)
    print(table(rows))
    print(f"written to {options.csv}")
    return 0


def make_parser():
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m moba_fast.bench",
        description="Measure moba_attention against PyTorch's dense attention.",
    )
    parser.add_argument("--suite", choices=SUITES, help="default: that of this machine")
    parser.add_argument("--quick", action="store_true", help="short inputs, a minute")
    parser.add_argument("--backend", default="auto", help="as in moba_attention")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N")
    parser.add_argument("--threads", type=positive, metavar="N", help="of PyTorch")
    parser.add_argument(
        "--workspace-bytes", type=positive, default=DEFAULT, metavar="N"
    )
    parser.add_argument(
        "--csv", type=Path, default=Path("build/bench.csv"), metavar="PATH"
    )
    return parser


def positive(text):
    """Read an integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: if the text is none.

    Example:
        >>> positive("3")
        3
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer above 0, got {text!r}")
    return int(text)


def run(points, device, backend, repeats, workspace_bytes, path):
    """Measure points one after the other and write each row as soon as it is there.

    Args:
        points: list of Point.
        device: "cpu" or "cuda".
        backend: as in `moba_attention`.
        repeats: repetitions of every call.
        workspace_bytes: as in `moba_attention`.
        path: where the CSV goes; folders are made.

    Returns:
        list of dict, one row per point; a point for which memory ran out says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for point in (bar := tqdm(points, unit="point")):
            bar.set_description(str(point))
            row = measure_or_record(point, device, backend, repeats, workspace_bytes)
            writer.writerow(row)
            file.flush()
            rows.append(row)
    return rows


def measure_or_record(point, device, backend, repeats, workspace_bytes):
    """Return a point's row; where memory runs out, one that says so."""
    kernel = kernel_for(point, device, backend)
    row = {k: v for k, v in asdict(point).items() if k != "backward"}
    row |= {"direction": point.direction, "backend": backend, "kernel": kernel}
    row |= describe_machine(device)
    try:
        found = measure(point, device, backend, repeats, workspace_bytes)
    except (RuntimeError, MemoryError, ValueError) as error:
        if not out_of_memory(error):
            raise
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        found = {"status": "out of memory", "message": message}
    else:
        found["status"] = "ok"
    if device == "cuda":
        torch.cuda.empty_cache()
    return row | found


def kernel_for(point, device, backend):
    """Name the kernel that a point's call runs."""
    like = torch.empty(1, 1, point.D, dtype=getattr(torch, point.dtype), device=device)
    return kernel_of(backend, like)


def table(rows):
    """Lay out the rows for reading: one line per point, then one with its stages.

    Example:
        >>> row = {"S": 8, "H": 1, "HK": 1, "D": 4, "block_size": 2, "topk": 1}
        >>> row |= {"dtype": "float32", "direction": "forward", "kernel": "cpu"}
        >>> row |= {"status": "out of memory", "message": "no room"}
        >>> print(table([row])[-22:])
        out of memory: no room
    """
    lines = [f"{'point':<50}{'kernel':<14}result"]
    for row in rows:
        fields = {name: row[name] for name in Point.__dataclass_fields__ if name in row}
        point = Point(**{**fields, "backward": "backward" in row["direction"]})
        start = f"{point!s:<50}{row['kernel']:<14}"
        if row["status"] != "ok":
            lines.append(f"{start}{row['status']}: {row['message']}")
            continue
        lines += [start + result_line(row), f"{'':<50}{'':<14}{stages_line(row)}"]
    return "\n".join(lines)


def result_line(row):
    """Say how fast a call was, and how fast the fastest dense kernel."""
    line = f"{in_words(row['total_median_s'])} ({row['total_repeats']} runs)"
    if "dense_kernel" in row:
        line += (
            f", {row['dense_kernel']} {in_words(row['dense_median_s'])}: "
            f"{row['speedup']:.2f}x of {row['work_ratio']:.2f}x, share "
            f"{row['share_of_work_ratio']:.0%}"
        )
    if "peak_bytes" in row:
        line += f", peak {row['peak_bytes'] / MEBI:,.0f} MiB"
    return line


def stages_line(row):
    """List the stages that took time."""
    names = [*STAGES, "other", "backward"]
    times = {name: row.get(f"{name}_s", 0.0) for name in names}
    return ", ".join(f"{name} {in_words(t)}" for name, t in times.items() if t)


def in_words(seconds):
    """Write a time with the unit that suits it.

    Example:
        >>> in_words(0.0123), in_words(1.5)
        ('12.3 ms', '1.50 s')
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


if __name__ == "__main__":
    sys.exit(main())

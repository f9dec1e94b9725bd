"""Measure moba_attention against dense attention, in one run.

python -m moba_fast.bench                      the suite of this machine
python -m moba_fast.bench --quick              the same with short inputs
python -m moba_fast.bench --csv PATH           where the numbers go
python -m moba_fast.bench --suite h200         all workloads: twenty minutes or so
python -m moba_fast.bench --suite h200 --workload C,D,E --csv PATH --append
                                               some of them, added to what is there
python -m moba_fast.bench --suite kernels      backend "flash" with every kernel that it
                                               can run here: aten, flash-attn packages
python -m moba_fast.bench --backend triton,flash:flash-attn
                                               these two, taking turns

Dense attention is PyTorch's and that of the flash-attn packages that are installed.
By estimate workloads A, B, C and lengths take two to five minutes each on an H100, most
of it for dense attention, and D, E and F together two. --patience bounds the seconds of
a call with its repetitions.

"share" is the speed-up over the fastest dense kernel, as a share of the work ratio: the
(query, key) pairs that causal attention reads over those that the chosen blocks have.
Dense attention does not depend on the choice of blocks: a point that differs from an
earlier one in its routing only takes over that one's dense times.
"""

import argparse
import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from moba_fast.bench_table import report
from moba_fast.ceilings import ceilings
from moba_fast.machine import describe_machine
from moba_fast.measure import Settings, kernel_for, measure
from moba_fast.stages import STAGES
from moba_fast.timing import PATIENCE
from moba_fast.workloads import BACKENDS, DEVICES, QUICK, SUITES
from moba_fast.workspace import DEFAULT

SPREAD = ("median_s", "min_s", "quartile1_s", "quartile3_s", "repeats")
COLUMNS = (
    *("workload", "S", "batch", "H", "HK", "D", "block_size", "topk", "dtype"),
    *("routing", "direction", "backend", "kernel", "status", "message"),
    *(f"total_{name}" for name in SPREAD),
    *(f"{name}_s" for name in (*STAGES, "other", "backward", "backward_other", "host")),
    "graph_s",
    *(f"{name}_{x}" for name in (*STAGES, "backward") for x in ("flops", "bytes")),
    *("peak_bytes", "peak_how", "output_bytes"),
    *("pairs_full", "pairs_moba", "work_ratio"),
    *("dense_kernel", *(f"dense_{name}" for name in SPREAD)),
    *(
        "dense_peak_bytes",
        "dense_graph_s",
        "dense_notes",
        "speedup",
        "share_of_work_ratio",
    ),
    *("copy_bytes_per_s", "matmul_flops_per_s"),
    *("date", "device", "driver", "cpu", "cores", "threads", "python"),
    *("torch", "triton", "flash-attn", "flash-attn-4"),
)


def main(arguments=None):
    """Run the command line.

    Returns:
        0; 1 where a call failed for another reason than memory. The command exits with
        2 where an argument does not fit.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    suite = options.suite or ("h200" if torch.cuda.is_available() else "cpu")
    device = options.device or DEVICES[suite]
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"suite {suite!r} needs a CUDA device; there is none, so try cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        points = choose((QUICK if options.quick else SUITES)[suite], options.workload)
        if options.backend:
            for name in options.backend.split(","):
                kernel_for(points[0], device, name)
            points = [replace(point, backends=()) for point in points]
        if options.append:
            check_columns(options.csv)
    except ValueError as error:
        parser.error(str(error))
    backends = options.backend.split(",") if options.backend else BACKENDS[suite]
    settings = Settings(options.repeats, options.patience, options.workspace_bytes)
    rows = run(points, device, backends, settings, options.csv, options.append)
    print(f"written to {options.csv}")
    return int(any(row["status"] == "failed" for row in rows))


def make_parser():
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m moba_fast.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=SUITES, help="default: that of this machine")
    parser.add_argument(
        "--workload", metavar="NAMES", help="those of the suite to run, as in A,B"
    )
    parser.add_argument("--quick", action="store_true", help="short inputs, a minute")
    parser.add_argument(
        "--backend",
        metavar="NAMES",
        help="as in moba_attention; default: all that the suite compares",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: that of the suite"
    )
    parser.add_argument("--repeats", type=positive, default=5, metavar="N")
    parser.add_argument(
        "--patience",
        type=positive,
        default=int(PATIENCE),
        metavar="SECONDS",
        help="after which a call is not repeated, %(default)s by default",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of PyTorch")
    parser.add_argument(
        "--workspace-bytes", type=positive, default=DEFAULT, metavar="N"
    )
    parser.add_argument(
        "--csv", type=Path, default=Path("build/bench.csv"), metavar="PATH"
    )
    parser.add_argument(
        "--append", action="store_true", help="keep the rows that are in the CSV"
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


def choose(points, names):
    """Return the points of some workloads, in the order of the suite.

    Args:
        points: list of Point.
        names: workloads, separated by commas; None: all points.

    Raises:
        ValueError: if the suite has no such workload.
    """
    if names is None:
        return points
    known = {point.workload: None for point in points if point.workload}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(
            f"this suite has no workload {unknown[0]!r}: expected some of "
            f"{','.join(known) or 'none'}, got {names!r}"
        )
    return [point for point in points if point.workload in wanted]


def check_columns(path):
    """See to it that rows can be added to a CSV.

    Raises:
        ValueError: if it has other columns.
    """
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        found = tuple(next(csv.reader(file), ()))
    if found and found != COLUMNS:
        names = sorted(set(found) ^ set(COLUMNS)) or "their order"
        raise ValueError(
            f"expected the columns of this version in {path}, got others ({names}): "
            f"name another file, or leave out --append to replace it"
        )


def run(points, device, backends, settings, path, append=False):
    """Measure points one after the other and write each row as soon as it is there.

    Args:
        points: list of Point.
        device: "cpu" or "cuda".
        backends: names as in `moba_attention`, for points that name none.
        settings: Settings.
        path: where the CSV goes; folders are made.
        append: whether rows that are there stay.

    Returns:
        list of dict, one row per point and backend; a point for which memory ran out
        says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    empty = not (append and path.exists() and path.stat().st_size)
    rows, dense, best = [], {}, ceilings(device)
    with path.open("w" if empty else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if empty:
            writer.writeheader()
        # A bar is for somebody who looks on.
        for point in (bar := tqdm(points, unit="point", disable=None)):
            bar.set_description(str(point))
            start, same = time.perf_counter(), replace(point, routing="", backends=())
            machine = describe_machine(device)
            names = point.backends or backends
            found, dense[same] = measure(
                point, device, names, settings, dense.get(same)
            )
            rows += [row | best | machine for row in found]
            writer.writerows(rows[-len(found) :])
            file.flush()
            if device == "cuda":
                torch.cuda.empty_cache()
            bar.write("\n".join(map(report, rows[-len(found) :])))
            bar.write(f"  measured in {time.perf_counter() - start:.1f} s")
            # A run that is cut off has told what it had measured.
            sys.stdout.flush()
    return rows


if __name__ == "__main__":
    sys.exit(main())

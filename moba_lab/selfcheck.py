"""Check every kernel of `moba_fast` that runs on this machine against the reference.

`python -m moba_fast.selfcheck` runs all of it. Results are measured by the agreement
policy of `moba_lab.agree` against `moba_ref` in float64, fed with the same rounded
inputs; the sizes are what NumPy can do in seconds.
"""

import argparse
import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from moba_fast.bench import positive
from moba_fast.machine import describe_machine
from moba_lab.check_cases import CASES, Check, check_case, targets
from moba_lab.check_special import special_checks


def all_checks():
    """List (function, arguments) of every check that makes sense on this machine."""
    planned = [
        (check_case, (target, case, dtype))
        for target in targets()
        for dtype in target.dtypes
        for case in CASES
    ]
    return planned + special_checks(targets())


def guarded(function, target, *rest):
    """Run a check; an error of any kind is a check that failed.

    Returns:
        list of Check.
    """
    try:
        with target.forced():
            return function(target, *rest)
    except Exception as error:
        *case, dtype = rest
        name = function.__name__.removeprefix("check_").replace("_", " ")
        what = case[0].name if case else name
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [Check(what, str(target), dtype, np.nan, 0.0, False, message)]


def run_checks(checks, jobs):
    """Run checks, some at a time; a kernel that one has compiled is there for all.

    Args:
        checks: some of `all_checks`, by their places in it.
        jobs: how many processes share the work; 1 is this one alone.

    Yields:
        list of Check, in the order of the checks.
    """
    if jobs == 1:
        yield from map(run_check, checks)
        return
    # Processes with as many threads as there are cores would get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A forked process cannot use the GPU that its parent has used.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_check, checks)


def planned(kernels=None):
    """Return the places in `all_checks` of the checks of some kernels.

    Args:
        kernels: names separated by commas; None: all that run here.

    Raises:
        ValueError: if one of them does not run here.
    """
    of = [target.kernel for _, (target, *_) in all_checks()]
    wanted = set(of) if kernels is None else set(kernels.split(","))
    if unknown := wanted.difference(of):
        raise ValueError(
            f"expected some of the kernels that run here, "
            f"{','.join(dict.fromkeys(of))}, got {', '.join(sorted(unknown))}"
        )
    return [place for place, kernel in enumerate(of) if kernel in wanted]


def run_check(index):
    """Run one of `all_checks`, named by a number that can go to another process."""
    function, given = all_checks()[index]
    return guarded(function, *given)


def main(arguments=None):
    """Run the command line; return 1 where a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m moba_fast.selfcheck",
        description="Check every kernel that runs here against the reference.",
    )
    parser.add_argument("--csv", type=Path, metavar="PATH", help="record the table")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="processes; default: 1"
    )
    parser.add_argument(
        "--kernel", metavar="NAMES", help="those to check, as in flash-attn,aten"
    )
    options = parser.parse_args(arguments)
    try:
        places = planned(options.kernel)
    except ValueError as error:
        parser.error(str(error))
    checks = []
    print(f"{'what':<40}{'kernel':<16}{'dtype':<10}{'error':>9}{'allowed':>9}  ok")
    running = run_checks(places, options.jobs)
    for found in tqdm(running, total=len(places), unit="check", file=sys.stderr):
        for check in found:
            checks.append(check)
            tqdm.write(line(check), file=sys.stdout)
    if options.csv:
        write_csv(checks, options.csv)
    failed = [check for check in checks if not check.ok]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
    return 1 if failed else 0


def line(check):
    """Lay out one check for reading."""
    start = f"{check.what:<40}{check.kernel:<16}{check.dtype:<10}"
    numbers = (
        f"{check.error:9.1e}{check.allowed:9.1e}  {'ok' if check.ok else 'FAILED'}"
    )
    return start + numbers + (f"  {check.message}" if check.message else "")


def write_csv(checks, path):
    """Record checks with hardware and versions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = describe_machine(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*Check.__dataclass_fields__, *machine])
        writer.writeheader()
        writer.writerows(asdict(check) | machine for check in checks)

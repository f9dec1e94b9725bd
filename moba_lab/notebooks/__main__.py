"""Run notebooks, and write their pages or store their outputs.

python -m moba_lab.notebooks                 run all, write pages to build/site/
python -m moba_lab.notebooks --write 02      run one, store its clean outputs
python -m moba_lab.notebooks --check         only check the rules of notebooks
"""

import argparse
import os
import sys
from pathlib import Path

import nbformat
from tqdm import tqdm

from moba_lab.notebooks.clean import clean, runs
from moba_lab.notebooks.rules import check
from moba_lab.notebooks.run import execute, stored
from moba_lab.notebooks.site import write_site

ROOT = Path(__file__).resolve().parents[2]


def main(arguments=None):
    """Run the command line; return 1 where a notebook failed or broke a rule."""
    options = _parse(arguments)
    paths = sorted(options.folder.glob("*.ipynb"))
    try:
        chosen = choose(paths, options.names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        return _report_rules(chosen)
    done = run_all(chosen, options.timeout)
    if options.write:
        for run in done.values():
            if not run.error:
                store(run)
        _report_rules([path for path in chosen if not done[path].error])
    index = write_site([done.get(p) or stored(p) for p in paths], options.site)
    failed = [run for run in done.values() if run.error]
    for run in failed:
        print(f"\n{run.error}", file=sys.stderr)
    print(f"{len(done) - len(failed)} of {len(done)} notebooks ran; pages: {index}")
    return 1 if failed else 0


def choose(paths, names):
    """Return the notebooks that were named, all of them where none was.

    Args:
        paths: the notebooks there are.
        names: file names, stems or their beginnings, such as ``02``.

    Raises:
        ValueError: there are no notebooks, or a name fits none.

    >>> choose([Path("01_a.ipynb"), Path("02_b.ipynb")], ["02"])
    [PosixPath('02_b.ipynb')]
    """
    if not paths:
        raise ValueError("expected notebooks (*.ipynb), found none: check --folder")
    chosen = set() if names else set(paths)
    for name in names:
        fitting = [p for p in paths if p.name.startswith(Path(name).name)]
        if not fitting:
            there = ", ".join(path.stem for path in paths)
            raise ValueError(f"no notebook is called {name!r}: there are {there}")
        chosen.update(fitting)
    return [path for path in paths if path in chosen]


def run_all(paths, timeout):
    """Run notebooks one after the other under one bar of their cells.

    Returns:
        ``{path: Run}``; a failing notebook does not stop the others.
    """
    cells = sum(runs(cell) for path in paths for cell in nbformat.read(path, 4).cells)
    done = {}
    with tqdm(total=cells, unit="cell") as bar:
        for path in paths:
            bar.set_description(path.stem)
            run = execute(path, timeout=timeout, on_cell=bar.update)
            done[path] = run
            result = "FAILED" if run.error else "passed"
            bar.write(f"{path.stem}: {result} in {run.seconds:.1f} s", sys.stdout)
    return done


def store(run):
    """Write a run's clean outputs into its file, all of it or nothing."""
    for cell, text in run.stderr.items():
        print(f"{run.path.stem}: dropped stderr of cell {cell!r}:\n{text}")
    notebook = clean(run.notebook, run.path.resolve().parents[1])
    partial = run.path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    os.replace(partial, run.path)


def _report_rules(paths):
    broken = [problem for path in paths for problem in check(path)]
    for problem in broken:
        print(problem)
    return 1 if broken else 0


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m moba_lab.notebooks", description="Run the notebooks."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="such as 02 or 02_gate"
    )
    parser.add_argument("--write", action="store_true", help="store clean outputs")
    parser.add_argument("--check", action="store_true", help="check rules, run nothing")
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks")
    parser.add_argument("--site", type=Path, default=ROOT / "build" / "site")
    parser.add_argument(
        "--timeout", type=int, default=600, metavar="S", help="seconds for one cell"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Measure a model: `python -m moba_lab.evaluate --help`."""

import sys

from moba_lab.evaluate.options import read_options

FAILED, WRONG, INTERRUPTED = 1, 2, 3


def main(argv=None):
    """Run the command line; return the exit status."""
    options = read_options(sys.argv[1:] if argv is None else argv)
    # Imported late, so that a wrong command is told at once.
    from moba_lab.evaluate.points import OK
    from moba_lab.evaluate.report import write_report
    from moba_lab.evaluate.run import Bench, rows_of, run_all
    from moba_lab.evaluate.subject import load
    from moba_lab.evaluate.texts import read_haystack
    from moba_lab.place import choose_place

    try:
        place = choose_place(options.device, options.precision)
        bench = Bench(load(options, place), read_haystack(options.data), options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    try:
        statuses = run_all(bench)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    finally:
        write_report(rows_of(bench), options.out)
    good = statuses.count(OK)
    print(f"{good} of {len(statuses)} points are in {options.csv}")
    return 0 if good == len(statuses) else FAILED


if __name__ == "__main__":
    sys.exit(main())

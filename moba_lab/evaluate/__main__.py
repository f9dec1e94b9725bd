"""Measure a model: `python -m moba_lab.evaluate --help`."""

import sys

from moba_lab.evaluate.options import read_options
from moba_lab.evaluate.statuses import INTERRUPTED
from moba_lab.evaluate.supervise import supervise


def main(argv=None):
    """Run the command line; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = read_options(argv)
    if options.supervisor is None:
        return supervise(argv, options)
    try:
        # Imported late: the process that only supervises is to stay small.
        from moba_lab.evaluate.run import work

        return work(options)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

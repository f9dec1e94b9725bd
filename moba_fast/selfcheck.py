"""Check every kernel that runs here against the reference: the command.

python -m moba_fast.selfcheck                print a table, status 1 where a check fails
python -m moba_fast.selfcheck --csv PATH     record it, with hardware and versions
python -m moba_fast.selfcheck --jobs 8       in as many processes: kernels that have to
                                             be compiled first take most of the time
python -m moba_fast.selfcheck --kernel aten  only some kernels, separated by commas

The checks are `moba_lab.selfcheck`: they compare with `moba_ref` by the policy of
`moba_lab.agree`, so that there is one reference and one policy. This package imports
neither of the two; only the command stands here, where its users look for it.
"""

import importlib
import sys


def main(arguments=None):
    """Run the checks where the other two packages are installed.

    Returns:
        0 where all checks passed, 1 where one failed, 2 where they cannot run.
    """
    try:
        checks = importlib.import_module("moba_lab.selfcheck")
    except ModuleNotFoundError as error:
        print(
            f"the checks compare with the packages moba_ref and moba_lab, but "
            f"{error.name} is not installed; install the whole project with "
            f"`pip install -e .` in its folder",
            file=sys.stderr,
        )
        return 2
    return checks.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Run another program with attention "moba" registered.

python -m moba_fast.hf [--block-size N] [--topk N] ... lm_eval --model hf ...
"""

import argparse
import runpy
import sys
from pathlib import Path

from moba_fast.hf import register
from moba_fast.hf.settings import DECODE


def layers(text):
    """Read a list of layers.

    Example:
        >>> layers("0,-1"), layers("")
        ([0, -1], [])
    """
    return [int(x) for x in text.split(",") if x]


def main(arguments):
    """Register "moba", then run a module or a script as if Python had been told to.

    Args:
        arguments: what stands behind `python -m moba_fast.hf`.
    """
    parser = argparse.ArgumentParser(prog="python -m moba_fast.hf", description=__doc__)
    unset = {"default": argparse.SUPPRESS}
    text = "for models whose configuration has no settings"
    parser.add_argument(
        "--block-size", type=int, help=f"tokens per block, {text}", **unset
    )
    parser.add_argument("--topk", type=int, help="blocks per query", **unset)
    parser.add_argument(
        "--full-layers",
        type=layers,
        help="layers that attend in full, as in --full-layers=-3,-2,-1",
        **unset,
    )
    parser.add_argument(
        "--decode", choices=DECODE, help="attention of generated tokens", **unset
    )
    parser.add_argument("program", help="a module such as lm_eval, or a script .py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    given = vars(parser.parse_args(arguments))
    program, rest = given.pop("program"), given.pop("arguments")
    register(**given)
    sys.argv = [program, *rest]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])

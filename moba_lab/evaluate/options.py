"""Read the command line of `python -m moba_lab.evaluate`."""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

TASKS = ("needle", "ruler", "loss", "prefill")
ATTENTION = ("moba", "full")
MODULE = "moba_lab.evaluate"
# First argument of the process that measures; the next one is who started it.
WORKER = "--worker"
SETTINGS = ("block_size", "topk", "full_layers", "decode")


@dataclass(frozen=True)
class Options:
    """What is measured and how; see `make_parser`, whose names these are.

    settings: those of MoBA that were given, see `moba_fast.hf.enable`.
    command: what the rows name.
    supervisor: the process that started this one, see `supervise`.
    """

    model: str
    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (1024, 4096)
    attention: tuple[str, ...] = ATTENTION
    settings: dict | None = None
    tokenizer: str | None = None
    data: str | None = None
    depths: int = 5
    samples: int = 4
    windows: int = 8
    repeats: int = 5
    seed: int = 0
    out: Path = Path("build/evaluate")
    device: str = "auto"
    precision: str = "auto"
    retry: bool = False
    quiet: bool = False
    command: str = ""
    supervisor: int | None = None

    @property
    def csv(self):
        """File of the rows."""
        return self.out / "rows.csv"

    @property
    def pending(self):
        """File of what is being measured, see `supervise`."""
        return self.out / "pending.json"


def one_of(known):
    """Return a function that reads a list of known names.

    >>> one_of(TASKS)("loss,needle")
    ('loss', 'needle')
    """

    def read(text):
        names = tuple(dict.fromkeys(filter(None, text.split(","))))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"expected some of {','.join(known)}, got {(unknown or [text])[0]!r}"
            )
        return names

    return read


def tokens(text):
    """Read lengths, shortest first.

    >>> tokens("4096,1024")
    (1024, 4096)
    """
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 1 for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected numbers of tokens, as in 1024,4096, got {text!r}"
        )
    return tuple(sorted(set(map(int, parts))))


def layers(text):
    """Read a list of layers, empty for none.

    >>> layers("-2,-1"), layers("")
    ([-2, -1], [])
    """
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers of layers, as in -2,-1, got {text!r}"
        ) from None


def count(text):
    """Read a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more, got {text!r}")
    return int(text)


def some(text):
    """Read a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number, 1 or more, got {text}")
    return int(text)


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Measure a causal language model of transformers with MoBA and "
        "with full attention. The same command again measures only what is missing.",
        epilog="Exit status: 0 everything was measured, 1 something failed or ran out "
        "of memory, 2 the command was wrong, 3 it was interrupted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder of save_pretrained, or a hub name")
    add("--tokenizer", help="the same, where the tokenizer lies elsewhere")
    add(
        "--tasks",
        type=one_of(TASKS),
        default=",".join(TASKS),
        help="prefill is measured along with every other task",
    )
    add("--lengths", type=tokens, default="1024,4096", help="tokens, with commas")
    add("--attention", type=one_of(ATTENTION), default=",".join(ATTENTION))
    own = "what the model's configuration says, else as in the paper's 8B model"
    moba = parser.add_argument_group("MoBA", f"without these: {own}")
    unset = {"default": argparse.SUPPRESS}
    moba.add_argument("--block-size", type=some, help="tokens per block", **unset)
    moba.add_argument("--topk", type=some, help="blocks per query", **unset)
    moba.add_argument(
        "--full-layers",
        type=layers,
        help="layers that attend in full, as in --full-layers=-2,-1",
        **unset,
    )
    moba.add_argument(
        "--decode",
        choices=("full", "moba"),
        help="attention of generated tokens",
        **unset,
    )
    add("--data", help="folder of text files; without it, Python's standard library")
    add("--depths", type=some, default=5, help="places of the needle, top to bottom")
    add("--samples", type=some, default=4, help="texts of every depth and RULER task")
    add("--windows", type=some, default=8, help="texts of the loss, fewer if need be")
    add("--repeats", type=count, default=5, help="of the prefill; 0 leaves it out")
    add("--seed", type=count, default=0)
    add("--out", type=Path, default=Path("build/evaluate"), help="rows and report")
    add("--device", default="auto", help='"cpu", "cuda", or "auto"')
    add("--precision", default="auto", help='"fp32", "bf16", or "auto": bf16 on a GPU')
    add("--retry", action="store_true", help="try again what ran out of memory")
    add("--quiet", action="store_true", help="show no progress bar")
    return parser


def read_options(argv):
    """Return the `Options` of a command line.

    >>> read_options(["--model", "m", "--tasks", "loss", "--topk", "3"]).settings
    {'topk': 3}
    """
    supervisor = None
    if argv[:1] == [WORKER]:
        supervisor, argv = int(argv[1]), argv[2:]
    given = vars(make_parser().parse_args(argv))
    settings = {name: given.pop(name) for name in SETTINGS if name in given}
    command = shlex.join(["python", "-m", MODULE, *argv])
    return Options(**given, settings=settings, command=command, supervisor=supervisor)

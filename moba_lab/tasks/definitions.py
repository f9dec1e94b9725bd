"""Source code, a name, and the line that defines it."""

import re

import numpy as np

from moba_lab.data import rename_names
from moba_lab.tasks.example import Example

DEFINITION = re.compile(rb"^[ ]*(?:def|class)[ ]+(\w{4,})\b.*$", re.MULTILINE)
LONGEST = 72
QUESTION = b"# where is "
TRIES = 1000


class Definitions:
    """Ask for the line in which a name of a piece of source code is defined.

    Names get new spellings, the same wherever they stand, so that nobody knows the
    line by heart (`moba_lab.data.rename_names`).

    Args:
        haystack: `Haystack` of source code.
        rename: share of the names with a new spelling.
    """

    def __init__(self, haystack, rename=0.5):
        self.haystack, self.rename = haystack, rename

    def __call__(self, rng, length):
        """Make an `Example` of at most length bytes.

        Raises:
            ValueError: pieces of this length hold no definition that can be asked for.
        """
        room = length - len(QUESTION) - LONGEST // 2 - LONGEST - len(b"\n\n")
        for _ in range(TRIES if room > 0 else 0):
            piece = np.frombuffer(self.haystack.draw(rng, room), np.uint8)
            code = rename_names(piece, rng, self.rename).tobytes()
            found = find_definitions(code)
            if found:
                return ask(code, found[rng.integers(len(found))])
        raise ValueError(
            f"expected pieces of source code that define a function or a class, got "
            f"none in {length} bytes; use a larger length or a haystack of Python"
        )


def find_definitions(code):
    r"""Find the lines that alone define their name and have at most `LONGEST` bytes.

    Args:
        code: bytes.

    Returns:
        list of `re.Match`; group 1 is the name.

    >>> [m[1] for m in find_definitions(b"def once(): ...\ndef also(x):\n  pass\n")]
    [b'once', b'also']
    >>> find_definitions(b"def twice(): ...\nclass twice: ...\n")
    []
    """
    lines = list(DEFINITION.finditer(code))
    names = [line[1] for line in lines]
    return [
        line
        for line in lines
        if names.count(line[1]) == 1
        and len(line[0].strip()) <= LONGEST
        and len(line[1]) <= LONGEST // 2
    ]


def ask(code, line):
    r"""Ask for a definition.

    Args:
        code: bytes, the text of the match.
        line: `re.Match` of `DEFINITION`.

    Returns:
        `Example`; the answer is the line without its indentation.

    >>> code = b"class Tree:\n    def grow(self):\n        pass\n"
    >>> example = ask(code, find_definitions(code)[1])
    >>> example.prompt[len(code):], example.answer
    (b'# where is grow\n', b'def grow(self):\n')
    """
    definition = line[0].strip()
    first = line.start() + line[0].index(definition)
    return Example(
        prompt=code + QUESTION + line[1] + b"\n",
        answer=definition + b"\n",
        references=(definition,),
        needles=((first, first + len(definition)),),
    )

"""Turn the needle and RULER's tasks into text that a tokenizer measures.

The structure is that of `moba_lab.tasks`; the words of RULER's tasks are its English
ones. A space at the end of a prompt goes to the answer, for most tokenizers write a
word together with the space before it.
"""

from dataclasses import dataclass

import numpy as np

from moba_lab.data import folder_texts, load_corpus
from moba_lab.tasks.example import fit
from moba_lab.tasks.haystack import Haystack
from moba_lab.tasks.needle import DIGITS, plant
from moba_lab.tasks.ruler import SHORT, TASKS
from moba_lab.tasks.wording import ENGLISH

# Tokens that an answer may have beyond the wanted ones.
SLACK = 16
# Below that RULER's lists of words would not fit; RULER itself begins here.
WHOLE = 4096
# How much longer than on average a piece of text is cut, in bytes per token.
ROOM = 3


@dataclass(frozen=True)
class Question:
    """A prompt, the wanted answer, and the strings by which a free answer is scored."""

    prompt: str
    answer: str
    references: tuple[str, ...]


def as_text(example):
    r"""Turn an `Example` of bytes into a `Question`.

    >>> from moba_lab.tasks.example import Example
    >>> as_text(Example(b"The key is ", b"42\n", (b"42",)))
    Question(prompt='The key is', answer=' 42\n', references=('42',))
    """
    prompt, answer = example.prompt.decode(), example.answer.decode()
    bare = prompt.rstrip(" ")
    references = tuple(reference.decode() for reference in example.references)
    return Question(bare, prompt[len(bare) :] + answer, references)


def read_haystack(data=None):
    """Read text to hide needles in and to measure the loss on.

    Args:
        data: folder, all of whose UTF-8 files are taken; None: the files of the
            standard library on which the shipped models were not trained.

    Returns:
        `Haystack` of one text, all files in the order of their paths.
    """
    texts = load_corpus().held_out if data is None else folder_texts(data)
    if not texts:
        raise ValueError(f"expected text files in {data}, found none")
    pieces = [bytes(text).rstrip(b"\n") + b"\n" for text in texts.values()]
    return Haystack([np.frombuffer(b"".join(pieces), np.uint8)])


def measure_of(subject):
    """Return the function that says how many tokens the text of an example takes."""
    return lambda text: len(subject.ids(text.decode())) + SLACK


def needle(subject, haystack, rng, length, depth):
    """Ask for a pass key in real text.

    Args:
        subject: `Subject`.
        haystack: `Haystack`.
        rng: numpy Generator.
        length: tokens of prompt and answer, at most and up to a line fewer.
        depth: 0 to 1, see `moba_lab.tasks.needle`.

    Returns:
        `Question`.
    """
    key = "".join(map(str, rng.permutation(10)[:DIGITS])).encode()
    lines = piece(subject, haystack, rng, length).splitlines(keepends=True)

    def build(n):
        if n > len(lines):
            raise too_short(length)
        return plant(b"".join(lines[:n]), key, depth)

    return as_text(fit(build, length, measure_of(subject)))


def piece(subject, haystack, rng, length):
    """Draw a piece of text that most likely has more tokens than length."""
    size = int(ROOM * length * subject.bytes_per_token)
    return haystack.draw(rng, min(size, haystack.longest))


def too_short(length):
    """Return the error of a haystack that is too short."""
    return ValueError(
        f"expected a text of at least {length} tokens to read; give --data a folder "
        f"with more text, or a shorter length"
    )


def ruler(subject, name, rng, length):
    """Make one of RULER's tasks.

    Args:
        subject: `Subject`.
        name: key of `moba_lab.tasks.ruler.TASKS`. In fewer than `WHOLE` tokens its
            lists of words and chains are shorter.
        rng: numpy Generator.
        length: tokens of prompt and answer, at most.

    Returns:
        `Question`.
    """
    task = (SHORT if length < WHOLE else TASKS)[name]
    make = task(wording=ENGLISH, measure=measure_of(subject))
    return as_text(make(rng, length))

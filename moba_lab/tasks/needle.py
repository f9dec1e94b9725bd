"""A pass key hidden in real text, asked for at its end."""

from moba_lab.tasks.example import Example
from moba_lab.tasks.haystack import line_starts

DEPTHS = tuple(n / 14 for n in range(15))
DIGITS = 5
# A comment, since the haystack is source code; it ends where the key begins.
PREFIX = b"# The pass key is "
# In training texts get as short as this: the question and a line or none.
SHORTEST = 64


class Needle:
    """Pass keys of random, different digits in pieces of a haystack.

    The key stands in a line of its own, and the prompt ends with the beginning of that
    line once more, so that what remains to be written is the key.

    Args:
        haystack: `Haystack`; held-out text for measuring, other text for training.
        digits: digits of the key, at most 10, for they are all different: so one digit
            tells a small model where in the key it is, and what fails is the search.
        depth: where the line stands, from 0, the top, to 1, just above the question;
            None: anywhere.
    """

    def __init__(self, haystack, digits=DIGITS, depth=None):
        if not 1 <= digits <= 10:
            raise ValueError(f"expected 1 to 10 digits, got {digits}")
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"expected a depth from 0 to 1, got {depth}")
        self.haystack, self.digits, self.depth = haystack, digits, depth

    def __call__(self, rng, length):
        """Make an `Example` of at most length bytes, and up to a line fewer.

        Raises:
            ValueError: no text of the haystack is long enough, or the length is too
                small for the question.
        """
        key = "".join(map(str, rng.permutation(10)[: self.digits])).encode()
        room = length - 2 * len(PREFIX + key) - len(b"\n")
        if room < 0:
            raise ValueError(
                f"expected a length of at least {length - room}, which the key and "
                f"the question alone take, got {length}"
            )
        depth = rng.random() if self.depth is None else self.depth
        return plant(self.haystack.draw(rng, room), key, depth)


def plant(text, key, depth):
    r"""Plant a pass key in a text, and ask for it.

    Args:
        text: bytes; whole lines.
        key: bytes.
        depth: 0 to 1; the line goes to the line border that is nearest.

    Returns:
        `Example`; its needle is the key's place.

    >>> example = plant(b"x = 1\ny = 2\n", b"407", depth=0.5)
    >>> example.prompt
    b'x = 1\n# The pass key is 407\ny = 2\n# The pass key is '
    >>> example.prompt[slice(*example.needles[0])]
    b'407'
    """
    if text and not text.endswith(b"\n"):
        text += b"\n"
    starts = line_starts(text)
    place = int(starts[abs(starts - depth * len(text)).argmin()])
    prompt = text[:place] + PREFIX + key + b"\n" + text[place:] + PREFIX
    first = place + len(PREFIX)
    return Example(prompt, key, (key,), ((first, first + len(key)),))

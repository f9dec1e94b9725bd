"""Pieces of real text in which something can be hidden."""

import numpy as np

from moba_lab.data import BOS


class Haystack:
    """Texts to cut pieces from that begin and end with a line, inside one text.

    Args:
        texts: list of (n,) uint8.

    Raises:
        ValueError: the texts hold no line.
    """

    def __init__(self, texts):
        texts = [np.asarray(text, dtype=np.uint8) for text in texts]
        self.texts = [text.tobytes() for text in texts if (text == ord("\n")).any()]
        if not self.texts:
            raise ValueError("expected texts with lines, got none; give other texts")
        ends = [np.flatnonzero(np.frombuffer(t, np.uint8) == 10) for t in self.texts]
        self.starts = [np.concatenate([[0], end + 1]) for end in ends]
        self.longest = max(int(start[-1]) for start in self.starts)

    @classmethod
    def of_stream(cls, stream):
        """Split a stream of files that `BOS` opens, as `Corpus.train` is."""
        return cls(np.split(stream, np.flatnonzero(stream == BOS)[1:])).without_bos()

    def without_bos(self):
        """Return the same texts without the byte that opens a file."""
        texts = (text.lstrip(bytes([BOS])) for text in self.texts)
        return Haystack([np.frombuffer(text, np.uint8) for text in texts])

    def draw(self, rng, length):
        """Cut a piece: of every text that is long enough, any part is equally likely.

        Args:
            rng: numpy Generator.
            length: bytes that the piece should have; it ends with the last line that
                ends within them.

        Returns:
            bytes, whole lines; at most length bytes and one line shorter at most.

        Raises:
            ValueError: no text is so long.
        """
        if length > self.longest:
            raise ValueError(
                f"expected a length of at most {self.longest}, the whole lines of the "
                f"longest text, got {length}; use longer texts or a shorter length"
            )
        # A piece begins where at least `length` bytes of whole lines follow.
        choices = [
            np.searchsorted(start, start[-1] - length, side="right")
            for start in self.starts
        ]
        pick = int(rng.integers(sum(choices)))
        for text, start, count in zip(self.texts, self.starts, choices, strict=True):
            if pick < count:
                first = start[pick]
                end = start[np.searchsorted(start, first + length, side="right") - 1]
                return text[first:end]
            pick -= count
        raise AssertionError("every pick belongs to a text")


def line_starts(text):
    r"""Return the offsets at which a line begins, the end of the text among them.

    >>> line_starts(b"a\nbc\n").tolist()
    [0, 2, 5]
    """
    return np.concatenate(
        [[0], np.flatnonzero(np.frombuffer(text, np.uint8) == 10) + 1]
    )

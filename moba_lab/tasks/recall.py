"""Multi-query associative recall (Arora et al., arXiv 2312.04927).

A sequence lists pairs of a key and a value; later each key stands once more, and the
value must be predicted there. Tokens are from a vocabulary of three equal parts: noise,
keys, values.
"""

from dataclasses import dataclass

import numpy as np

from moba_lab.tasks.example import IGNORED


@dataclass(frozen=True)
class RecallExample:
    """A sequence with its questions.

    tokens: (n,) int64.
    queries: (pairs,) places of the keys that are asked for, ascending.
    values: (pairs,) the tokens to be predicted there.
    places: (pairs,) where the value of each query stands.
    """

    tokens: np.ndarray
    queries: np.ndarray
    values: np.ndarray
    places: np.ndarray

    def row(self, context):
        """Return `tokens, targets`, each (context,) int64.

        Raises:
            ValueError: the example has not `context` tokens.
        """
        if len(self.tokens) != context:
            raise ValueError(
                f"expected an example of {context} tokens, got {len(self.tokens)}"
            )
        targets = np.full(context, IGNORED, dtype=np.int64)
        targets[self.queries] = self.values
        return self.tokens, targets


class Recall:
    """Pairs in the first half of a sequence, queries in the second.

    Pairs begin at even places, so that no block of even size cuts one in two.

    Args:
        pairs: pairs of a sequence; each is asked for once.
        scattered: whether pairs stand anywhere in the first half, with noise between
            them, or in a row at its beginning.
        vocabulary: tokens; a third of them are noise, keys and values each.
    """

    def __init__(self, pairs, scattered=False, vocabulary=192):
        if vocabulary // 3 < pairs:
            raise ValueError(
                f"expected a vocabulary of at least {3 * pairs} for {pairs} pairs, "
                f"got {vocabulary}"
            )
        self.pairs, self.scattered, self.vocabulary = pairs, scattered, vocabulary

    def __call__(self, rng, length):
        """Make a `RecallExample` of length - 1 tokens, which have their targets inside.

        Raises:
            ValueError: the pairs do not fit into half of the tokens.
        """
        size, part = length - 1, self.vocabulary // 3
        slots = size // 4
        if slots < self.pairs:
            raise ValueError(
                f"expected at least {4 * self.pairs} tokens for {self.pairs} pairs and "
                f"their queries, got {size}"
            )
        tokens = rng.integers(part, size=size)
        keys = part + rng.permutation(part)[: self.pairs]
        values = 2 * part + rng.integers(part, size=self.pairs)
        if self.scattered:
            first = 2 * np.sort(rng.permutation(slots)[: self.pairs])
        else:
            first = 2 * np.arange(self.pairs)
        tokens[first], tokens[first + 1] = keys, values
        half = size // 2
        queries = half + np.sort(rng.permutation(size - half)[: self.pairs])
        asked = rng.permutation(self.pairs)
        tokens[queries] = keys[asked]
        return RecallExample(tokens, queries, values[asked], first[asked] + 1)

"""RULER's tasks that need no corpus (Hsieh et al., arXiv 2404.06654), as text.

The structure is that paper's: needles with one or more keys, values and queries,
chains of variables, and words to be counted. The words are our own, so scores are
comparable with each other and not with published tables. Score a free answer with
`scoring.string_recall`, RULER's rule: the share of the reference strings in it.
"""

from functools import partial

import numpy as np

from moba_lab.tasks.example import Example, fit
from moba_lab.tasks.wording import TERSE


class MagicNumbers:
    """Needles that give numbers to keys, in noise; some keys are asked for.

    RULER's single needle has one key with one value; multi-key has keys that nobody
    asks for, multi-value more values for the key, multi-query more keys that are asked.

    Args:
        keys: keys in the text.
        values: values of every key.
        queries: keys that are asked for, at most `keys`.
        wording: `Wording`.
        measure: function from text to its length, see `fit`.
    """

    def __init__(self, keys=1, values=1, queries=1, wording=TERSE, measure=len):
        if not 1 <= queries <= keys:
            raise ValueError(f"expected 1 to keys = {keys} queries, got {queries}")
        self.keys, self.values, self.queries = keys, values, queries
        self.wording, self.measure = wording, measure

    def __call__(self, rng, length):
        """Make an `Example` of at most that length."""
        keys = self.wording.keys(rng, self.keys)
        values = self.wording.values(rng, self.keys * self.values)
        pairs = [(keys[n // self.values], value) for n, value in enumerate(values)]
        depths = rng.random(len(pairs))
        return fit(partial(self._build, pairs, depths), length, self.measure)

    def _build(self, pairs, depths, n):
        lines = [self.wording.pair.format(key=key, value=value) for key, value in pairs]
        text, offsets = hide(lines, depths, self.wording.noise, n)
        wanted = range(self.queries * self.values)
        asked = dict.fromkeys(pairs[i][0] for i in wanted)
        question = self.wording.ask_pair.format(keys=listed(asked))
        spans = [locate(lines[i], pairs[i][1], offsets[i], last=True) for i in wanted]
        return example(text + question, [pairs[i][1] for i in wanted], spans)


class VariableTracking:
    """Chains of assignments in noise: which names have the value of the first chain?

    Args:
        chains: chains in the text; all but the first only distract.
        hops: how often the value of a chain is passed on.
        wording: `Wording`.
        measure: function from text to its length, see `fit`.
    """

    def __init__(self, chains=1, hops=4, wording=TERSE, measure=len):
        self.chains, self.hops = chains, hops
        self.wording, self.measure = wording, measure

    def __call__(self, rng, length):
        """Make an `Example` of at most that length."""
        size = self.hops + 1
        names = self.wording.names(rng, self.chains * size)
        values = self.wording.values(rng, self.chains)
        # A value must be assigned before it is passed on.
        depths = np.sort(rng.random((self.chains, size))).reshape(-1)
        return fit(partial(self._build, names, values, depths), length, self.measure)

    def _build(self, names, values, depths, n):
        size, wording = self.hops + 1, self.wording
        lines = [
            wording.copy.format(name=name, other=names[i - 1])
            if i % size
            else wording.assign.format(name=name, value=values[i // size])
            for i, name in enumerate(names)
        ]
        text, offsets = hide(lines, depths, wording.noise, n)
        spans = [locate(lines[i], names[i], offsets[i]) for i in range(size)]
        question = wording.ask_names.format(value=values[0])
        return example(text + question, names[:size], spans)


class CommonWords:
    """A shuffled list in which a few words are repeated more often than all others.

    Args:
        common: how many words are common.
        times: how often each of them is there.
        others: how often each other word is there, less than `times`.
        wording: `Wording`.
        measure: function from text to its length, see `fit`.
    """

    def __init__(self, common=10, times=30, others=3, wording=TERSE, measure=len):
        if others >= times:
            raise ValueError(
                f"expected others to be less than times = {times}, got {others}"
            )
        self.common, self.times, self.others = common, times, others
        self.wording, self.measure = wording, measure

    def __call__(self, rng, length):
        """Make an `Example` of at most that length."""
        seed = rng.integers(2**63)
        return fit(partial(self._build, seed), length, self.measure)

    def _build(self, seed, n):
        rng = np.random.default_rng(seed)
        words = self.wording.keys(rng, self.common + n)
        counts = [self.times] * self.common + [self.others] * n
        question = self.wording.ask_common.format(count=self.common)
        return count_words(rng, words, counts, self.common, question, self.wording)


class FrequentWords:
    """Words whose frequencies fall as a power of their rank (a zeta distribution).

    Args:
        frequent: how many words are asked for, the most frequent ones.
        alpha: exponent of the ranks.
        vocabulary: how many words there are.
        wording: `Wording`.
        measure: function from text to its length, see `fit`.
    """

    def __init__(
        self, frequent=3, alpha=2.0, vocabulary=50, wording=TERSE, measure=len
    ):
        self.frequent, self.alpha, self.vocabulary = frequent, alpha, vocabulary
        self.wording, self.measure = wording, measure

    def __call__(self, rng, length):
        """Make an `Example` of at most that length."""
        seed = rng.integers(2**63)
        return fit(partial(self._build, seed), length, self.measure)

    def _build(self, seed, n):
        rng = np.random.default_rng(seed)
        words = self.wording.keys(rng, self.vocabulary)
        share = np.arange(1, self.vocabulary + 1) ** -self.alpha
        rank = np.arange(self.vocabulary)
        # One more for every rank asked for, so that no two of them are tied.
        extra = np.maximum(self.frequent - rank, 0)
        counts = (n * share / share.sum()).astype(int) + extra
        question = self.wording.ask_frequent.format(count=self.frequent)
        return count_words(rng, words, counts, self.frequent, question, self.wording)


TASKS = {
    "single": MagicNumbers,
    "multi-key": partial(MagicNumbers, keys=4),
    "multi-value": partial(MagicNumbers, values=4),
    "multi-query": partial(MagicNumbers, keys=4, queries=4),
    "variable tracking": VariableTracking,
    "common words": CommonWords,
    "frequent words": FrequentWords,
}
# The same with so few words that they fit into contexts of some hundred bytes.
SHORT = TASKS | {
    "variable tracking": partial(VariableTracking, hops=2),
    "common words": partial(CommonWords, common=3, times=6, others=2),
    "frequent words": partial(FrequentWords, vocabulary=12),
}


def hide(lines, depths, noise, n):
    r"""Put lines among n lines of noise.

    Args:
        lines: list of str.
        depths: where each goes, 0 to 1; of equal places the earlier line comes first.
        noise: lines that are repeated in turn.
        n: how many lines of noise.

    Returns:
        text: str; every line ends with a newline.
        offsets: of the first character of every given line.

    >>> hide(["key"], [0.5], ["a", "b"], 2)
    ('a\nkey\nb\n', [2])
    """
    places = np.round(np.asarray(depths) * n).astype(int)
    pieces, offsets, size = [], [0] * len(lines), 0
    order = sorted(range(len(lines)), key=lambda i: (places[i], depths[i]))
    for place in range(n + 1):
        while order and places[order[0]] == place:
            i = order.pop(0)
            offsets[i] = size
            pieces.append(lines[i] + "\n")
            size += len(pieces[-1])
        if place < n:
            pieces.append(noise[place % len(noise)] + "\n")
            size += len(pieces[-1])
    return "".join(pieces), offsets


def count_words(rng, words, counts, wanted, question, wording):
    """Ask for the first words of a shuffled list, each there as often as counted."""
    listed_words = np.repeat(words, counts)
    rng.shuffle(listed_words)
    text = f"{wording.words}\n{' '.join(listed_words)}\n{question}"
    return example(text, words[:wanted], ())


def example(text, references, spans):
    """Make an `Example` whose answer lists the references, each after a space."""
    answer = "".join(f" {reference}" for reference in references) + "\n"
    references = tuple(reference.encode() for reference in references)
    return Example(text.encode(), answer.encode(), references, tuple(spans))


def locate(line, word, offset, last=False):
    """Return (first, end) of a word of a line that begins at an offset."""
    first = offset + (line.rindex(word) if last else line.index(word))
    return first, first + len(word)


def listed(words):
    """Join words with commas.

    >>> listed(["a", "b"])
    'a, b'
    """
    return ", ".join(words)

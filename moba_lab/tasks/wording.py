"""The words of RULER's tasks: English for real models, few bytes for small ones."""

from dataclasses import dataclass
from string import ascii_uppercase

VOWELS, CONSONANTS = "aeiou", "bdfgklmnprstvz"


@dataclass(frozen=True)
class Wording:
    """Templates of the tasks, and how long their words are.

    noise: lines between the needles, repeated as often as needed.
    pair: one needle; ask_pair: the question for the values of some keys.
    assign, copy: `name` gets a value, or that of another name; ask_names: the question
        for all names with a value.
    words: opens a list of words; ask_common, ask_frequent: the questions for the
        `count` words that are there most often.
    digits: of a value; syllables: of a word, two letters each; letters: of a name.
    """

    noise: tuple[str, ...]
    pair: str
    ask_pair: str
    assign: str
    copy: str
    ask_names: str
    words: str
    ask_common: str
    ask_frequent: str
    digits: int
    syllables: int
    letters: int

    def values(self, rng, count):
        """Draw different numbers of `digits` digits."""
        low = 10 ** (self.digits - 1)
        return _different(count, 9 * low, lambda: str(rng.integers(low, 10 * low)))

    def keys(self, rng, count):
        """Draw different words of `syllables` syllables."""
        possible = (len(CONSONANTS) * len(VOWELS)) ** self.syllables
        return _different(count, possible, lambda: _word(rng, self.syllables))

    def names(self, rng, count):
        """Draw different names of `letters` capital letters."""
        return _different(
            count,
            len(ascii_uppercase) ** self.letters,
            lambda: "".join(rng.choice(list(ascii_uppercase), self.letters)),
        )


ENGLISH = Wording(
    noise=(
        "The rain falls on the roof.",
        "A train leaves the station.",
        "Somebody closes a window.",
        "The street is quiet again.",
    ),
    pair="One of the magic numbers of {key} is {value}.",
    ask_pair=(
        "Which magic numbers of {keys} does the text above give? Write all of them.\n"
        "The magic numbers of {keys} are"
    ),
    assign="VAR {name} = {value}",
    copy="VAR {name} = VAR {other}",
    ask_names=(
        "Which variables have the value {value}, directly or through another one?\n"
        "The variables with the value {value} are"
    ),
    words="Here is a list of words.",
    ask_common=(
        "Which {count} words are there most often?\n"
        "The {count} words that are there most often are"
    ),
    ask_frequent=(
        "Which {count} words of this coded text are used most often?\n"
        "The {count} words used most often are"
    ),
    digits=7,
    syllables=4,
    letters=5,
)
TERSE = Wording(
    noise=("rain on roofs", "trains leave", "a window", "quiet streets"),
    pair="{key} is {value}",
    ask_pair="? {keys} is",
    assign="{name} = {value}",
    copy="{name} = {other}",
    ask_names="? {value} in",
    words="list",
    ask_common="? most",
    ask_frequent="? most",
    digits=4,
    syllables=2,
    letters=3,
)


def _word(rng, syllables):
    pairs = zip(
        rng.integers(len(CONSONANTS), size=syllables),
        rng.integers(len(VOWELS), size=syllables),
        strict=True,
    )
    return "".join(CONSONANTS[c] + VOWELS[v] for c, v in pairs)


def _different(count, possible, draw):
    if count > possible // 2:
        raise ValueError(
            f"expected at most {possible // 2} different words, got {count}; use a "
            "wording with longer words, or a shorter text"
        )
    found = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)

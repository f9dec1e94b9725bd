"""Examples of tasks, and batches of them."""

from dataclasses import dataclass

import numpy as np

# Positions with this target take no part in the loss, as in `cross_entropy`.
IGNORED = -100
# Fills what is left of a sequence behind its example, where nothing is predicted.
PADDING = 0


@dataclass(frozen=True)
class Example:
    """A question and its answer.

    prompt: what the model reads.
    answer: what it must write then; training teaches exactly this.
    references: the strings by which a free answer is scored, see
        `scoring.string_recall`.
    needles: (first, end) byte offsets in the prompt of what holds the references, one
        each, in their order; empty where no single place holds them.
    """

    prompt: bytes
    answer: bytes
    references: tuple[bytes, ...]
    needles: tuple[tuple[int, int], ...] = ()

    @property
    def text(self):
        """The prompt and the answer in a row."""
        return self.prompt + self.answer

    def row(self, context):
        """Write the text into one sequence, with only the answer as targets.

        Args:
            context: tokens of the sequence.

        Returns:
            tokens, targets: each (context,) int64.

        Raises:
            ValueError: the text is too long.
        """
        text = np.frombuffer(self.text, dtype=np.uint8)
        if len(text) > context + 1:
            raise ValueError(
                f"expected an example of at most {context + 1} bytes, got {len(text)}; "
                "ask the task for shorter ones"
            )
        tokens = np.full(context, PADDING, dtype=np.int64)
        targets = np.full(context, IGNORED, dtype=np.int64)
        first, end = len(self.prompt) - 1, len(text) - 1
        tokens[:end] = text[:-1]
        targets[first:end] = text[first + 1 :]
        return tokens, targets


class TaskSampler:
    """Make batches of a task's examples, each decided by (seed, its number) alone.

    Only the answers have targets: the prompt is masked. Use it where training uses
    `moba_lab.data.BatchSampler`; the state is two integers.

    Args:
        task: function (numpy Generator, length) -> example of at most length tokens,
            with `row` as `Example` has it.
        batch: examples per batch.
        context: tokens per example; its text may have one more.
        seed: any integer of 0 or more.

    >>> def task(rng, length):
    ...     return Example(b"ab?", b"cd", (b"cd",))
    >>> tokens, targets = TaskSampler(task, batch=1, context=5, seed=0).next_batch()
    >>> targets.tolist()
    [-100, -100, 99, 100, -100]
    """

    def __init__(self, task, batch, context, seed):
        self.task, self.batch, self.context, self.seed = task, batch, context, seed
        self.drawn = 0

    def next_batch(self):
        """Return `tokens, targets`, each (batch * context,) int64."""
        rows = [example.row(self.context) for example in self.next_examples()]
        tokens, targets = zip(*rows, strict=True)
        return np.concatenate(tokens), np.concatenate(targets)

    def next_examples(self):
        """Return the examples of the next batch."""
        numbers = range(self.drawn, self.drawn + self.batch)
        self.drawn += self.batch
        return [
            self.task(np.random.default_rng([self.seed, n]), self.context + 1)
            for n in numbers
        ]

    def state_dict(self):
        """Return what `load_state_dict` needs to go on with the same batches."""
        return {"seed": self.seed, "drawn": self.drawn}

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken."""
        self.seed, self.drawn = state["seed"], state["drawn"]


class Mixture:
    """Examples of several tasks, each equally likely."""

    def __init__(self, tasks):
        self.tasks = list(tasks)

    def __call__(self, rng, length):
        """Make an example of at most that length."""
        return self.tasks[rng.integers(len(self.tasks))](rng, length)


class AnyLength:
    """Examples of one task of any length from `shortest` on, each equally likely."""

    def __init__(self, task, shortest):
        self.task, self.shortest = task, shortest

    def __call__(self, rng, length):
        """Make an example of at most that length."""
        return self.task(rng, int(rng.integers(self.shortest, length + 1)))


def fit(build, length, measure=len):
    """Build the largest example that is not too long.

    Args:
        build: function n -> `Example`, longer for larger n.
        length: its largest length.
        measure: function from an example's text to its length; bytes unless another
            one is given, such as a tokenizer's count.

    Returns:
        What `build` returns for the largest such n.

    Raises:
        ValueError: even n = 0 is too long.

    >>> fit(lambda n: Example(b"x" * n, b"!", ()), length=7).text
    b'xxxxxx!'
    """
    if measure(build(0).text) > length:
        raise ValueError(
            f"expected a length of at least {measure(build(0).text)}, which the "
            f"question alone takes, got {length}"
        )
    low, high = 0, 1
    while measure(build(high).text) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if measure(build(middle).text) <= length:
            low = middle
        else:
            high = middle
    return build(low)

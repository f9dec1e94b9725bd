"""Gather, for a stretch of real text, which earlier blocks its queries read."""

from dataclasses import dataclass

import numpy as np

from moba_lab.viz.layout import check_index, layout
from moba_lab.viz.states import states
from moba_lab.viz.style import State
from moba_lab.viz.words import count, listed


@dataclass(frozen=True)
class Reading:
    """Hold what the queries of a stretch of text do to every block.

    Attributes:
        grid: Layout.
        queries: the queries, ascending.
        pairs: number of (query, head) pairs.
        reads: (N,) how many pairs read the block as a past block.
        state: (N,) `State` of every block for the stretch as a whole.
        texts: N strings, the visible text of every block.
    """

    grid: object
    queries: np.ndarray
    pairs: int
    reads: np.ndarray
    state: np.ndarray
    texts: list

    @property
    def best(self):
        """Return the past blocks that are read, the most read first."""
        order = np.argsort(-self.reads, kind="stable")
        return order[self.reads[order] > 0]

    @property
    def words(self):
        """Return the text of the queries."""
        grid, place = self.grid, self.grid.position[self.queries]
        return "".join(
            self.texts[grid.of_token[i]][i - grid.start[grid.of_token[i]]]
            for i in place
        )


def read_text(text, blocks, selected, queries, head=None):
    """Return the Reading of some queries of one sequence.

    Args:
        text: SK bytes, or (SK,) uint8.
        blocks: Blocks.
        selected: (S, H, topk) block ids, -1 for none.
        queries: query numbers, such as range(first, last) of a line.
        head: which head; None: all heads together.

    Raises:
        ValueError: if text is not SK bytes, or queries are none or of two sequences.
        IndexError: if the head or a query does not exist.
    """
    grid, cells, text = layout(blocks), states(selected, blocks), as_bytes(text)
    if len(text) != grid.SK:
        raise ValueError(f"text must hold {grid.SK} bytes, one a key, got {len(text)}")
    if head is not None:
        cells = cells[:, [check_index(head, cells.shape[1], "head")]]
    queries = sorted({check_index(q, grid.S, "query") for q in np.atleast_1d(queries)})
    if not queries or np.ptp(grid.first_of_query[queries]):
        raise ValueError(
            f"queries must be some of one sequence, got {len(queries)} of "
            f"{len(set(grid.first_of_query[queries]))} sequences"
        )
    cells = cells[queries].reshape(-1, grid.N)
    reads = (cells == State.SELECTED).sum(axis=0)
    state = np.full(grid.N, State.FUTURE)
    state[(cells == State.PAST).any(axis=0)] = State.PAST
    state[reads > 0] = State.SELECTED
    state[grid.of_query[queries]] = State.CURRENT
    texts = [visible(text[a:b]) for a, b in zip(grid.start, grid.end, strict=True)]
    return Reading(grid, np.array(queries), len(cells), reads, state, texts)


def as_bytes(text):
    """Return bytes, an array or a tensor of bytes as bytes."""
    if isinstance(text, bytes):
        return text
    if isinstance(text, str):
        raise TypeError("text must be bytes, one for every token; use text.encode()")
    if hasattr(text, "detach"):
        text = text.detach().cpu().numpy()
    return np.asarray(text).astype(np.uint8).tobytes()


def visible(data):
    r"""Return one visible character for every byte, for text in figures.

    Example:
        >>> visible(b"a\tb\n\xc3\xa9")
        'a→b↵··'
    """
    shown = {10: "↵", 9: "→"}
    return "".join(
        chr(byte) if 32 <= byte < 127 else shown.get(byte, "·") for byte in data
    )


def findings(reading):
    """Return title and sentence about the block that is read most."""
    words = shorten(reading.words)
    if not len(reading.best):
        return f'"{words}" reads no past block', "every byte reads its own block only."
    best = reading.best[0]
    title = f'"{words}" reads block {best} most: "{shorten(reading.texts[best], 34)}"'
    told = [f"block {n} in {reading.reads[n]}" for n in reading.best[:3]]
    first, last = reading.queries[[0, -1]]
    return title, (
        f"{count(len(reading.queries), 'query')}, {first} to {last} (marked), make "
        f"{count(reading.pairs, 'choice')} of several blocks each: {listed(told)}."
    )


def shorten(text, most=24):
    """Return text in one line, cut in the middle if it is long.

    Example:
        >>> shorten("  def first(a):↵    return a[0]↵")
        'def first(...eturn a[0]'
    """
    text = " ".join(text.replace("↵", " ").replace("→", " ").split())
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half].rstrip()}...{text[-half:].lstrip()}"

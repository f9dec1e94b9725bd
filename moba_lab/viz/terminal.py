"""Write the choice of blocks as text, for terminals and screen readers."""

import numpy as np

from moba_lab.viz.layout import check_index, layout
from moba_lab.viz.states import states
from moba_lab.viz.style import LABEL, State
from moba_lab.viz.words import reads

CHARACTER = {
    State.FUTURE: " ",
    State.PAST: ".",
    State.SELECTED: "#",
    State.CURRENT: "o",
    State.LEAK: "X",
}


def ascii(selected, blocks, head=0, queries=None):
    """Return the block-selection heatmap of one head as lines of text.

    Every row ends with the same in words.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.
        head: which head.
        queries: the rows to write; None: all queries.

    Returns:
        Text with a legend as its first line.

    Raises:
        ValueError: if selected does not fit blocks.
        IndexError: if the head or a query does not exist.

    Example: 6 tokens, blocks of 2, two blocks for every query.
        >>> from moba_ref.blocks import partition
        >>> rows = [[-1, 0], [-1, 0], [0, 1], [0, 1], [1, 2], [0, 2]]
        >>> selected, blocks = np.array(rows)[:, None], partition([0, 6], 2)
        >>> print(ascii(selected, blocks, queries=[2, 4, 5]))
        head 0; # past, selected; . past, not selected; o current; blank: future
        query 2 |#o | reads block 0 and its own, 1
        query 4 |.#o| reads block 1 and its own, 2
        query 5 |#.o| reads block 0 and its own, 2
    """
    grid, cells = layout(blocks), states(selected, blocks)
    cells = cells[:, check_index(head, cells.shape[1], "head")]
    queries = range(grid.S) if queries is None else np.atleast_1d(queries)
    queries = [check_index(query, grid.S, "query") for query in queries]
    shown = [State.SELECTED, State.PAST, State.CURRENT]
    if (cells[queries] == State.LEAK).any():
        shown.append(State.LEAK)
    legend = "; ".join(f"{CHARACTER[state]} {LABEL[state]}" for state in shown)
    other = " or other sequence" if grid.packed else ""
    lines = [f"head {head}; {legend}; blank: future{other}"]
    width = len(str(max(queries, default=0)))
    for query in queries:
        row = "".join(CHARACTER[State(state)] for state in cells[query])
        words = reads(cells[query], query).removeprefix(f"query {query} ")
        lines.append(f"query {query:>{width}} |{row}| {words}")
    return "\n".join(lines)

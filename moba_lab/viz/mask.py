"""Picture which key tokens queries read."""

import numpy as np

from moba_lab.viz.cells import draw_states, tick_queries
from moba_lab.viz.layout import check_index, layout
from moba_lab.viz.select import shown_states
from moba_lab.viz.states import token_states
from moba_lab.viz.style import State, canvas, finish, legend, name_axes, styled
from moba_lab.viz.words import count


def token_mask(mask, blocks, head=0):
    """Draw which key tokens every query reads, with the borders of blocks over it.

    Paper: Eq. 2 to 6 as one mask.

    Args:
        mask: (S, H, SK) bool, from `moba_ref.token_mask`; or `selected`.
        blocks: Blocks.
        head: which head.

    Returns:
        Figure. `token_states(mask, blocks)` holds what it shows.

    Raises:
        ValueError: if the shape fits neither.
        IndexError: if head is not one of the H heads.
    """
    grid = layout(blocks)
    cells = token_states(mask, blocks)
    cells = cells[:, check_index(head, cells.shape[1], "head")]
    with styled():
        fig = canvas(min(8.0, 2.4 + 0.16 * grid.S))
        ax = fig.subplots()
        draw_states(ax, cells, grid)
        width = 1.4 if grid.N <= 16 else 0.7
        ax.vlines(grid.start[1:] - 0.5, -0.5, len(cells) - 0.5, "black", lw=width)
        tick_queries(ax, np.arange(grid.S), grid.block_size)
        ax.set_xticks(grid.start[:: -(-grid.N // 16)])
        name_axes(ax, "key position (ticks: first token of a key block)")
        legend(fig, shown_states(cells), grid.packed)
        return finish(fig, *findings(cells, grid, head))


def findings(cells, grid, head):
    """Return title and sentence about how many pairs are read."""
    leaks = np.argwhere(cells == State.LEAK)
    read = np.isin(cells, (State.SELECTED, State.CURRENT))
    causal = np.isin(cells, (State.PAST, State.SELECTED, State.CURRENT))
    title = (
        f"Head {head}: {read.sum():,} of {causal.sum():,} causal token pairs are read "
        f"({read.sum() / max(1, causal.sum()):.0%})"
    )
    if len(leaks):
        query, key = leaks[0]
        return f"Head {head}: {count(len(leaks), 'pair')} against the rules", (
            f"black cells with a cross are read against the rules, the first one key "
            f"{key} by query {query}, which stands at {grid.position[query]}."
        )
    per_query = read.sum(axis=1)
    last = len(per_query) - 1
    return title, (
        f"past blocks are read whole, the current one only up to the query itself; "
        f"query {last} reads {per_query[last]} of {causal[last].sum()} keys."
    )

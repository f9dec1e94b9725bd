"""Picture which blocks queries read."""

import numpy as np
from matplotlib.patches import Rectangle

from moba_lab.viz.cells import draw_states, tick_blocks, tick_queries
from moba_lab.viz.layout import check_index, layout
from moba_lab.viz.states import states
from moba_lab.viz.style import (
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)
from moba_lab.viz.words import farthest, reads


def shown_states(cells):
    """Return the four states, and the leak where there is one."""
    return [state for state in State if state < State.LEAK or (cells == state).any()]


def selection_heatmap(selected, blocks, heads=None, query=None):
    """Draw which blocks every query reads: one panel per head.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.
        heads: the heads to draw; None: all, at most 8.
        query: the query to outline; None: the one that looks back farthest.

    Returns:
        Figure. `states(selected, blocks)` holds what it shows.

    Raises:
        ValueError: if selected does not fit blocks.
        IndexError: if a head or the query does not exist.
    """
    grid = layout(blocks)
    cells = states(selected, blocks)
    H = cells.shape[1]
    heads = range(min(H, 8)) if heads is None else np.atleast_1d(heads)
    heads = [check_index(head, H, "head") for head in heads]
    query = farthest(cells, heads[0]) if query is None else query
    query = check_index(query, grid.S, "query")
    with styled():
        fig = panels(cells, grid, heads, query)
        legend(fig, shown_states(cells), grid.packed)
        where = f", head {heads[0]}:" if len(heads) > 1 else ":"
        see = f"row {query} (outlined){where} {reads(cells[query, heads[0]], query)}."
        return finish(fig, share(cells[:, heads]), see)


def panels(cells, grid, heads, query):
    """Draw the panels, at most four beside each other."""
    columns = min(4, len(heads))
    lines = -(-len(heads) // columns)
    height = min(8.0, 1.4 + lines * min(4.2, 1.2 + 0.13 * grid.S))
    fig = canvas(height, 8.0 if columns > 1 or grid.N > 12 else 6.0)
    axes = fig.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for ax, head in zip(axes.flat[: len(heads)], heads, strict=True):
        draw_states(ax, cells[:, head], grid)
        ax.set_title(f"head {head}")
        tick_queries(ax, np.arange(grid.S), grid.block_size)
        tick_blocks(ax, grid.N)
        name_axes(ax)
        ax.label_outer()
        outline(ax, query, grid.N)
    for ax in axes.flat[len(heads) :]:
        ax.set_visible(False)
    return fig


def outline(ax, row, columns):
    """Outline a row, wider than the axes so that its ends are seen."""
    ax.add_patch(
        Rectangle(
            (-0.5, row - 0.5), columns, 1, fc="none", ec="black", lw=2, clip_on=False
        )
    )


def share(cells):
    """Say how much of what a query may read it does read."""
    readable = np.isin(cells, (State.PAST, State.SELECTED, State.CURRENT))
    read = np.isin(cells, (State.SELECTED, State.CURRENT))
    leaks = cells == State.LEAK
    most = (read | leaks).sum(axis=2).max(initial=0)
    text = (
        f"A query reads at most {most} of {cells.shape[2]} blocks: "
        f"{read.sum() / max(1, readable.sum()):.0%} of what causal attention "
        f"reads, counted in blocks"
    )
    return f"{text}, and {leaks.sum()} against the rules" if leaks.any() else text

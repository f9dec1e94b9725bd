"""Picture how many queries chose every block."""

import numpy as np
from matplotlib.patches import Patch

from moba_lab.viz.cells import tick_blocks
from moba_lab.viz.layout import array, layout
from moba_lab.viz.states import states
from moba_lab.viz.style import (
    COLOR,
    LINE,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)
from moba_lab.viz.words import count


def pair_lists(routing, grid):
    """Return query (P,) and cu_pairs (H, N+1), one row of offsets for every head.

    Raises:
        ValueError: if there is not one list for every head and block.
    """
    query, cu = array(routing.query), array(routing.cu_pairs)
    H, rest = divmod(len(cu) - 1, max(1, grid.N))
    if rest or not H or cu[-1] != len(query):
        raise ValueError(
            f"routing must have one list for every head and block (N={grid.N}), "
            f"got {len(cu) - 1} lists that end at pair {cu[-1]} of {len(query)}"
        )
    return query, np.array([cu[h * grid.N : (h + 1) * grid.N + 1] for h in range(H)])


def load(source, blocks):
    """Return (H, N): how many queries read every block as a past block.

    Args:
        source: Routing, or `selected` (S, H, topk).
        blocks: Blocks.
    """
    if hasattr(source, "cu_pairs"):
        return np.diff(pair_lists(source, layout(blocks))[1], axis=1)
    return (states(source, blocks) == State.SELECTED).sum(axis=0)


def load_histogram(source, blocks):
    """Draw how many queries chose every block, as a router's load on its experts.

    Args:
        source: Routing, or `selected` (S, H, topk).
        blocks: Blocks.

    Returns:
        Figure. `load(source, blocks)` holds what it shows.

    Raises:
        ValueError: if the shape does not fit blocks.
    """
    grid, loads = layout(blocks), load(source, blocks)
    ids = np.arange(grid.N)[:, None]
    could = ((grid.first_of_query <= ids) & (ids < grid.of_query)).sum(axis=1)
    H = len(loads)
    columns = min(2 if grid.N <= 12 or H > 4 else 1, H)
    rows = -(-H // columns)
    with styled():
        fig = canvas(min(8.0, 1.2 + (2.4 if H <= 4 else 1.5) * rows))
        axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for head, ax in enumerate(axes.flat[:H]):
            draw_load(ax, loads[head], could)
            ax.set_title(f"head {head}")
            name_axes(ax, y="number of queries")
            ax.label_outer()
        for ax in axes.flat[H:]:
            ax.set_visible(False)
        pairs = [
            (Patch(fc=COLOR[State.PAST], ec=LINE), "could choose the block"),
            (Patch(fc=COLOR[State.SELECTED], ec="black"), "chose it"),
        ]
        legend(fig, (), extra=pairs)
        return finish(fig, *findings(loads, could))


def draw_load(ax, loads, could):
    """Draw bars: queries that could choose a block, and before them those that did."""
    ids = np.arange(len(loads))
    ax.bar(ids, could, color=COLOR[State.PAST], edgecolor=LINE, width=0.8, lw=0.8)
    ax.bar(
        ids, loads, color=COLOR[State.SELECTED], edgecolor="black", width=0.5, lw=0.8
    )
    if len(ids) <= 12:
        top = max(1, could.max(initial=1))
        for n in ids[could > 0]:
            ax.text(n, loads[n] + 0.02 * top, str(loads[n]), ha="center", va="bottom")
        ax.set_ylim(0, 1.15 * top)
    tick_blocks(ax, len(ids))
    ax.set_xlim(-0.7, len(ids) - 0.3)


def findings(loads, could):
    """Return title and sentence about the busiest block."""
    head, block = np.unravel_index(loads.argmax(), loads.shape)
    busiest = loads[head, block]
    if not busiest:
        return "No query reads a past block", "every query reads its own block only."
    mean = loads[head][could > 0].mean()
    title = (
        f"Head {head} sends {busiest} queries to block {block}, "
        f"{busiest / mean:.1f} times the mean over blocks"
    )
    idle = ((loads == 0) & (could > 0)).sum()
    return title, (
        f"read blocks as experts and queries as their tokens: nothing evens out the "
        f"load, and {count(int(idle), 'block')} that could be chosen "
        f"{'was' if idle == 1 else 'were'} not."
    )

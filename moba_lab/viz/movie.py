"""Show queries choosing their blocks one after the other, as film and as stills."""

import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moba_lab.viz.cells import draw_states, tick_blocks, tick_queries
from moba_lab.viz.layout import check_index, layout
from moba_lab.viz.offline import offline
from moba_lab.viz.select import shown_states
from moba_lab.viz.states import states
from moba_lab.viz.style import (
    DPI,
    State,
    canvas,
    describe,
    finish,
    legend,
    name_axes,
    styled,
)
from moba_lab.viz.words import reads

FRAMES = 32


def film(selected, blocks, head=0, queries=None):
    """Play how the queries of one head choose their blocks, one after the other.

    The film works offline and without the icon font that matplotlib links to.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.
        head: which head.
        queries: at most 32 queries, the rows of the film; None: all queries, or 32
            spread over them.

    Returns:
        `IPython.display.HTML` with `what_to_see` and `alt`; give it to `show`.

    Raises:
        ValueError: if there are more than 32 queries, or selected does not fit blocks.
        IndexError: if the head or a query does not exist.
    """
    from IPython.display import HTML

    grid, cells = layout(blocks), states(selected, blocks)
    cells = cells[:, check_index(head, cells.shape[1], "head")]
    rows = pick(queries, grid.S, FRAMES)
    with styled():
        fig = Figure(figsize=(4.8, 4.3), dpi=DPI, layout="constrained")
        update = stage(fig.subplots(), cells[rows], grid, rows)
        legend(fig, list(State)[1:4])
        update(0)
        fig.draw_without_rendering()
        # Any engine, even one that does nothing, has every frame drawn twice.
        fig.set_layout_engine(None)
        movie = FuncAnimation(fig, update, len(rows), interval=600)
        page = movie.to_jshtml(default_mode="once")
    finding = f"Film of head {head}: {len(rows)} queries choose their blocks in turn"
    last = reads(cells[rows[-1]], rows[-1])
    see = f"press play or drag the slider; at the end {last}."
    return describe(HTML(offline(page, finding)), finding, see)


def film_stills(selected, blocks, head=0, queries=None):
    """Draw four moments of `film` beside each other, for paper and for still pages.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.
        head: which head.
        queries: at most four queries; None: four spread over all.

    Returns:
        Figure.

    Raises:
        ValueError: if there are more than four queries.
        IndexError: if the head or a query does not exist.
    """
    grid, cells = layout(blocks), states(selected, blocks)
    cells = cells[:, check_index(head, cells.shape[1], "head")]
    if queries is None:
        queries = np.unique(np.arange(1, 5) * grid.S // 4 - 1).clip(0)
    stops = pick(queries, grid.S, 4)
    rows = sorted({*pick(None, grid.S, FRAMES), *stops})
    with styled():
        fig = canvas(3.6)
        axes = fig.subplots(1, len(stops), sharey=True, squeeze=False)[0]
        for ax, query in zip(axes, stops, strict=True):
            stage(ax, cells[rows], grid, rows)(rows.index(query))
            ax.set_title(f"query {query}")
            ax.label_outer()
        legend(fig, shown_states(cells), grid.packed)
        title = f"Head {head}: row by row, every query chooses for itself"
        told = [reads(cells[query], query) for query in stops]
        return finish(fig, title, f"{'; '.join(told)}.")


def pick(queries, S, most):
    """Return the queries as a list, or as many as allowed spread over all."""
    if queries is None:
        queries = np.linspace(0, S - 1, min(most, S)).round().astype(int)
    queries = [check_index(query, S, "query") for query in np.atleast_1d(queries)]
    if not 0 < len(queries) <= most:
        raise ValueError(f"queries must name 1 to {most} queries, got {len(queries)}")
    return queries


def stage(ax, cells, grid, rows):
    """Draw all rows and return a function that uncovers them up to one of them."""
    R, N = cells.shape
    draw_states(ax, cells, grid, rows)
    tick_queries(ax, rows, grid.block_size)
    tick_blocks(ax, N)
    name_axes(ax)
    cover = ax.add_patch(Rectangle((-0.5, 0), N, 1, fc="white", ec="none", zorder=5))
    frame = ax.add_patch(Rectangle((-0.5, 0), N, 1, fc="none", ec="black", lw=2))
    frame.set(zorder=6, clip_on=False)

    def update(row):
        cover.set(y=row + 0.5, height=R - 1 - row)
        frame.set_y(row - 0.5)
        ax.set_title(reads(cells[row], rows[row]))
        return cover, frame

    return update

"""Picture what each of the four steps of the pipeline leaves behind."""

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from moba_lab.viz.cells import MARK_PIXELS, cell_pixels, draw_states, tick_queries
from moba_lab.viz.layout import check_index, layout
from moba_lab.viz.load import load
from moba_lab.viz.parts import pipeline_parts
from moba_lab.viz.states import states
from moba_lab.viz.style import (
    COLOR,
    GRID,
    HATCH,
    LINE,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)
from moba_lab.viz.words import count, farthest, listed

STEPS = ("1 assign", "2 arrange", "3 attend", "4 combine")
# The height of a box; the rest of its row is a gap.
HIGH = 0.84


def pipeline_stills(
    selected, routing, lse_current, lse_past, blocks, head=0, query=None
):
    """Draw what each of the four steps leaves behind, and follow one query through.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        routing: Routing of the same choice.
        lse_current: (S, H) from `attend_current`.
        lse_past: (P,) from `attend_past`.
        blocks: Blocks.
        head: which head.
        query: the query to outline; None: the one that looks back farthest.

    Returns:
        Figure. `pipeline_parts` holds what it shows.

    Raises:
        ValueError: if the arguments do not fit each other.
        IndexError: if the head or the query does not exist.
    """
    cells, parts, grid = read(selected, routing, lse_current, lse_past, blocks, head)
    query = farthest(cells[:, None]) if query is None else query
    query = check_index(query, grid.S, "query")
    with styled():
        fig = canvas(4.6)
        axes = draw_panels(fig, cells, parts, grid)
        for ax in (axes[0], axes[3]):
            outline(ax, *ax.get_xlim(), query - 0.5, query + 0.5)
        for m in np.flatnonzero(parts.query == query):
            x, y = parts.block[m], parts.place[m]
            for ax in axes[1:3]:
                outline(ax, x - 0.5, x + 0.5, y - 0.5, y + 0.5)
        return finish(fig, *follow(parts, query, head))


def read(selected, routing, lse_current, lse_past, blocks, head):
    """Return the states (S, N) and the parts of one head, and the layout."""
    grid, cells = layout(blocks), states(selected, blocks)
    cells = cells[:, check_index(head, cells.shape[1], "head")]
    parts = pipeline_parts(routing, lse_current, lse_past, blocks, head)
    routed = load(routing, blocks)[head]
    chosen = (cells == State.SELECTED).sum(axis=0)
    if not np.array_equal(routed, chosen):
        raise ValueError(
            f"routing must hold the choice of selected: head {head} chose its blocks "
            f"{chosen.tolist()} times, the lists hold {routed.tolist()} queries"
        )
    return cells, parts, grid


def draw_panels(fig, cells, parts, grid):
    """Draw the result of every step beside each other and return the four axes."""
    axes = fig.subplots(1, 4)
    assign, arrange, attend, combine = axes
    draw_states(assign, cells, grid)
    draw_lists(arrange, parts, grid.N, np.ones(len(parts.query)))
    draw_lists(attend, parts, grid.N, parts.share)
    draw_shares(combine, parts, grid.S)
    for ax, title in zip(axes, STEPS, strict=True):
        ax.set_title(title)
    for ax in (assign, combine):
        tick_queries(ax, np.arange(grid.S), grid.block_size)
    for ax in axes[:3]:
        few = (
            FixedLocator(range(grid.N)) if grid.N <= 9 else MaxNLocator(4, integer=True)
        )
        ax.xaxis.set_major_locator(few)
    name_axes(assign)
    name_axes(arrange, y="own queries, then list")
    name_axes(attend, "key block, bar: weight", "")
    name_axes(combine, "weight, adds up to 1")
    attend.tick_params(labelleft=False)
    legend(fig, list(State)[:4], grid.packed)
    return axes


def draw_lists(ax, parts, N, filled):
    """Draw a box for every part in the column of its block, filled as far as said."""
    longest = parts.place.max(initial=0) + 1
    ax.set(xlim=(-0.5, N - 0.5), ylim=(longest - 0.4, -0.6))
    x, y = parts.block - HIGH / 2, parts.place - HIGH / 2
    large = cell_pixels(ax, (longest, N)).min() >= MARK_PIXELS
    ground = boxes(x, y, HIGH, facecolors="white", edgecolors=GRID)
    ground.set_linewidth(0.5 if large else 0)
    ax.add_collection(ground)
    draw_parts(ax, parts, x, y, HIGH * filled, large)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def draw_shares(ax, parts, S):
    """Draw the parts of every query as one bar of length 1 in the query's row."""
    ax.set(xlim=(0, 1), ylim=(S - 0.5, -0.5))
    large = cell_pixels(ax, (S, 1))[1] >= MARK_PIXELS
    # A gap of about a pixel tells two past blocks apart.
    wide = (parts.share - 0.01).clip(0)
    draw_parts(ax, parts, parts.left, parts.query - HIGH / 2, wide, large)
    ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])


def draw_parts(ax, parts, x, y, wide, large):
    """Draw parts in the colours of their states, those of current blocks hatched."""
    for own, state in ((True, State.CURRENT), (False, State.SELECTED)):
        these = parts.own == own
        area = boxes(x[these], y[these], wide[these], linewidths=0)
        # The hatch takes the colour of the edge, although the edge has no width.
        area.set(facecolor=COLOR[state], edgecolor=LINE)
        area.set_hatch(HATCH if own and large else None)
        ax.add_collection(area)


def boxes(x, y, wide, high=HIGH, **style):
    """Return rectangles with the corner (x, y) as one collection."""
    return PolyCollection(corners(x, y, wide, high), antialiaseds=False, **style)


def corners(x, y, wide, high=HIGH):
    """Return the corners (M, 4, 2) of rectangles that begin at (x, y)."""
    x, y, wide = np.broadcast_arrays(x, y, wide)
    four = [(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)]
    return np.array(four).transpose(2, 0, 1)


def outline(ax, left, right, top, bottom):
    """Frame a part of the axes in black, above everything else."""
    frame = Rectangle((left, top), right - left, bottom - top, fc="none", ec="black")
    frame.set(lw=2, zorder=6, clip_on=False)
    return ax.add_patch(frame)


def follow(parts, query, head):
    """Return title and sentence that follow one query through the four steps."""
    mine = np.flatnonzero(parts.query == query)
    past = mine[~parts.own[mine]]
    lists = len(np.unique(parts.block[~parts.own]))
    title = (
        f"Head {head}: {count((~parts.own).sum(), 'choice')} become "
        f"{count(lists, 'list')}, are read list by list, and go back to their queries"
    )
    places = [f"place {parts.place[m]} of block {parts.block[m]}" for m in mine]
    shares = [f"{parts.share[m]:.0%}" for m in mine]
    return title, (
        f"query {query} (black frames) chooses {count(len(past), 'past block')}, "
        f"stands, own queries first, at {listed(places)}, and its bar is "
        f"{listed(shares)}."
    )

"""Draw a grid of states or scores on axes: queries downwards, blocks to the right."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from moba_lab.viz.style import COLOR, GRID, HATCH, INK, LINE, MARK, State

COLORS = ListedColormap([COLOR[state] for state in State])
# Below these sizes (in pixels) a mark or a number would touch its neighbours.
MARK_PIXELS = 7
NUMBER_PIXELS = (26, 13)


def draw_states(ax, cells, grid, rows=None):
    """Draw cells (rows, columns) of `State` with the marks of every state.

    Args:
        ax: Axes.
        cells: (R, N) states of blocks or (R, SK) states of tokens.
        grid: Layout.
        rows: the query of every row; None: all queries.
    """
    rows = np.arange(len(cells)) if rows is None else np.asarray(rows)
    # Blending colours, not states, keeps single cells visible in small pictures.
    ax.imshow(
        cells,
        cmap=COLORS,
        vmin=0,
        vmax=len(State) - 1,
        aspect="auto",
        interpolation="antialiased" if len(cells) > 200 else "nearest",
        interpolation_stage="rgba",
    )
    draw_grid(ax, cells.shape, grid, rows)
    if cell_pixels(ax, cells.shape)[0] >= 5:
        hatch_current(ax, cells)
    for state, marker in MARK.items():
        row, column = np.nonzero(cells == state)
        size = min(4.0, cell_pixels(ax, cells.shape).min() / 3)
        if len(row) and size * 3 >= MARK_PIXELS:
            ax.plot(column, row, marker, color=INK[state], ms=size, mew=size / 3)


def cell_pixels(ax, shape):
    """Return about how wide and high a cell is, in pixels, before the layout ran."""
    box = ax.get_subplotspec().get_gridspec()
    size = ax.figure.get_size_inches() * ax.figure.dpi * 0.8
    return size / (box.ncols * shape[1], box.nrows * shape[0])


def draw_grid(ax, shape, grid, rows):
    """Draw the borders of cells, and of sequences where queries change sequence."""
    wide, high = cell_pixels(ax, shape)
    if high >= 6:
        ax.hlines(np.arange(1, shape[0]) - 0.5, -0.5, shape[1] - 0.5, GRID, lw=0.5)
    if wide >= 6:
        ax.vlines(np.arange(1, shape[1]) - 0.5, -0.5, shape[0] - 0.5, GRID, lw=0.5)
    edges = np.flatnonzero(np.diff(grid.first_of_query[rows])) + 0.5
    ax.hlines(edges, -0.5, shape[1] - 0.5, "black", lw=1.5)


def hatch_current(ax, cells):
    """Hatch the current block: one rectangle over neighbouring rows that share it."""
    for column in range(cells.shape[1]):
        here = np.concatenate([[False], cells[:, column] == State.CURRENT, [False]])
        edges = np.flatnonzero(np.diff(here.astype(int)))
        for top, bottom in edges.reshape(-1, 2):
            ax.add_patch(
                Rectangle(
                    (column - 0.5, top - 0.5),
                    1,
                    bottom - top,
                    facecolor="none",
                    edgecolor=LINE,
                    hatch=HATCH,
                    lw=0.8,
                )
            )


def write_numbers(ax, values, ink):
    """Write values (R, N), with one decimal, into cells that are large enough.

    Args:
        ax: Axes.
        values: (R, N) floats; only finite ones are written.
        ink: function of a value that returns the colour of its text.

    Returns:
        Whether numbers were written.
    """
    if (cell_pixels(ax, values.shape) < NUMBER_PIXELS).any():
        return False
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        text = decimal(value)
        ax.text(column, row, text, color=ink(value), ha="center", va="center")
    return True


def decimal(value):
    """Return a number with one decimal, and 0.0 for a small negative one."""
    return f"{round(float(value), 1) + 0.0:.1f}"


def tick_queries(ax, rows, every):
    """Number the rows: every one if few; of all queries, one per block; or some."""
    rows = np.asarray(rows)
    at = np.arange(len(rows))
    if len(rows) > 20 and len(rows) == rows[-1] + 1:
        at = at[::every]
    step = max(1, -(-len(at) // 20))
    ax.yaxis.set_major_locator(FixedLocator(at[::step]))
    ax.set_yticklabels([str(rows[i]) for i in at[::step]])


def tick_blocks(ax, count):
    """Number the columns: every block if few, else round numbers."""
    if count <= 16:
        ax.xaxis.set_major_locator(FixedLocator(range(count)))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))

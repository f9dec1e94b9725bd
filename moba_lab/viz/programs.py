"""Picture which program of a kernel works on which cell of the selection heatmap."""

import numpy as np

from moba_lab.viz.cells import (
    COLORS,
    draw_grid,
    hatch_current,
    tick_blocks,
    tick_queries,
)
from moba_lab.viz.layout import array, check_index, layout
from moba_lab.viz.states import states
from moba_lab.viz.style import (
    COLOR,
    INK,
    MARK,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)
from moba_lab.viz.words import farthest, listed

MOST_QUERIES, MOST_BLOCKS, MOST_KERNELS = 40, 12, 3


def program_map(selected, blocks, programs, head=0, query=None):
    """Write the number of its program into every cell that a kernel works on.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        blocks: Blocks.
        programs: {name of a kernel: (S, H, N) program ids, -1 for none}, up to three;
            see `moba_lab.programs`.
        head: which head.
        query: the query to speak of; None: the one that looks back farthest.

    Returns:
        Figure. Borders are where one program ends and another one begins.

    Raises:
        ValueError: if there are more than 40 queries, 12 blocks or 3 kernels, no
            kernel, or a map of another shape.
        IndexError: if the head or the query does not exist.
    """
    grid, cells = layout(blocks), states(selected, blocks)
    maps = {name: array(program) for name, program in programs.items()}
    check_maps(maps, cells.shape)
    head = check_index(head, cells.shape[1], "head")
    query = farthest(cells, head) if query is None else query
    query = check_index(query, grid.S, "query")
    maps = {name: program[:, head] for name, program in maps.items()}
    with styled():
        fig = canvas(1.7 + 0.15 * grid.S)
        axes = fig.subplots(1, len(maps), sharex=True, sharey=True, squeeze=False)
        for ax, (name, program) in zip(axes.flat, maps.items(), strict=True):
            draw_programs(ax, cells[:, head], program, grid)
            ax.set_title(name)
            name_axes(ax)
            ax.label_outer()
        legend(fig, packed=grid.packed)
        return finish(fig, *findings(maps, head, query))


def check_maps(maps, shape):
    """Raise ValueError unless the maps fit blocks and the picture."""
    most = MOST_QUERIES, MOST_BLOCKS
    if shape[0] > most[0] or shape[2] > most[1] or not 0 < len(maps) <= MOST_KERNELS:
        raise ValueError(
            f"expected at most {most[0]} queries, {most[1]} blocks and 1 to "
            f"{MOST_KERNELS} kernels, got {shape[0]}, {shape[2]} and {len(maps)}"
        )
    for name, program in maps.items():
        if program.shape != shape:
            raise ValueError(
                f"programs of {name} must be (S, H, N) = {shape}, got {program.shape}"
            )


def draw_programs(ax, cells, program, grid):
    """Draw states, the number of the program, and borders between programs."""
    ax.imshow(cells, cmap=COLORS, vmin=0, vmax=len(State) - 1, aspect="auto")
    draw_grid(ax, cells.shape, grid, np.arange(len(cells)))
    hatch_current(ax, cells)
    for state, marker in MARK.items():
        row, column = np.nonzero((cells == state) & (program < 0))
        ax.plot(column, row, marker, color=INK[state], ms=4, mew=4 / 3)
    for row, column in np.argwhere(program >= 0):
        state = State(cells[row, column])
        ax.text(
            *(column, row, str(program[row, column])),
            color=INK[state],
            bbox={"fc": COLOR[state], "ec": "none", "pad": 0.4},
            ha="center",
            va="center_baseline",
        )
    framed = np.pad(program, 1, constant_values=-1)
    row, column = np.nonzero(np.diff(framed[:, 1:-1], axis=0))
    ax.hlines(row - 0.5, column - 0.5, column + 0.5, "black", lw=1.6)
    row, column = np.nonzero(np.diff(framed[1:-1], axis=1))
    ax.vlines(column - 0.5, row - 0.5, row + 0.5, "black", lw=1.6)
    tick_queries(ax, np.arange(grid.S), grid.block_size)
    tick_blocks(ax, grid.N)


def findings(maps, head, query):
    """Return title and sentence: what a program has, and whom a query meets."""
    owners = {}
    for name, program in maps.items():
        owners.setdefault(share(program), []).append(name)
    told = [f"{what} in {listed(names)}" for what, names in owners.items()]
    met = []
    for name, program in maps.items():
        numbers = np.unique(program[query][program[query] >= 0]).tolist()
        noun = "program" if len(numbers) == 1 else "programs"
        met.append(f"{noun} {listed(numbers)} of {name}" if numbers else f"no {name}")
    title = f"Head {head}: a program has {', '.join(told)}"
    return title, f"query {query} meets {listed(met)}."


def share(program):
    """Say how programs divide cells: by columns, by rows, or neither."""
    row, column = np.nonzero(program >= 0)
    number = program[row, column]
    programs = len(set(number))
    if len(set(zip(number, column, strict=True))) == programs:
        return "one key block"
    by_rows = len(set(zip(number, row, strict=True))) == len(set(row))
    return "some queries" if by_rows else "some cells"

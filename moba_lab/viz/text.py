"""Picture which earlier blocks of a real text are read."""

import numpy as np
from matplotlib.patches import Rectangle

from moba_lab.viz.reading import findings, read_text
from moba_lab.viz.style import (
    COLOR,
    INK,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)

ROWS = 36
COLUMNS = 64


def text_blocks(text, blocks, selected, queries, head=None):
    """Draw the text block by block, and how often the queries read each block.

    Args:
        text: SK bytes, or (SK,) uint8.
        blocks: Blocks.
        selected: (S, H, topk) block ids, -1 for none.
        queries: query numbers, such as range(first, last) of a line.
        head: which head; None: all heads together.

    Returns:
        Figure. Of more than 36 blocks only the ones read most and the current ones
        are drawn; of more than 64 bytes in a block, only the first.

    Raises:
        ValueError: if text is not SK bytes, or queries are none or of two sequences.
        IndexError: if the head or a query does not exist.
    """
    reading = read_text(text, blocks, selected, queries, head)
    shown = rows(reading)
    wide = min(COLUMNS, max(len(reading.texts[n]) for n in shown))
    with styled():
        fig = canvas(1.5 + 0.18 * len(shown), min(8.0, max(5.0, 3.0 + 0.09 * wide)))
        ratios = {"width_ratios": [0.09 * wide, 1.6]}
        left, right = fig.subplots(1, 2, sharey=True, gridspec_kw=ratios)
        for y, n in enumerate(shown):
            write_block(left, y, reading, n, wide)
        outline(left, reading, shown, wide)
        draw_reads(right, reading, shown)
        left.set(xlim=(0, wide), ylim=(len(shown) - 0.4, -0.6))
        left.set_yticks(range(len(shown)), shown)
        left.set_xticks(range(0, wide + 1, max(8, wide // 32 * 8)))
        name_axes(left, "byte of the block", "key block")
        name_axes(right, f"times read, of {reading.pairs}", "")
        legend(fig, list(State)[1:4])
        return finish(fig, *findings(reading))


def rows(reading):
    """Return the blocks to draw, ascending: all up to the current, or the most read."""
    known = np.flatnonzero(reading.state > State.FUTURE)
    if len(known) <= ROWS:
        return known.tolist()
    own = np.flatnonzero(reading.state == State.CURRENT)
    return sorted({*own, *reading.best[: ROWS - len(own)]})


def write_block(ax, y, reading, n, wide):
    """Write the bytes of a block, each in its place, on the colour of its state."""
    state, text = State(reading.state[n]), reading.texts[n][:wide]
    ax.add_patch(Rectangle((0, y - 0.45), len(text), 0.9, fc=COLOR[state], ec="none"))
    for x, character in enumerate(text):
        if character != " ":
            ax.text(
                x + 0.5,
                y,
                character,
                color=INK[state],
                family="monospace",
                ha="center",
                va="center",
                parse_math=False,
            )


def outline(ax, reading, shown, wide):
    """Outline the bytes whose queries are looked at."""
    grid = reading.grid
    place = grid.position[reading.queries]
    for y, n in enumerate(shown):
        inside = place[grid.of_token[place] == n] - grid.start[n]
        inside = inside[inside < wide]
        if len(inside):
            size = np.ptp(inside) + 1
            frame = Rectangle((inside[0], y - 0.5), size, 1, fc="none", ec="black")
            ax.add_patch(frame)
            frame.set(lw=2, zorder=5, clip_on=False)


def draw_reads(ax, reading, shown):
    """Draw how often past blocks are read, with the number beside the bar."""
    most = max(1, reading.reads.max())
    for y, n in enumerate(shown):
        reads = reading.reads[n]
        if reading.state[n] == State.CURRENT:
            ax.text(0.05 * most, y, "current", va="center")
        elif reads:
            ax.barh(y, reads, height=0.8, color=COLOR[State.SELECTED])
            ax.text(reads + 0.05 * most, y, f"{reads}", va="center")
    ax.set_xlim(0, 1.35 * most)
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.spines[["top", "right"]].set_visible(False)

"""Picture which blocks every line of a real text reads."""

import numpy as np

from moba_lab.viz.cells import draw_grid, hatch_current, tick_blocks
from moba_lab.viz.gate import draw_values
from moba_lab.viz.layout import layout
from moba_lab.viz.reading import as_bytes, read_text, shorten
from moba_lab.viz.style import State, canvas, finish, legend, name_axes, styled

ROWS = 40


def line_spans(text, grid):
    """Return, for every line of a text that has queries, its queries.

    A line ends with its newline byte or with its sequence.

    Args:
        text: SK bytes.
        grid: Layout.
    """
    begins = np.zeros(grid.SK + 1, dtype=bool)
    begins[1:] = np.frombuffer(text, dtype=np.uint8) == 10
    begins[grid.cu_seqlens[1:]] = True
    lines = begins.cumsum()[grid.position]
    return {int(line): np.flatnonzero(lines == line) for line in np.unique(lines)}


def line_heatmap(text, blocks, selected, head=None, lines=None):
    """Draw how often the bytes of every line read every past block.

    Args:
        text: SK bytes, or (SK,) uint8.
        blocks: Blocks.
        selected: (S, H, topk) block ids, -1 for none.
        head: which head; None: all heads together.
        lines: numbers of the lines to draw, from 0; None: the last 40.

    Returns:
        Figure.

    Raises:
        ValueError: if text is not SK bytes, or a line holds no query.
        IndexError: if head is not one of the H heads.
    """
    grid, text = layout(blocks), as_bytes(text)
    if len(text) != grid.SK:
        raise ValueError(f"text must hold {grid.SK} bytes, one a key, got {len(text)}")
    spans = line_spans(text, grid)
    lines = list(spans)[-ROWS:] if lines is None else [int(line) for line in lines]
    if missing := [line for line in lines if line not in spans]:
        raise ValueError(
            f"lines must be 0 to {max(spans)} and hold queries, got {missing}"
        )
    readings = [read_text(text, blocks, selected, spans[n], head) for n in lines]
    state = np.array([reading.state for reading in readings])
    share = np.array([reading.reads / reading.pairs for reading in readings])
    share[(state == State.FUTURE) | (state == State.CURRENT)] = np.nan
    with styled():
        fig = canvas(max(3.0, 1.6 + 0.18 * len(lines)))
        ax = fig.subplots()
        image = draw_values(ax, share, state == State.CURRENT)
        draw_grid(ax, share.shape, grid, [spans[line][0] for line in lines])
        hatch_current(ax, state)
        words = [
            f"{line} {shorten(r.words)}"
            for line, r in zip(lines, readings, strict=True)
        ]
        ax.set_yticks(range(len(lines)), words, family="monospace", parse_math=False)
        tick_blocks(ax, grid.N)
        name_axes(ax, y="line of the queries")
        fig.colorbar(image, ax=ax, label="share of the line's choices", pad=0.02)
        legend(fig, (State.FUTURE, State.CURRENT), grid.packed)
        return finish(fig, *findings(share, lines, readings))


def findings(share, lines, readings):
    """Return title and sentence about the line that agrees most on one past block.

    Lines that read all there is, or that are shorter than a word, say nothing.
    """
    left = np.nansum(share == 0, axis=1) > 0
    long = np.array([len(reading.queries) >= 4 for reading in readings])
    chosen = np.where((left & long)[:, None], np.nan_to_num(share), 0)
    if not chosen.any():
        return "No line chooses among past blocks", "every line reads all of its past."
    row, block = np.unravel_index(chosen.argmax(), chosen.shape)
    told = shorten(readings[row].texts[block], 34)
    return (
        f"Line {lines[row]} reads block {block} in {share[row, block]:.0%} of its "
        f"choices, more than any line reads another",
        f'line {lines[row]} is "{shorten(readings[row].words)}", and block {block} '
        f'holds "{told}".',
    )

"""Picture the scores that the gate gives to blocks."""

import numpy as np
from matplotlib.colors import ListedColormap, Normalize

from moba_lab.viz.cells import (
    draw_grid,
    hatch_current,
    tick_blocks,
    tick_queries,
    write_numbers,
)
from moba_lab.viz.layout import array, check_index, layout
from moba_lab.viz.states import classify
from moba_lab.viz.style import (
    COLOR,
    SCORES,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)


def check_scores(scores, grid):
    """Return scores as an array (S, H, N) or say what is wrong with it."""
    scores = array(scores)
    if scores.ndim != 3 or scores.shape[::2] != (grid.S, grid.N):
        raise ValueError(
            f"scores must be (S, H, N) = ({grid.S}, H, {grid.N}), got {scores.shape}"
        )
    if np.isnan(scores).any():
        raise ValueError(f"scores hold {np.isnan(scores).sum()} NaN, expected none")
    return scores


def gate_map(scores, blocks, head=0):
    """Draw the score of every past block for every query of one head.

    Paper: Eq. 6 and the causal rules of section 2.2.

    Args:
        scores: (S, H, N) from `gate_scores`: +inf at the current block, -inf at
            blocks that must not be read.
        blocks: Blocks.
        head: which head.

    Returns:
        Figure.

    Raises:
        ValueError: if the shape is not (S, H, N), or scores hold NaN.
        IndexError: if head is not one of the H heads.
    """
    grid = layout(blocks)
    scores = check_scores(scores, grid)
    one = scores[:, check_index(head, scores.shape[1], "head")]
    finite = np.where(np.isfinite(one), one, np.nan)
    with styled():
        fig = canvas(min(7.5, 2.2 + 0.16 * grid.S))
        ax = fig.subplots()
        image = draw_scores(ax, finite, one, grid)
        name_axes(ax)
        tick_queries(ax, np.arange(grid.S), grid.block_size)
        tick_blocks(ax, grid.N)
        fig.colorbar(image, ax=ax, label="score: query · mean key", pad=0.02)
        legend(fig, (State.FUTURE, State.CURRENT), grid.packed)
        return finish(fig, *findings(finite, head, grid))


def draw_scores(ax, finite, one, grid):
    """Draw the scores of past blocks, with numbers where they fit."""
    own = np.isposinf(one)
    image = draw_values(ax, finite, own)
    draw_grid(ax, one.shape, grid, np.arange(len(one)))
    hatch_current(ax, classify(np.isfinite(one), own, own))
    write_numbers(ax, finite, ink_on(finite))
    return image


def draw_values(ax, values, own):
    """Draw finite values in cividis, current blocks orange, and the rest white."""
    draw = {"aspect": "auto", "interpolation": "nearest"}
    flat = np.ma.masked_where(~own, own.astype(float))
    ax.imshow(flat, cmap=ListedColormap([COLOR[State.CURRENT]]), **draw)
    return ax.imshow(np.ma.masked_invalid(values), cmap=SCORES, **draw)


def ink_on(values):
    """Return a function value -> black or white, whichever reads well on cividis."""
    seen = values[np.isfinite(values)]
    scale = Normalize(*((seen.min(), seen.max()) if len(seen) else (0, 1)))
    return lambda value: "black" if scale(value) > 0.5 else "white"


def findings(finite, head, grid):
    """Return title and sentence about the highest score and where rows peak."""
    if np.isnan(finite).all():
        return f"Head {head}: no query has a past block", "there is nothing to score."
    query, block = np.unravel_index(np.nanargmax(finite), finite.shape)
    best = finite[query, block]
    title = f"Head {head}: query {query} scores block {block} highest, {best:.1f}"
    return title, f"each row holds the scores of one query; {peaks(finite, grid)}."


def peaks(finite, grid):
    """Say how many blocks before their own most queries have their best past block."""
    rows = np.flatnonzero(~np.isnan(finite).all(axis=1))
    back = grid.of_query[rows] - np.nanargmax(finite[rows], axis=1)
    times = np.bincount(back[back > 0], minlength=2)
    far = 1 + times[1:].argmax()
    reach = grid.of_query - grid.first_of_query
    where = "just" if far == 1 else far
    return (
        f"the block {where} before their own scores best for {times[far]} of the "
        f"{(reach >= far).sum()} queries that have it"
    )

"""Picture how much every partial attention weighs in the merged result."""

import textwrap

import numpy as np

from moba_lab.viz.layout import array, check_index, layout
from moba_lab.viz.load import pair_lists
from moba_lab.viz.style import (
    COLOR,
    HATCH,
    INK,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)
from moba_lab.viz.words import listed


def block_weights(lse_current, lse_past, routing, blocks, head=0):
    """Return the share of every block in the softmax of every query.

    Args:
        lse_current: (S, H) from `attend_current`.
        lse_past: (P,) from `attend_past`.
        routing: Routing.
        blocks: Blocks.
        head: which head.

    Returns:
        (S, N) float64; every row adds up to 1, blocks that are not read have 0.

    Raises:
        ValueError: if a shape does not fit blocks or routing.
        IndexError: if head is not one of the H heads.
    """
    grid = layout(blocks)
    queries, offsets = pair_lists(routing, grid)
    lse_current, lse_past = array(lse_current), array(lse_past)
    if lse_current.shape != (grid.S, len(offsets)):
        raise ValueError(
            f"lse_current must be (S, H) = ({grid.S}, {len(offsets)}), "
            f"got {lse_current.shape}"
        )
    if lse_past.shape != queries.shape:
        raise ValueError(f"lse_past must be {queries.shape}, got {lse_past.shape}")
    offsets = offsets[check_index(head, len(offsets), "head")]
    pairs = slice(offsets[0], offsets[-1])
    lse = np.full((grid.S, grid.N), -np.inf)
    lse[np.arange(grid.S), grid.of_query] = lse_current[:, head]
    block = np.repeat(np.arange(grid.N), np.diff(offsets))
    lse[queries[pairs], block] = lse_past[pairs]
    weights = np.exp(lse - lse.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def merge_weights(weights, queries=None, blocks=None, parts=None, query=None):
    """Draw the weight of every partial attention as one stacked bar per query.

    Paper: section 2.3, "combine", online softmax.

    Args:
        weights: (S, N) from `block_weights`; or (R, M) weights of any M parts, each
            row adding up to 1, such as exp(lse_part - lse_merged).
        queries: the rows to draw; None: up to eight spread over all rows.
        blocks: Blocks, if the columns are its blocks: the current one is orange.
        parts: M names, if the columns are not blocks; "current" is orange.
        query: the drawn row to tell about; None: the one that takes most from parts
            other than the current one.

    Returns:
        Figure.

    Raises:
        ValueError: if weights is not two-dimensional, has a negative weight or a row
            that does not add up to 1, or if names or blocks do not fit its shape.
        IndexError: if a query does not exist, or `query` is not among those drawn.
    """
    weights = check_weights(array(weights))
    R, M = weights.shape
    grid = None if blocks is None else layout(blocks)
    if grid is not None and (R, M) != (grid.S, grid.N):
        raise ValueError(
            f"with blocks, weights must be (S, N) = ({grid.S}, {grid.N}), "
            f"got {weights.shape}"
        )
    if parts is not None and len(parts) != M:
        raise ValueError(f"parts must hold {M} names, got {len(parts)}")
    if queries is None:
        queries = np.unique(np.linspace(0, R - 1, min(R, 8)).round().astype(int))
    queries = [check_index(row, R, "query") for row in np.atleast_1d(queries)]
    names = [str(name) for name in (range(M) if parts is None else parts)]
    mine = names.index("current") if "current" in names else -1
    own = {row: mine if grid is None else grid.of_query[row] for row in queries}
    told = queries if query is None else [check_told(query, queries)]
    with styled():
        fig = canvas(1.6 + 0.4 * len(queries))
        ax = fig.subplots()
        for place, row in enumerate(queries):
            draw_bar(ax, place, weights[row], names, own[row])
        ax.set(xlim=(0, 1), ylim=(len(queries) - 0.5, -0.5))
        ax.set_yticks(range(len(queries)), queries)
        what = "part" if grid is None else "key block"
        y = "query" if grid is None else "query position"
        name_axes(ax, f"share of the merged softmax (in the bars: {what})", y)
        ax.spines[["top", "right"]].set_visible(False)
        if mine >= 0 or grid is not None:
            legend(fig, (State.SELECTED, State.CURRENT))
        return finish(
            fig, *findings({row: weights[row] for row in told}, names, own, what)
        )


def check_told(query, queries):
    """Return the query to tell about, or say that it is not drawn."""
    if query not in queries:
        raise IndexError(f"query must be one of those drawn, {queries}, got {query}")
    return query


def check_weights(weights):
    """Return weights (R, M) or say what is wrong with them."""
    if weights.ndim != 2:
        raise ValueError(f"weights must be (queries, parts), got {weights.shape}")
    total = weights.sum(axis=1)
    # Negated, so that NaN is refused too.
    bad = np.flatnonzero(~((weights >= 0).all(axis=1) & (abs(total - 1) < 1e-3)))
    if len(bad):
        raise ValueError(
            f"the weights of a query are at least 0 and add up to 1, "
            f"row {bad[0]} adds up to {total[bad[0]]:.4g}"
        )
    return weights


def draw_bar(ax, row, weights, names, own):
    """Draw the bar of one query, part after part, with names where they fit."""
    left = 0.0
    for part in np.flatnonzero(weights > 0):
        state = State.CURRENT if part == own else State.SELECTED
        wide = weights[part]
        ax.barh(
            row,
            wide,
            left=left,
            height=0.7,
            color=COLOR[state],
            edgecolor="black" if state == State.CURRENT else "white",
            lw=0.8,
            hatch=HATCH if state == State.CURRENT else None,
        )
        name = fitting(names[part], 95 * wide)
        if name:
            ax.text(
                left + wide / 2,
                row,
                name,
                parse_math=False,
                color=INK[state],
                ha="center",
                va="center",
                bbox={"fc": COLOR[state], "ec": "none", "pad": 2},
            )
        left += wide


def fitting(name, characters):
    """Return a name in one line or two, or nothing where both are too long."""
    for text in (name, textwrap.fill(name, len(name) // 2 + 2)):
        if max(map(len, text.split("\n"))) + 1 <= characters:
            return text if text.count("\n") < 2 else ""
    return ""


def findings(weights, names, own, what):
    """Return title and sentence about the heaviest part of the rows to tell about.

    Args:
        weights: {query: its weights}.
        names: the names of the parts.
        own: {query: number of its current part, -1 for none}.
        what: what a part is.
    """
    past = {q: 1 - (w[own[q]] if own[q] >= 0 else 0) for q, w in weights.items()}
    most = max(past, key=past.get)
    if own[most] < 0 or not past[most]:
        most = max(weights, key=lambda q: weights[q].max())
        name = names[weights[most].argmax()]
        return (
            f"Query {most} takes {weights[most].max():.0%} of its result from "
            + (f"{what} {name}" if name.isdigit() else name),
            "every part is weighed by exp(lse), and every bar adds up to 1.",
        )
    source = "past blocks" if what == "key block" else "the other parts"
    bar = [
        f"{weights[most][part]:.0%} "
        + ("current" if part == own[most] else f"{what} {names[part]}")
        for part in np.flatnonzero(weights[most])
    ]
    return (
        f"Query {most} takes {past[most]:.0%} of its result from {source}",
        f"the bar of query {most} is {listed(bar)}; parts are weighed by exp(lse), "
        f"and every bar adds up to 1.",
    )

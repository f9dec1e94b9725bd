"""Picture how a pack of sequences is cut into blocks."""

from itertools import pairwise

import numpy as np
from matplotlib.patches import Rectangle

from moba_lab.viz.layout import layout
from moba_lab.viz.style import GRID, LINE, canvas, finish, styled
from moba_lab.viz.words import count, listed

SHADES = ("#F7F7F7", "#E3E3E3")
TAIL = "...."
# Heights of the rows of the ruler: tokens at the bottom, sequences on top.
SEQUENCE, BLOCK, TOKEN = 2.2, 1.0, 0.0
# About how many characters fit beside each other.
CHARACTERS = 84


def block_ruler(blocks, tokens=None):
    """Draw the packed tokens as a ruler with sequences, blocks and offsets.

    Args:
        blocks: Blocks.
        tokens: SK texts to write into the token cells; None: their numbers. Above 64
            tokens the cells are left out.

    Returns:
        Figure.

    Raises:
        ValueError: if there is not one text for every token.
    """
    grid = layout(blocks)
    texts = [str(i) for i in range(grid.SK)] if tokens is None else list(tokens)
    if len(texts) != grid.SK:
        raise ValueError(f"tokens must hold {grid.SK} texts, got {len(texts)}")
    short = np.flatnonzero(grid.end - grid.start < grid.block_size)
    with styled():
        fig = canvas(2.5 if grid.SK <= 64 else 2.0)
        ax = fig.subplots()
        draw_blocks(ax, grid, short)
        if grid.SK <= 64:
            draw_tokens(ax, grid, texts)
        draw_sequences(ax, grid)
        frame(ax, grid)
        return finish(fig, title(grid, short), sentence(grid, short))


def fits(text, length, grid):
    """Return whether a text fits over so many tokens."""
    return len(text) + 0.5 <= length / grid.SK * CHARACTERS


def draw_blocks(ax, grid, short):
    """Draw every block as a box, tails dotted, with ids where they fit."""
    for n, (start, end) in enumerate(zip(grid.start, grid.end, strict=True)):
        box = Rectangle((start, BLOCK), end - start, 0.9, ec=LINE, lw=1)
        box.set(facecolor=SHADES[n % 2], hatch=TAIL if n in short else None)
        ax.add_patch(box)
        if fits(str(n), end - start, grid):
            ax.text(
                (start + end) / 2,
                BLOCK + 0.45,
                str(n),
                ha="center",
                va="center",
                fontweight="bold",
                bbox={"fc": SHADES[n % 2], "ec": "none", "pad": 1},
            )


def draw_tokens(ax, grid, texts):
    """Draw a cell for every token, in the shade of its block."""
    upright = max(map(len, texts), default=0) * grid.SK > CHARACTERS + 6
    for token, text in enumerate(texts):
        shade = SHADES[grid.of_token[token] % 2]
        ax.add_patch(Rectangle((token, TOKEN), 1, 0.9, fc=shade, ec=GRID, lw=0.5))
        ax.text(
            token + 0.5,
            TOKEN + 0.45,
            text,
            ha="center",
            va="center",
            rotation=90 if upright else 0,
            parse_math=False,
        )


def draw_sequences(ax, grid):
    """Draw a bar with ends over every sequence, named as far as there is room."""
    for b, (first, last) in enumerate(pairwise(grid.cu_seqlens)):
        if first == last:
            continue
        ends = {"arrowstyle": "|-|, widthA=0.3, widthB=0.3", "shrinkA": 1, "shrinkB": 1}
        ax.annotate("", (first, SEQUENCE), (last, SEQUENCE), arrowprops=ends)
        for name in (f"sequence {b}: {count(int(last - first), 'token')}", str(b)):
            if fits(name, last - first, grid):
                ax.text((first + last) / 2, SEQUENCE + 0.2, name, ha="center")
                break


def frame(ax, grid):
    """Put offsets below the ruler, and the names of the rows beside it."""
    rows = {"sequence": SEQUENCE, "key block": BLOCK + 0.45, "token": TOKEN + 0.45}
    if grid.SK > 64:
        del rows["token"]
    bottom = min(rows.values()) - 0.6
    ax.set(xlim=(-0.2, grid.SK + 0.2), ylim=(bottom, 3.1))
    ax.set_yticks(list(rows.values()), list(rows))
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    groups = together(np.unique(grid.cu_seqlens).tolist(), grid)
    ax.set_xticks(
        [np.mean(g) for g in groups], [", ".join(map(str, g)) for g in groups]
    )
    ax.set_xlabel("token offset (ticks: cu_seqlens)")


def together(offsets, grid):
    """Group offsets whose labels would overlap if each had its own."""
    groups = [[offsets[0]]]
    for offset in offsets[1:]:
        text = ", ".join(map(str, groups[-1]))
        near = not fits(f"{text}  ", offset - groups[-1][-1], grid)
        groups[-1].append(offset) if near else groups.append([offset])
    return groups


def title(grid, short):
    """Say how many blocks there are and how many are short."""
    return (
        f"{count(grid.SK, 'token')} in {count(len(grid.cu_seqlens) - 1, 'sequence')} "
        f"make {count(grid.N, 'block')} of {grid.block_size}, "
        + (f"{len(short)} of them short" if len(short) else "all full")
    )


def sentence(grid, short):
    """Say where the tails are and that blocks end with their sequence."""
    inner = np.unique(grid.cu_seqlens[1:-1])
    parts = [f"blocks end where their sequence ends, at {listed(inner, 6)}"]
    if not len(inner):
        parts.clear()
    if len(short):
        sizes = grid.end - grid.start
        tails = [f"{n} ({count(int(sizes[n]), 'token')})" for n in short]
        parts.append(f"short tail blocks, dotted: {listed(tails, 6)}")
    else:
        parts.append(f"every block holds {count(grid.block_size, 'token')}")
    empty = np.flatnonzero(np.diff(grid.cu_seqlens) == 0)
    if len(empty):
        parts.append(f"empty, so without a block: sequence {listed(empty)}")
    return "; ".join(parts) + "."

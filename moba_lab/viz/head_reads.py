"""Picture which blocks every head of every layer reads while an answer is written."""

import numpy as np
from matplotlib.patches import Rectangle

from moba_lab.viz.cells import tick_blocks
from moba_lab.viz.layout import array
from moba_lab.viz.style import (
    COLOR,
    HATCH,
    LINE,
    State,
    canvas,
    finish,
    legend,
    name_axes,
    styled,
)

SHADES = "Blues"


def head_reads(
    selected, queries, wanted, answer, asked="bytes of the answer", sought="needle"
):
    """Draw how many of some queries read every block, one row for each head.

    Args:
        selected: list with (S, H, topk) block ids for every layer, -1 for none; None
            for a layer with full attention, which is left out.
        queries: (n,) the queries that write the answer.
        wanted: blocks that hold what is looked for; they are outlined.
        answer: its bytes, for the title.
        asked: what the queries are.
        sought: what the wanted blocks hold.

    Returns:
        Figure.

    Raises:
        ValueError: if no layer chooses blocks, or there is no query.
    """
    chosen = {n: array(of)[queries] for n, of in enumerate(selected) if of is not None}
    if not chosen or not len(queries):
        raise ValueError(
            f"expected a layer that chooses blocks and a query, got {len(chosen)} such "
            f"layers and {len(queries)} queries"
        )
    first = next(iter(chosen.values()))
    own, heads = first[..., -1], first.shape[1]
    counts = [count(of[:, head], own.max()) for of in chosen.values()
              for head in range(heads)]  # fmt: skip
    names = [f"layer {n}, head {head}" for n in chosen for head in range(heads)]
    with styled():
        fig = canvas(1.9 + 0.3 * len(names))
        ax = fig.subplots()
        draw(ax, np.array(counts), set(own.ravel().tolist()), wanted, len(queries))
        ax.set_yticks(range(len(names)), names)
        tick_blocks(ax, own.max() + 1)
        name_axes(ax, y="layer and head")
        frame = Rectangle((0, 0), 1, 1, fc="none", ec="black", lw=2)
        extra = [(frame, f"holds the {sought}")]
        legend(fig, (State.SELECTED, State.CURRENT), extra=extra)
        told = findings(counts, names, wanted, len(queries), answer, asked, sought)
        return finish(fig, *told)


def count(past, last):
    """Count how often each of the blocks 0 to last is among the choices of queries.

    >>> count(np.array([[0, -1, 2], [0, 1, 2]]), last=2).tolist()
    [2, 1, 0]
    """
    past = past[:, :-1]
    return np.bincount(past[past >= 0], minlength=last + 1)


def draw(ax, counts, own, wanted, most):
    """Draw the numbers on blue, current blocks orange, and outline what is wanted."""
    ax.imshow(counts, cmap=SHADES, vmin=0, vmax=most * 1.2, aspect="auto")
    for (row, block), times in np.ndenumerate(counts):
        if times and counts.shape[1] <= 80:
            ink = "white" if times > 0.6 * most else "black"
            ax.text(block, row, f"{times}", color=ink, ha="center", va="center")
    for block in own:
        box = Rectangle((block - 0.5, -0.5), 1, len(counts), fc=COLOR[State.CURRENT])
        box.set(hatch=HATCH, ec=LINE)
        ax.add_patch(box)
    for block in wanted:
        frame = Rectangle((block - 0.5, -0.5), 1, len(counts), fc="none", ec="black")
        frame.set(lw=2, zorder=5, clip_on=False)
        ax.add_patch(frame)


def findings(counts, names, wanted, queries, answer, asked, sought):
    """Return title and sentence."""
    hits = [max(of[block] for block in wanted) for of in counts]
    found = [name for name, hit in zip(names, hits, strict=True) if hit]
    text = answer.decode("latin-1")
    blocks = f"block {' or '.join(map(str, wanted))}"
    if not found:
        title = f"No head reads {blocks} while {text!r} is written"
    else:
        title = f"{len(found)} of {len(names)} heads read {blocks} for {text!r}"
    best = int(np.argmax(hits))
    return title, (
        f"the numbers count the {queries} {asked}; {names[best]} reads the "
        f"{sought}'s block for {hits[best]} of them."
    )

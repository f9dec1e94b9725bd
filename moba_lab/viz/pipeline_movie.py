"""Play the four steps of the pipeline one after the other."""

import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moba_lab.viz.offline import offline
from moba_lab.viz.pipeline import (
    HIGH,
    STEPS,
    boxes,
    corners,
    draw_panels,
    outline,
    read,
)
from moba_lab.viz.style import DPI, describe, styled
from moba_lab.viz.words import count

# The steps that go down the queries; the others go along the blocks.
BY_QUERY = (1, 4)
FRAMES_PER_STEP = 8


def pipeline_film(selected, routing, lse_current, lse_past, blocks, head=0):
    """Play the four steps of one head; every frame frames what moves, and whereto.

    Step 1 goes down the queries, steps 2 and 3 along the blocks, step 4 down the
    queries again, at most eight frames each. The last frame shows what
    `pipeline_stills` shows.

    Args:
        selected: (S, H, topk) block ids, -1 for none.
        routing: Routing of the same choice.
        lse_current: (S, H) from `attend_current`.
        lse_past: (P,) from `attend_past`.
        blocks: Blocks.
        head: which head.

    Returns:
        `IPython.display.HTML` with `what_to_see` and `alt`; give it to `show`.

    Raises:
        ValueError: if the arguments do not fit each other.
        IndexError: if the head does not exist.
    """
    from IPython.display import HTML

    cells, parts, grid = read(selected, routing, lse_current, lse_past, blocks, head)
    with styled():
        fig = Figure(figsize=(8.0, 3.4), dpi=DPI, layout="constrained")
        frames = moments(grid.S, grid.N)
        axes = draw_panels(fig, cells, parts, grid)
        update = stage(fig, axes, parts, grid, frames)
        update(len(frames) - 1)
        fig.draw_without_rendering()
        # Any engine, even one that does nothing, has every frame drawn twice.
        fig.set_layout_engine(None)
        movie = FuncAnimation(fig, update, len(frames), interval=800)
        page = movie.to_jshtml(default_mode="once")
    finding = (
        f"Film of head {head}: the four steps of the pipeline, one after the other"
    )
    lists = np.bincount(parts.block[~parts.own], minlength=grid.N)
    see = (
        f"press play or drag the slider; block {lists.argmax()} has the longest list, "
        f"{count(lists.max(), 'query')}, and step 4 brings all parts back to their "
        f"rows."
    )
    return describe(HTML(offline(page, finding, slider="step")), finding, see)


def moments(S, N):
    """List the frames of the film as (step, rows or columns that it uncovers).

    Example: two queries and one block.
        >>> moments(2, 1)
        [(1, [0]), (1, [1]), (2, [0]), (3, [0]), (4, [0]), (4, [1])]
    """
    frames = []
    for step, size in enumerate((S, N, N, S), start=1):
        groups = np.array_split(np.arange(size), min(size, FRAMES_PER_STEP) or 1)
        frames += [(step, group.tolist()) for group in groups if size]
    return frames


def stage(fig, axes, parts, grid, frames):
    """Cover all panels and return a function that uncovers them up to one frame.

    It frames what the step takes, in the panel before, and what it makes of it.
    """
    covers = [
        ax.add_patch(Rectangle((0, 0), 1, 1, fc="white", ec="none", zorder=2.4))
        for ax in axes
    ]
    frame_of = [outline(ax, 0, 1, 0, 1) for ax in axes]
    leaving = boxes([], [], [], facecolors="none", edgecolors="black", zorder=6)
    axes[2].add_collection(leaving)

    def update(frame):
        step, group = frames[frame]
        for panel, ax in enumerate(axes, start=1):
            size = grid.S if panel in BY_QUERY else grid.N
            done = group[-1] + 1 if panel == step else size * (panel < step)
            place(covers[panel - 1], ax, panel, done, size)
            place(frame_of[panel - 1], ax, step, group[0], group[-1] + 1)
            takes = panel == step - 1 and step < 4
            frame_of[panel - 1].set_visible(panel == step or takes)
        out = np.isin(parts.query, group) & (step == 4)
        leaving.set_verts(
            corners(parts.block[out] - HIGH / 2, parts.place[out] - HIGH / 2, HIGH)
        )
        fig.suptitle(caption(parts, step, group))

    return update


def place(patch, ax, step, first, end):
    """Lay a rectangle over [first, end): rows in steps 1 and 4, else columns."""
    left, right = ax.get_xlim()
    bottom, top = ax.get_ylim()
    if step in BY_QUERY:
        patch.set_bounds(left, first - 0.5, right - left, end - first)
    else:
        patch.set_bounds(first - 0.5, top, end - first, bottom - top)


def caption(parts, step, group):
    """Say what a step does with consecutive queries (steps 1, 4) or blocks (2, 3)."""
    noun = "query" if step in BY_QUERY else "block"
    which = f"{noun} {group[0]}"
    if len(group) > 1:
        which = (
            f"{'queries' if step in BY_QUERY else 'blocks'} {group[0]} to {group[-1]}"
        )
    here = np.isin(parts.block, group)
    own, chose = count((here & parts.own).sum(), "query"), (here & ~parts.own).sum()
    merged = count(np.isin(parts.query, group).sum(), "part")
    return {
        1: f"{STEPS[0]}: {which}, each for itself",
        2: f"{STEPS[1]}: {which}, {own} inside and {chose} that chose it",
        3: f"{STEPS[2]}: {which}, read causally by {own} inside and whole by {chose}",
        4: f"{STEPS[3]}: {which}, {merged} merged",
    }[step]

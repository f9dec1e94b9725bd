"""Picture associative recall against the size of blocks."""

import numpy as np
from matplotlib.lines import Line2D

from moba_lab.viz.style import LINE, canvas, finish, legend, name_axes, styled
from moba_lab.viz.training import plain
from moba_lab.viz.words import listed

# Colour, marker and line of every curve.
ANSWERED = ("#0072B2", "o", "-", "MoBA, queries answered (line: mean)")
READ = ("#E69F00", "D", ":", "MoBA, block read by the best head (line: mean)")
FULL = ("#000000", "", "--", "full attention, queries answered")


def recall_curves(curves, full, pairs, claims, source):
    """Draw which share of queries MoBA answers, a panel for every arrangement.

    Args:
        curves: dict from arrangement to a list of (block_size, scores, reads), the two
            with one number for every seed.
        full: dict from arrangement to full attention's scores.
        pairs: pairs of a sequence.
        claims: sentences; the first one is the title.
        source: hardware, versions and dates.

    Returns:
        Figure.
    """
    with styled():
        fig = canvas(4.2)
        row = fig.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for ax, (name, points) in zip(row, curves.items(), strict=True):
            ax.set_title(f"{pairs} pairs {name}")
            sizes = [size for size, _, _ in points]
            draw_seeds(ax, sizes, [scores for _, scores, _ in points], ANSWERED)
            draw_seeds(ax, sizes, [reads for _, _, reads in points], READ)
            join_seeds(ax, points)
            if full[name]:
                ax.axhline(np.mean(full[name]), color=FULL[0], ls=FULL[2])
            ax.set_xscale("log", base=2)
            ax.set_xticks(sizes, sizes)
            ax.set_ylim(-0.03, 1.05)
            name_axes(ax, "tokens per block", "share" if ax is row[0] else "")
            plain(ax)
        drawn = row[0].get_lines()
        extra = [
            (line, line.get_label()) for line in drawn if line.get_label()[0] != "_"
        ]
        if any(full.values()):
            extra.append((drawn[-1], FULL[3]))
        extra.append((Line2D([], [], color=LINE, lw=1), "joins both of a seed"))
        legend(fig, (), extra=extra)
        fig.legends[-1].set_title(f"trained on {source}")
        return finish(fig, *findings(curves, full, claims))


def draw_seeds(ax, sizes, values, look):
    """Draw the mean of the seeds as a line, and every seed as a mark."""
    color, marker, line, name = look
    means = [np.mean(of) for of in values]
    ax.plot(sizes, means, color=color, ls=line, marker=marker, ms=0, alpha=0.6)
    points = [
        pair
        for size, of in zip(sizes, values, strict=True)
        for pair in zip(beside(size, len(of)), of, strict=True)
    ]
    x, y = zip(*points, strict=True) if points else ((), ())
    ax.plot(x, y, marker, color=color, ms=5, label=name)


def beside(size, seeds):
    """Return where the seeds of a size stand, side by side on a logarithmic scale.

    >>> [round(float(x), 2) for x in beside(16, 2)], beside(8, 1).tolist()
    ([15.14, 16.91], [8.0])
    """
    return size * 2.0 ** (0.16 * (np.arange(seeds) - (seeds - 1) / 2))


def join_seeds(ax, points):
    """Draw a thin line from what a seed answers to what its best head reads."""
    for size, scores, reads in points:
        ax.vlines(beside(size, len(scores)), scores, reads, color=LINE, lw=1)


def findings(curves, full, claims):
    """Return title and sentence."""
    parts = []
    for name, points in curves.items():
        shares = [f"{100 * np.mean(scores):.0f} %" for _, scores, _ in points]
        sizes = [size for size, _, _ in points]
        dense = (
            f"full attention {100 * np.mean(full[name]):.0f} %" if full[name] else ""
        )
        parts.append(
            f"pairs {name}: {dense}, MoBA {listed(shares)} with blocks of "
            f"{listed(sizes)}"
        )
    title = claims[0] if claims else "Recall against the size of blocks"
    return title, f"{'; '.join([*claims[1:], *parts])}."

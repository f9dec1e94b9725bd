"""Picture associative recall against the size of blocks."""

import numpy as np

from moba_lab.viz.style import canvas, finish, legend, name_axes, styled
from moba_lab.viz.training import plain
from moba_lab.viz.words import listed

# Colour, marker and line of every curve.
ANSWERED = ("#0072B2", "o", "-", "MoBA, queries answered (a seed; line: mean)")
READ = ("#E69F00", "D", ":", "MoBA, block read by the best head (a seed)")
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
            if full[name]:
                ax.axhline(np.mean(full[name]), color=FULL[0], ls=FULL[2])
            ax.set_xscale("log", base=2)
            ax.set_xticks(sizes, sizes)
            ax.set_ylim(-0.03, 1.05)
            name_axes(
                ax,
                "tokens per block, as many past tokens read",
                "share" if ax is row[0] else "",
            )
            plain(ax)
        drawn = row[0].get_lines()
        extra = [
            (line, line.get_label()) for line in drawn if line.get_label()[0] != "_"
        ]
        if any(full.values()):
            extra.append((drawn[-1], FULL[3]))
        legend(fig, (), extra=extra)
        fig.legends[-1].set_title(f"trained on {source}")
        return finish(fig, *findings(curves, full, claims))


def draw_seeds(ax, sizes, values, look):
    """Draw the mean of the seeds as a line, and every seed as a mark."""
    color, marker, line, name = look
    means = [np.mean(of) for of in values]
    ax.plot(sizes, means, color=color, ls=line, marker=marker, ms=0, alpha=0.6)
    points = [(s, x) for s, of in zip(sizes, values, strict=True) for x in of]
    x, y = zip(*points, strict=True) if points else ((), ())
    ax.plot(x, y, marker, color=color, ms=5, label=name)


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

"""Picture what was measured of a model: needles by depth and length, loss by position.

Both compare MoBA with full attention on lengths in tokens of the model's tokenizer.
"""

import numpy as np
from matplotlib.lines import Line2D

from moba_lab.viz.needles import draw_scores
from moba_lab.viz.style import FONT, canvas, finish, name_axes, styled
from moba_lab.viz.training import LOOKS, plain
from moba_lab.viz.words import length

# Lengths that have a panel of their own, the longest ones.
MOST = 4


def needle_scores(panels, lengths, depths, source):
    """Draw the share of keys found by depth and length, one panel for each attention.

    Args:
        panels: dict from "moba" or "full" to scores (depths, lengths), 0 to 1; NaN
            where nothing was measured.
        lengths: tokens, ascending.
        depths: places of the needle, 0 to 1.
        source: model, hardware and versions.

    Returns:
        Figure.
    """
    with styled():
        fig = canvas(1.6 + 0.34 * len(depths))
        axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (kind, scores) in zip(axes, panels.items(), strict=True):
            scores = np.asarray(scores, dtype=float)
            image = draw_scores(ax, scores, depths)
            ax.set_title(LOOKS[kind][0])
            ax.set_xticks(range(len(lengths)), [length(n) for n in lengths])
            name_axes(
                ax, "tokens of text", "depth of the needle" if ax is axes[0] else ""
            )
        fig.colorbar(image, ax=axes.tolist(), label="keys found", pad=0.02)
        fig.supxlabel(source, fontsize=FONT)
        finding = "; ".join(found(kind, scores) for kind, scores in panels.items())
        return finish(fig, finding, f"{spans(panels, lengths)}.")


def found(kind, scores):
    """Say in words how many keys were found."""
    if np.isnan(scores).all():
        return f"{LOOKS[kind][0]}: nothing measured"
    share = f"{100 * np.nanmean(scores):.0f} %"
    return f"{LOOKS[kind][0]} finds {share} of the keys"


def spans(panels, lengths):
    """Say in words what was found in the shortest and in the longest texts."""
    parts = []
    for kind, scores in panels.items():
        scores = np.asarray(scores, dtype=float)
        ends = [
            f"{100 * np.nanmean(scores[:, i]):.0f} % in {length(lengths[i])} tokens"
            for i in dict.fromkeys((0, len(lengths) - 1))
            if not np.isnan(scores[:, i]).all()
        ]
        parts.append(f"{LOOKS[kind][0]} finds {' and '.join(ends) or 'nothing'}")
    return "; ".join(parts)


def loss_curves(curves, source):
    """Draw perplexity and bits per byte against the position in the context.

    Args:
        curves: dict from (length, "moba" or "full") to (losses, bits), the means of
            equal parts of the context: nats per token, and bits per byte, NaN for a
            part without a byte.
        source: model, hardware and versions.

    Returns:
        Figure.
    """
    lengths = sorted({size for size, _ in curves})[-MOST:]
    with styled():
        fig = canvas(5.0)
        grid = fig.subplots(2, len(lengths), sharey="row", sharex="col", squeeze=False)
        for (top, bottom), size in zip(grid.T, lengths, strict=True):
            for (_, kind), (losses, bits) in curves_of(curves, size):
                draw(top, size, kind, np.exp(losses))
                draw(bottom, size, kind, bits)
            top.set_title(f"{length(size)} tokens")
            first = size == lengths[0]
            name_axes(top, "", "perplexity per token" if first else "")
            name_axes(
                bottom, "position in the context", "bits per byte" if first else ""
            )
            bottom.set_xlim(0, size)
            plain(top)
            plain(bottom)
        kinds = dict.fromkeys(kind for _, kind in curves)
        handles = [
            Line2D([], [], label=LOOKS[kind][0], **look_of(kind)) for kind in kinds
        ]
        fig.legend(
            handles=handles,
            loc="outside lower center",
            ncols=2,
            frameon=False,
            title=source,
            title_fontsize=FONT,
        )
        return finish(fig, *words(curves, lengths[-1]))


def curves_of(curves, size):
    """Return the curves of one length."""
    return [item for item in curves.items() if item[0][0] == size]


def look_of(kind):
    """Return how the line of an attention looks."""
    _, color, marker, line = LOOKS[kind]
    return {"color": color, "marker": marker, "ls": line, "ms": 4, "lw": 1.5}


def draw(ax, size, kind, values):
    """Draw the means of equal parts of a context at their middles."""
    at = (np.arange(len(values)) + 0.5) * size / len(values)
    ax.plot(at, values, **look_of(kind))


def words(curves, size):
    """Return title and sentence about the longest context."""
    ends = {
        kind: (np.exp(losses[0]), np.exp(losses[-1]))
        for (_, kind), (losses, _) in curves_of(curves, size)
    }
    last_ones = ", ".join(
        f"{LOOKS[kind][0]} {last:,.4g}" for kind, (_, last) in ends.items()
    )
    title = f"Perplexity per token at the end: {last_ones}"
    sentence = "; ".join(
        f"{LOOKS[kind][0]} goes from a perplexity of {first:,.4g} to {last:,.4g} "
        f"per token within {length(size)} tokens"
        for kind, (first, last) in ends.items()
    )
    return title, f"{sentence}."

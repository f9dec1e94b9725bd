"""Picture where in which texts a needle was found, and whether the gate missed it."""

import numpy as np

from moba_lab.viz.style import FONT, SCORES, canvas, finish, name_axes, styled
from moba_lab.viz.training import plain
from moba_lab.viz.words import length

NAMES = {
    ("full", "moba"): "full attention",
    ("moba", "moba"): "MoBA",
    ("moba", "full"): "MoBA,\nanswer in full",
    ("hybrid", "moba"): "MoBA,\nlast layers full",
    ("hybrid", "full"): "last layers full,\nanswer in full",
}
BEST, MISSED = "#0072B2", "#D55E00"


def needle_heatmaps(panels, lengths, depths, claims, source):
    """Draw the share of needles found by depth and length, one panel for each kind.

    Below each panel: how often the best head read the needle's block, and which share
    of the texts was lost because no head did.

    Args:
        panels: dict from (attention, way of decoding), a key of `NAMES`, to (scores,
            best, missed): scores (depths, lengths); best and missed, one number or
            None for every length.
        lengths: bytes of the texts, ascending.
        depths: places of the needle, 0 to 1.
        claims: sentences; the first one is the title.
        source: hardware, versions and dates.

    Returns:
        Figure.
    """
    with styled():
        fig = canvas(6.0 if panels else 2.0)
        if not panels:
            finding = "No needle was looked for yet"
            return finish(fig, finding, "there is nothing to draw.")
        grid = fig.subplots(
            2, len(panels), sharey="row", height_ratios=(4, 1.2), squeeze=False
        )
        for column, (key, (scores, best, missed)) in enumerate(panels.items()):
            top, bottom = grid[:, column]
            draw_scores(top, np.asarray(scores), depths)
            top.set_title(NAMES[key])
            draw_routing(bottom, best, missed)
            bottom.set_xticks(range(len(lengths)), [length(n) for n in lengths])
            bottom.set_xlim(-0.5, len(lengths) - 0.5)
            words = "depth of the needle; cells: % of the keys found"
            name_axes(top, "", words if column == 0 else "")
            name_axes(bottom, "bytes of text", "share" if column == 0 else "")
        lines = [
            line
            for ax in grid[1]
            for line in ax.get_lines()
            if not line.get_label().startswith("_")
        ]
        fig.legend(
            handles=list({line.get_label(): line for line in lines}.values()),
            loc="outside lower center",
            ncols=2,
            frameon=False,
            title=f"trained on {source}",
            title_fontsize=FONT,
        )
        return finish(fig, *findings(panels, lengths, claims))


def draw_scores(ax, scores, depths):
    """Draw shares as colours with their numbers in percent; NaN is left blank."""
    image = ax.imshow(scores, cmap=SCORES, vmin=0, vmax=1, aspect="auto")
    for (row, column), score in np.ndenumerate(scores):
        text = "–" if np.isnan(score) else f"{100 * score:.0f}"
        ink = "white" if score <= 0.5 else "black"
        ax.text(column, row, text, color=ink, ha="center", va="center")
    ax.set_xticks([])
    ax.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    ax.tick_params(length=0)
    return image


def draw_routing(ax, best, missed):
    """Draw how often the best head read the block, and texts lost to the gate."""
    for values, color, marker, line, name in (
        (best, BEST, "o", "-", "needle's block read by the best head"),
        (missed, MISSED, "^", "--", "texts lost because no head read it"),
    ):
        at = [i for i, value in enumerate(values) if value is not None]
        if at:
            shares = [values[i] for i in at]
            ax.plot(at, shares, color=color, marker=marker, ls=line, ms=5, label=name)
    if all(value is None for value in best):
        ax.text(0.5, 0.5, "reads all", transform=ax.transAxes, ha="center")
    ax.set_ylim(-0.08, 1.08)
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    plain(ax, "y")


def findings(panels, lengths, claims):
    """Return title and sentence."""
    parts = [
        f"{NAMES[key].replace(chr(10), ' ')} finds "
        f"{100 * np.mean(scores[:, 0]):.0f} % of the keys in {length(lengths[0])} "
        f"bytes and {100 * np.mean(scores[:, -1]):.0f} % in {length(lengths[-1])}"
        for key, (scores, _, _) in panels.items()
    ]
    title = claims[0] if claims else "Keys found by depth and length"
    return title, f"{'; '.join([*claims[1:], *parts])}."

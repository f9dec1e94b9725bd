"""Picture where two results differ."""

import numpy as np
from matplotlib.colors import ListedColormap, LogNorm

from moba_lab.viz.layout import array
from moba_lab.viz.style import SCORES, canvas, finish, name_axes, styled

# An error of exactly zero has no place on a logarithmic scale.
EXACT = "#FFFFFF"
BROKEN = "#000000"


def error_map(error, name="out", tolerance=None):
    """Draw how far two results differ for every query and head, on a log scale.

    Args:
        error: (S, H), such as |fast - ref| of lse; or (S, H, D), of which the largest
            over D is drawn. The sign is ignored.
        name: what was compared.
        tolerance: the largest error allowed; None: the title makes no judgement.

    Returns:
        Figure.

    Raises:
        ValueError: if error has another rank or is empty.
    """
    error = np.abs(array(error)).astype(float)
    if error.ndim not in (2, 3) or not error.size:
        raise ValueError(f"error must be (S, H) or (S, H, D), got {error.shape}")
    # Over all values, as `agree` counts, not over the largest of every pair.
    rms = np.sqrt((error**2).mean())
    if error.ndim == 3:
        error = error.max(axis=2)
    broken = ~np.isfinite(error)
    worst = np.unravel_index(np.where(broken, np.inf, error).argmax(), error.shape)
    with styled():
        fig = canvas(min(7.0, 2.6 + 0.09 * len(error)))
        ax = fig.subplots()
        image = draw_errors(ax, error, broken)
        if broken.any() or error.any():
            circle_worst(ax, worst, error)
        ax.set_xticks(range(0, error.shape[1], -(-error.shape[1] // 16)))
        name_axes(ax, "query head")
        if image is not None:
            text = f"|difference of {name}|, log scale (white: 0)"
            fig.colorbar(image, ax=ax, label=text, pad=0.02)
        return finish(fig, *findings(error, rms, worst, name, tolerance))


def draw_errors(ax, error, broken):
    """Draw errors in cividis, zeros white, NaN and infinity black with a cross."""
    ax.set_facecolor(EXACT)
    drawn = np.ma.masked_where(broken | (error == 0), error)
    image = None
    if drawn.count():
        low, high = drawn.min(), drawn.max()
        norm = LogNorm(min(low, high / 10), high)
        image = ax.imshow(
            drawn, norm=norm, cmap=SCORES, aspect="auto", interpolation="nearest"
        )
    ax.set(xlim=(-0.5, error.shape[1] - 0.5), ylim=(len(error) - 0.5, -0.5))
    if broken.any():
        ground = np.ma.masked_where(~broken, broken.astype(float))
        ax.imshow(ground, cmap=ListedColormap([BROKEN]), aspect="auto")
        row, column = np.nonzero(broken)
        ax.plot(column, row, "x", color="white", ms=6)
    return image


def circle_worst(ax, worst, error):
    """Ring the worst pair in two colours, so that it shows on any ground."""
    token, head = worst
    ax.plot(head, token, "o", mfc="none", mec="white", mew=4, ms=14, clip_on=False)
    ax.plot(head, token, "o", mfc="none", mec="black", mew=1.5, ms=14, clip_on=False)
    low, left = token < len(error) / 2, head >= error.shape[1] / 2
    ax.annotate(
        "worst",
        (head, token),
        (-12 if left else 12, -14 if low else 14),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        bbox={"fc": "white", "ec": "black", "boxstyle": "round,pad=0.2"},
    )


def findings(error, rms, worst, name, tolerance):
    """Return title and sentence about the worst pair."""
    token, head = worst
    broken = ~np.isfinite(error)
    place = f"query {token}, head {head}"
    if broken.any():
        return f"{name}: NaN or infinity in {broken.sum()} of {broken.size} cells", (
            f"black squares with a cross are no numbers, the first at {place}."
        )
    largest = error[worst]
    if not largest:
        return f"{name} is exactly equal", "no cell has a colour: every error is 0."
    title = f"{name} differs by at most {largest:.1e}, at {place}"
    if tolerance is not None:
        verdict = "within" if largest <= tolerance else "more than"
        title += f": {verdict} the {tolerance:.1e} allowed"
    return title, (
        f"the worst error, {largest:.1e}, is at {place} (ring); the typical one "
        f"(root mean square of all values) is {rms:.1e}."
    )

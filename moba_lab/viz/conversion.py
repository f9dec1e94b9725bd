"""Picture what a dense model loses when it is switched to MoBA, and wins back."""

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from moba_lab.viz.style import FONT, LINE, canvas, finish, name_axes, styled
from moba_lab.viz.training import plain

# Legend, colour, marker, line. A model is named by how it was trained on, then read.
LOOKS = {
    "before": ("dense model, in full", LINE, "", ":"),
    "switched": ("dense model, switched to MoBA", "#D55E00", "v", ":"),
    "moba": ("trained on with MoBA, by MoBA", "#0072B2", "o", "-"),
    "moba in full": ("trained on with MoBA, in full", "#56B4E9", "D", "-."),
    "full": ("trained on in full, in full", "#000000", "s", "--"),
    "full by moba": ("trained on in full, by MoBA", "#E69F00", "^", "-."),
}
OVER_TOKENS = ("moba", "moba in full", "full", "full by moba")
BY_POSITION = ("before", "switched", "moba", "full")


def conversion_curves(trailing, positions, length, source):
    """Draw losses over the tokens of continued training, and along the context.

    Args:
        trailing: dict from keys of `OVER_TOKENS` to (tokens, losses) in order: losses
            of the last sixteenth of held-out texts, nats per token.
        positions: dict from keys of `BY_POSITION` to the mean losses of equal parts of
            the context.
        length: tokens of the context.
        source: model, hardware and versions.

    Returns:
        Figure.

    Raises:
        ValueError: "moba" or "moba in full" is missing, of which the title speaks.
    """
    known = {"moba", "moba in full"} <= set(trailing)
    if not known or not {"before", "switched"} <= set(positions):
        raise ValueError(
            "expected trailing losses of 'moba' and 'moba in full', and losses by "
            f"position 'before' and 'switched', got {list(trailing)} and "
            f"{list(positions)}"
        )
    with styled():
        fig = canvas(4.9)
        left, right = fig.subplots(1, 2)
        for kind in filter(trailing.get, OVER_TOKENS):
            left.plot(*trailing[kind], **look(kind))
        left.xaxis.set_major_formatter(EngFormatter(sep=""))
        name_axes(left, "tokens trained on", "loss of the last sixteenth, nats")
        for kind in filter(positions.get, BY_POSITION):
            losses = positions[kind]
            at = (np.arange(len(losses)) + 0.5) * length / len(losses)
            right.plot(at, losses, **look(kind))
        right.set_xlim(0, length)
        name_axes(right, "position in the context", "loss, nats per token")
        for ax in (left, right):
            plain(ax)
        handles = dict.fromkeys([*OVER_TOKENS, *BY_POSITION])
        handles = [k for k in handles if trailing.get(k) or positions.get(k)]
        draw_legend(fig, handles, source)
        return finish(fig, *findings(trailing))


def look(kind):
    """Return how the line of a kind looks."""
    _, color, marker, line = LOOKS[kind]
    return {"color": color, "marker": marker, "ls": line, "ms": 4, "lw": 1.5}


def draw_legend(fig, kinds, source):
    """Put the kinds and where the numbers are from below the axes."""
    handles = [Line2D([], [], label=LOOKS[kind][0], **look(kind)) for kind in kinds]
    fig.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        title=source,
        title_fontsize=FONT,
    )


def findings(trailing):
    """Return title and sentence about the ends of the texts."""
    tokens, losses = trailing["moba"]
    in_full, control, switched = (
        trailing[kind][1] if trailing.get(kind) else None
        for kind in ("moba in full", "full", "full by moba")
    )
    before, after = in_full[0], EngFormatter(places=0, sep="")(tokens[-1])
    sentence = f"the loss by MoBA goes from {losses[0]:.3f} to {losses[-1]:.3f}"
    if control and switched:
        title = (
            f"Trained on in full, the switch costs {switched[-1] - control[-1]:.2f} "
            f"nats at the end of a text; after {after} tokens with MoBA "
            f"{losses[-1] - control[-1]:.2f} are left"
        )
        sentence += f"; of a model trained on in full, in full, from {before:.3f} to "
        sentence += f"{control[-1]:.3f}"
    else:
        title = (
            f"The switch costs {losses[0] - before:.2f} nats at the end of a text; "
            f"after {after} tokens with MoBA {losses[-1] - in_full[-1]:.2f} are left, "
            "on the same weights"
        )
        sentence += f", from {before:.3f} in full before the switch"
    return title, sentence + "."

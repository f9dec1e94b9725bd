"""Picture what the gate's signal-to-noise ratio predicts, and what was found."""

import numpy as np

from moba_lab.viz.style import LINE, canvas, finish, legend, name_axes, styled
from moba_lab.viz.training import plain

MARKS = ("o", "^", "s", "D", "v", "P")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def router_recall(gate, heads, claims, source):
    """Draw measured recall against the ratio, and against prediction for real heads.

    Args:
        gate: rows of simulations: head_dim, topk, snr, predicted, hits, trials.
        heads: rows of trained models: key_conv, length, predicted_heads, recall.
        claims: sentences about what the convolution of keys changes.
        source: hardware, versions and dates.

    Returns:
        Figure.
    """
    with styled():
        fig = canvas(4.6)
        left, right = fig.subplots(1, 2)
        lines = draw_gate(left, gate)
        points = draw_heads(right, heads)
        if lines or points:
            legend(fig, (), extra=[*lines, *points])
            fig.legends[-1].set_title(f"measured on {source}")
        return finish(fig, *findings(gate, heads, claims))


def draw_gate(ax, gate):
    """Draw one curve of predictions for each topk, and a mark for each setting."""
    topks = sorted({row["topk"] for row in gate})
    dims = sorted({row["head_dim"] for row in gate})
    entries = []
    for topk, line in zip(topks, ("-", "--", "-.", ":"), strict=False):
        of = sorted((r["snr"], r["predicted"]) for r in gate if r["topk"] == topk)
        [drawn] = ax.plot(*zip(*of, strict=True), color=LINE, ls=line, lw=1.2)
        entries.append((drawn, f"predicted, topk {topk}"))
    for dim, mark, color in zip(dims, MARKS, COLORS, strict=False):
        of = [row for row in gate if row["head_dim"] == dim]
        x = [row["snr"] for row in of]
        y = [row["hits"] / row["trials"] for row in of]
        [drawn] = ax.plot(x, y, mark, color=color, ms=4, alpha=0.8)
        entries.append((drawn, f"measured, D = {dim}"))
    ax.set_title("random keys")
    ax.set_ylim(-0.03, 1.05)
    name_axes(ax, "signal-to-noise ratio", "share of wanted blocks chosen")
    plain(ax)
    return entries


def draw_heads(ax, heads):
    """Draw measured against predicted recall for the heads of trained models."""
    entries = []
    ax.plot([0, 1], [0, 1], color=LINE, lw=1)
    widths = sorted({row["key_conv"] for row in heads})
    for width, mark, color in zip(widths, MARKS[3:], COLORS[3:], strict=False):
        of = [row for row in heads if row["key_conv"] == width]
        x = np.concatenate([np.atleast_1d(row["predicted_heads"]) for row in of])
        y = np.concatenate([np.atleast_1d(row["recall"]) for row in of])
        [drawn] = ax.plot(x, y, mark, color=color, ms=5, alpha=0.8)
        entries.append((drawn, f"trained heads, key width {width}"))
    ax.set(title="trained heads, pass keys", xlim=(-0.03, 1.05), ylim=(-0.03, 1.05))
    name_axes(ax, "predicted from the ratio of the scores", "measured")
    plain(ax)
    return entries


def findings(gate, heads, claims):
    """Return title and sentence."""
    off = [abs(row["hits"] / row["trials"] - row["predicted"]) for row in gate]
    title = "What the gate finds"
    if off:
        title = (
            f"The signal-to-noise ratio predicts what the gate finds among random keys "
            f"within {max(off):.3f}"
        )
    parts = list(claims)
    if heads:
        pairs = [
            (np.atleast_1d(row["predicted_heads"]), np.atleast_1d(row["recall"]))
            for row in heads
        ]
        gap = np.concatenate([np.abs(a - b) for a, b in pairs])
        parts.append(f"for trained heads it is off by {gap.mean():.2f} on average")
    return title, "; ".join(parts or ["marks lie on the curves"]) + "."

"""Picture predicted against measured speed-ups over dense attention."""

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from moba_lab.viz.curves import PROGRAMS, explain
from moba_lab.viz.style import GRID, LINE, canvas, finish, name_axes, styled
from moba_lab.viz.words import listed

# What can be known without a clock, and what others reported.
PREDICTED = {
    "pairs": ("predicted from pairs alone", "|", "none"),
    "floor": ("predicted from FLOPs and bytes", "D", "none"),
    "paper": ("reported by the paper", "*", "black"),
}
MEASURED = ("flash", "triton")


def speedup_rows(points, source):
    """Draw one row per workload: what was predicted, and what was measured.

    Args:
        points: dict from the name of a row to a dict of speed-ups over dense attention:
            "pairs" and "floor" as predicted, "paper" as reported, "flash" and "triton"
            as measured; any of them may be missing.
        source: hardware, versions and date of the measurement.

    Returns:
        Figure.

    Raises:
        ValueError: if there is no point, a name is unknown, or a speed-up is not above
            0.
    """
    check_points(points)
    names = {name for row in points.values() for name in row}
    with styled():
        fig = canvas(2.3 + 0.32 * len(points))
        ax = fig.subplots()
        ax.axvline(1, color="black", lw=1.5)
        ax.hlines(range(len(points)), *limits(points), color=GRID, lw=0.5)
        for y, row in enumerate(points.values()):
            draw_row(ax, y, row)
        ax.set_yticks(range(len(points)), list(points))
        ax.set(ylim=(len(points) - 0.5, -0.5), xscale="log", xlim=limits(points))
        ticks = [2.0**n for n in range(-8, 9) if limits(points)[0] <= 2.0**n]
        ax.set_xticks([x for x in ticks if x <= limits(points)[1]])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        ax.spines[["top", "right"]].set_visible(False)
        name_axes(ax, "speed-up over the fastest dense attention (log)", "workload")
        signs = [(sign(x), PREDICTED[x][0]) for x in PREDICTED if x in names]
        explain(fig, [name for name in MEASURED if name in names], source, signs)
        return finish(fig, *findings(points))


def check_points(points):
    """Raise unless every row holds known speed-ups above 0; see `speedup_rows`."""
    if not any(points.values()):
        raise ValueError("expected at least one speed-up, got none")
    known = [*PREDICTED, *MEASURED]
    for label, row in points.items():
        for name, value in row.items():
            if name not in known or not value > 0:
                raise ValueError(
                    f"{label}: expected speed-ups above 0 named {', '.join(known)}, "
                    f"got {name!r}: {value}"
                )


def limits(points):
    """Return the range of a log scale that holds 1 and all speed-ups."""
    values = [1.0, *(value for row in points.values() for value in row.values())]
    return min(values) / 1.4, max(values) * 1.4


def draw_row(ax, y, row):
    """Draw the speed-ups of one workload."""
    for name in (x for x in PREDICTED if x in row):
        _, marker, face = PREDICTED[name]
        size = 14 if marker == "|" else 9
        style = {"ls": "", "mec": LINE, "mfc": face, "mew": 1.5, "zorder": 5}
        ax.plot(row[name], y, marker=marker, ms=size, **style)
    for name in (x for x in MEASURED if x in row):
        _, color, marker, _ = PROGRAMS[name]
        ax.plot(row[name], y, ls="", marker=marker, ms=7, color=color, zorder=4)


def sign(name):
    """Return the legend entry of a prediction."""
    _, marker, face = PREDICTED[name]
    size = 12 if marker == "|" else 9
    return Line2D([], [], ls="", marker=marker, ms=size, mec=LINE, mfc=face, mew=1.2)


def findings(points):
    """Return title and sentence about how much of a prediction was reached."""
    there = [n for n in MEASURED if any(n in row for row in points.values())]
    if not there:
        return "Nothing was measured yet", "the predictions wait for measurements."
    best = there[-1]
    rows = {label: row for label, row in points.items() if best in row}
    who = PROGRAMS[best][0]
    shares = [row[best] / row["floor"] for row in rows.values() if "floor" in row]
    reached = span([row[best] for row in rows.values()], "x")
    title = f"{who[0].upper()}{who[1:]} is {reached} as fast as dense attention"
    if shares:
        title += f", {span([100 * s for s in shares], '%')} of the prediction"
    slower = [label for label, row in rows.items() if row[best] < 1]
    lost = f"it is in {listed(slower)}" if slower else "it is in none of these"
    label, row = max(rows.items(), key=lambda item: item[1][best])
    return title, (
        f"left of the thick line dense attention is faster, and {lost}; the "
        f"largest speed-up is {row[best]:.1f}x, in {label}."
    )


def span(values, unit):
    """Write the range of some numbers.

    Example:
        >>> span([8.04, 3.2], "x"), span([61.2], "%"), span([104.3, 61.2], "%")
        ('3.2x to 8.0x', '61%', '61% to 104%')
    """
    digits = 1 if unit == "x" else 0
    low, high = (f"{value:.{digits}f}{unit}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"

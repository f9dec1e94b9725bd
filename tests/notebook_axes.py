"""Code that a kernel runs before a notebook: it names figures with unlabelled axes."""

import os

from matplotlib.backend_bases import FigureCanvasBase


def unlabelled(figure):
    """Name every axis that shows numbers and says nowhere what they are."""
    for number, axes in enumerate(figure.axes):
        if not (axes.axison and axes.get_visible()):
            continue
        both = (
            (axes.xaxis, figure.get_supxlabel()),
            (axes.yaxis, figure.get_supylabel()),
        )
        for axis, shared in both:
            shown = [label.get_text() for label in axis.get_ticklabels()]
            has_numbers = axis.get_visible() and any(
                any(character.isdigit() for character in text) for text in shown
            )
            if has_numbers and not (axis.get_label_text() or shared):
                yield f"{axis.axis_name} axis of axes {number} ({axes.get_title()!r})"


def report_unlabelled(
    canvas, *arguments, _print=FigureCanvasBase.print_figure, **named
):
    """Print a figure as ever, and note its unlabelled axes in a file."""
    result = _print(canvas, *arguments, **named)
    with open(os.environ["MOBA_AXES_REPORT"], "a", encoding="utf-8") as report:
        report.writelines(f"{axis}\n" for axis in unlabelled(canvas.figure))
    return result


# Pytest imports this file too, looking for doctests; only a kernel has the report.
if "MOBA_AXES_REPORT" in os.environ:
    FigureCanvasBase.print_figure = report_unlabelled

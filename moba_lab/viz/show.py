"""Show a figure with its sentence, in a notebook or a terminal."""

import base64
import io
import sys

from matplotlib.figure import Figure
from PIL import Image

from moba_lab.viz.style import styled


def show(picture):
    """Show a figure or a film and print "What to see: ...".

    In a notebook the picture carries its text as `alt`, for screen readers and for the
    HTML pages; in a terminal, where it has no place, its title is printed
    (`picture.savefig("name.png")` keeps the picture).

    Args:
        picture: what a function of `moba_lab.viz` returned.

    Raises:
        TypeError: if picture has no sentence, because something else made it.
    """
    if not hasattr(picture, "what_to_see"):
        raise TypeError(
            f"show expects a figure made by moba_lab.viz, "
            f"got {type(picture).__name__}; use display() for others"
        )
    if in_notebook():
        from IPython.display import display

        data, metadata = bundle(picture)
        display(data, metadata=metadata, raw=True)
    else:
        print(f"{picture.finding}.")
    print(f"What to see: {picture.what_to_see}")


def in_notebook():
    """Return whether output goes to a notebook rather than to a terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def with_few_colours(png):
    """Return a PNG with a palette of 128 colours: a quarter of the bytes to store.

    Args:
        png: binary file of a PNG.
    """
    small = io.BytesIO()
    palette = Image.open(png).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    palette.save(small, format="png", optimize=True)
    return small.getvalue()


def bundle(picture):
    """Return (data, metadata) of Jupyter's display message for a picture.

    The width keeps the page from jumping while the picture loads.
    """
    if not isinstance(picture, Figure):
        return {"text/html": picture.data, "text/plain": picture.alt}, {}
    file = io.BytesIO()
    with styled():
        picture.savefig(file, format="png")
    png = base64.b64encode(with_few_colours(file)).decode()
    width, height = (round(n) for n in picture.get_size_inches() * picture.dpi)
    image = {"alt": picture.alt, "width": width, "height": height}
    return {"image/png": png, "text/plain": picture.alt}, {"image/png": image}

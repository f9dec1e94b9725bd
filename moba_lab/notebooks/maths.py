"""Turn the mathematics of text cells into MathML, which browsers draw by themselves.

MathJax would have to come from the network or be copied into every page; MathML is a
few hundred bytes a formula, can be selected, and is read aloud by screen readers.
"""

import re

from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import IPythonRenderer

UNBRACED_FONT = re.compile(r"(\\math[a-z]+) (\w)")
NOT_CONVERTED = re.compile(r"\\\w*|<mi>&(?:amp;)?</mi>")


def to_mathml(latex, display=False):
    r"""Convert one formula.

    Args:
        latex: the formula without its dollar signs.
        display: True for a formula on a line of its own.

    Returns:
        A ``<math>`` element.

    Raises:
        ValueError: the formula is broken or uses an unknown command.

    >>> to_mathml("x^2").endswith("<msup><mi>x</mi><mn>2</mn></msup></mrow></math>")
    True
    >>> to_mathml(r"\nonsense{x}")
    Traceback (most recent call last):
    ValueError: formula '\\nonsense{x}': '\\nonsense' is not known here; ...
    """
    # The converter knows amsmath's "split", which lays out exactly like "aligned",
    # and drops the font of \mathbb R but not of \mathbb{R}.
    known = UNBRACED_FONT.sub(r"\1{\2}", latex.replace("{aligned}", "{split}"))
    try:
        mathml = convert(known, display="block" if display else "inline")
    # The converter's errors share no base class.
    except Exception as error:
        message = f"formula {latex!r} is broken: {type(error).__name__}; balance it"
        raise ValueError(message) from error
    mathml = mathml.replace(r"\_", "_")
    unknown = NOT_CONVERTED.search(mathml)
    if unknown:
        raise ValueError(
            f"formula {latex!r}: {unknown.group()!r} is not known here; "
            "write it with commands of plain LaTeX and amsmath"
        )
    return mathml


class MathmlRenderer(IPythonRenderer):
    """Render text cells with MathML in place of MathJax's dollar signs."""

    def inline_math(self, body):
        """Render a formula inside a sentence."""
        return self._formula(body, display=False)

    def block_math(self, body):
        """Render a formula on a line of its own."""
        return self._formula(body, display=True)

    def latex_environment(self, name, body):
        """Render a bare LaTeX environment, such as ``align*``."""
        environment = rf"\begin{{{name}}}{body}\end{{{name}}}"
        return self._formula(environment, display=True)

    def _formula(self, latex, display):
        try:
            return to_mathml(latex, display)
        except ValueError:
            # One formula must not cost the reader the page; the rules report it.
            return f"<code>{self.escape_html(latex)}</code>"

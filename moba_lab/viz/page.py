"""Show real text as a page in which the blocks that are read stand out."""

import html

from moba_lab.viz.reading import findings, read_text
from moba_lab.viz.style import COLOR, INK, LABEL, LINE, State, describe

MARK = {
    State.FUTURE: "",
    State.PAST: "",
    State.SELECTED: "\u25cf",
    State.CURRENT: "\u25b6",
}


def text_html(text, blocks, selected, queries, head=None):
    """Show the text as it is written, coloured by what the queries do to its blocks.

    Blocks that are read begin with a dot, their number and how often they are read,
    so that the page can be read without its colours. It needs no scripts.

    Args:
        text: SK bytes, or (SK,) uint8.
        blocks: Blocks.
        selected: (S, H, topk) block ids, -1 for none.
        queries: query numbers, such as range(first, last) of a line.
        head: which head; None: all heads together.

    Returns:
        `IPython.display.HTML` with `what_to_see` and `alt`; give it to `show`.

    Raises:
        ValueError: if text is not SK bytes, or queries are none or of two sequences.
        IndexError: if the head or a query does not exist.
    """
    from IPython.display import HTML

    reading = read_text(text, blocks, selected, queries, head)
    title, what_to_see = findings(reading)
    marked = set(reading.grid.position[reading.queries].tolist())
    spans = [
        span(reading, n, marked)
        for n in range(reading.grid.N)
        if reading.state[n] != State.FUTURE
    ]
    picture = HTML(
        f"<p><strong>{html.escape(title)}</strong></p>{key()}"
        f'<pre style="line-height:1.5;color:black;background:white">{"".join(spans)}'
        "</pre>"
    )
    return describe(picture, title, what_to_see)


def span(reading, n, marked):
    """Return the HTML of one block: its number if it is read, then its text."""
    state, grid = State(reading.state[n]), reading.grid
    reads = reading.reads[n]
    label = {State.SELECTED: f"{n}: {reads}x", State.CURRENT: f"{n}"}.get(state, "")
    if label:
        label = (
            f'<b style="border:1px solid {LINE};padding:0 3px;background:white;'
            f'color:black">{MARK[state]}{label}</b>'
        )
    shown = reading.texts[n].replace("↵", "↵\n").replace("→", "\t")
    return (
        f'<span title="block {n}: {LABEL[state]}" '
        f'style="background:{COLOR[state]};color:{INK[state]}">'
        f"{label}{underline(shown, grid.start[n], marked)}</span>"
    )


def underline(shown, start, marked):
    """Return the text of a block as HTML, with the bytes of the queries underlined."""
    pieces, token = [], start
    for character in shown:
        piece = html.escape(character)
        if character != "\n" and token in marked:
            piece = f"<u>{piece}</u>"
        pieces.append(piece)
        # The visible sign of a line's end and the line's end are one byte.
        token += character != "\n"
    return "".join(pieces).replace("</u><u>", "")


def key():
    """Return the legend as HTML."""
    texts = {
        State.PAST: "past, not selected",
        State.SELECTED: "past, selected (block: times)",
        State.CURRENT: "current, queries underlined",
    }
    boxes = [
        f'<span style="background:{COLOR[state]};color:{INK[state]};padding:0 6px">'
        f"{MARK[state]}&nbsp;</span> {text}"
        for state, text in texts.items()
    ]
    return f"<p>{' &emsp; '.join(boxes)}</p>"

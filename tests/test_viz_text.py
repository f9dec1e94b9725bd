"""Figures and pages of real text show its bytes, escaped, on the right blocks."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from moba_lab import viz
from moba_lab.viz import State
from moba_lab.viz.layout import layout
from moba_lab.viz.lines import line_spans
from moba_lab.viz.reading import read_text
from moba_ref import partition

# 25 bytes in blocks of 4; the last line is "f(1)&$".
TEXT = b"def f(a):\n<b>$x</b\nf(1)&$"
LINE = range(19, 25)


def choices():
    """Let the last line read block 0 with head 0, except its first query."""
    blocks = partition([0, 25], block_size=4)
    selected = np.full((25, 2, 3), -1)
    selected[..., -1] = blocks.of_query[:, None]
    selected[20:, 0, 0] = 0
    selected[19, 1, 0] = 2
    return blocks, selected


def test_reads_are_counted_over_queries_and_heads():
    blocks, selected = choices()
    both = read_text(TEXT, blocks, selected, LINE)
    assert both.pairs == 12
    assert both.reads.tolist() == [5, 0, 1, 0, 0, 0, 0]
    states = [State.SELECTED, 1, State.SELECTED, 1, State.CURRENT, State.CURRENT, 3]
    assert both.state.tolist() == states
    assert both.best.tolist() == [0, 2]
    assert both.words == "f(1)&$"
    one = read_text(TEXT, blocks, selected, LINE, head=1)
    assert (one.pairs, one.reads.tolist()) == (6, [0, 0, 1, 0, 0, 0, 0])
    assert read_text(TEXT, blocks, selected, 3).state.tolist() == [3, 0, 0, 0, 0, 0, 0]


def test_bytes_arrays_and_tensors_are_the_same_text():
    blocks, selected = choices()
    array = np.frombuffer(TEXT, dtype=np.uint8)
    for text in (array, torch.tensor(array.tolist()), list(TEXT)):
        assert read_text(text, blocks, selected, LINE).words == "f(1)&$"


def test_the_figure_writes_every_byte_in_its_place():
    blocks, selected = choices()
    fig = viz.text_blocks(TEXT, blocks, selected, LINE)
    left, right = fig.axes
    drawn = {(t.get_position()): t.get_text() for t in left.texts}
    for place, byte in enumerate(TEXT):
        shown = chr(byte).replace("\n", "↵")
        assert drawn.get((place % 4 + 0.5, place // 4), " ") == shown
    numbers = [t.get_text() for t in right.texts]
    assert numbers == ["5", "1", "current", "current", "current"]
    assert [bar.get_width() for bar in right.patches] == [5, 1]
    assert fig.finding == '"f(1)&$" reads block 0 most: "def"'
    assert fig.what_to_see == (
        "6 queries, 19 to 24 (marked), make 12 choices of several blocks each: "
        "block 0 in 5 and block 2 in 1."
    )


def test_of_many_blocks_the_read_ones_are_drawn():
    blocks = partition([0, 400], block_size=4)
    selected = np.full((400, 1, 2), -1)
    selected[..., -1] = blocks.of_query[:, None]
    selected[399, 0, 0] = 7
    fig = viz.text_blocks(b"x" * 400, blocks, selected, 399)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["7", "99"]


class Words(HTMLParser):
    """Collect the text of a page and complain about tags that were not meant."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.underlined, self.inside = set(), "", "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if "pre" in self.inside and self.inside[-1] != "b":
            self.words += data
        if self.inside and self.inside[-1] == "u":
            self.underlined += data


def test_the_page_is_the_escaped_text_with_labels_on_what_is_read():
    blocks, selected = choices()
    page = viz.text_html(TEXT, blocks, selected, LINE)
    parsed = Words(page.data)
    assert parsed.inside == []
    assert parsed.tags == {"p", "strong", "span", "pre", "b", "u"}
    assert parsed.words.replace("↵", "") == TEXT.decode()
    assert parsed.underlined == "f(1)&$"
    assert re.findall(r"<b [^>]*>([^<]*)</b>", page.data) == [
        "●0: 5x",
        "●2: 1x",
        "▶4",
        "▶5",
        "▶6",
    ]
    assert page.what_to_see.startswith("6 queries, 19 to 24")
    assert page.alt.startswith(page.finding)


def test_a_byte_after_the_end_of_a_line_is_underlined_in_its_place():
    blocks, selected = choices()
    page = viz.text_html(TEXT, blocks, selected, [19])
    assert Words(page.data).underlined == "f"


def test_dollars_and_backslashes_of_a_text_are_not_taken_for_formulas():
    blocks, selected = choices()
    text = rb"$\q$" + b"\n" + b"x" * 20
    assert r"$\q$" in viz.text_blocks(text, blocks, selected, LINE).get_suptitle()
    lines = viz.line_heatmap(text, blocks, selected).axes[0].get_yticklabels()
    assert r"$\q$" in lines[0].get_text()
    fig = viz.merge_weights([[1.0]], parts=[r"$\q$"])
    assert fig.axes[0].texts[0].get_text() == r"$\q$"


def test_lines_end_with_newlines_and_with_sequences():
    spans = line_spans(b"ab\ncd\nefgh", layout(partition([0, 3, 8, 10], 2)))
    got = {line: queries.tolist() for line, queries in spans.items()}
    assert got == {0: [0, 1, 2], 1: [3, 4, 5], 2: [6, 7], 3: [8, 9]}


def test_the_heatmap_of_lines_shows_the_share_of_each_line():
    blocks, selected = choices()
    fig = viz.line_heatmap(TEXT, blocks, selected)
    own, share = (image.get_array() for image in fig.axes[0].images)
    assert share.shape == (3, 7)
    np.testing.assert_allclose(share[2, :4], [5 / 12, 0, 1 / 12, 0])
    assert own.mask[2].tolist() == [True] * 4 + [False] * 3
    assert share.mask[1].tolist() == [False] * 2 + [True] * 5
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert labels == ["0 def f(a):", "1 <b>$x</b", "2 f(1)&$"]
    assert fig.finding.startswith("Line 2 reads block 0 in 42% of its choices")
    some = viz.line_heatmap(TEXT, blocks, selected, head=0, lines=[2])
    np.testing.assert_allclose(some.axes[0].images[1].get_array()[0, 0], 5 / 6)


def test_text_that_does_not_fit_is_refused():
    blocks, selected = choices()
    with pytest.raises(ValueError, match="25 bytes, one a key, got 3"):
        viz.text_blocks(b"abc", blocks, selected, LINE)
    with pytest.raises(ValueError, match="25 bytes, one a key, got 3"):
        viz.line_heatmap(b"abc", blocks, selected)
    with pytest.raises(TypeError, match=r"use text.encode\(\)"):
        viz.text_html(TEXT.decode(), blocks, selected, LINE)
    with pytest.raises(ValueError, match="some of one sequence, got 0"):
        viz.text_blocks(TEXT, blocks, selected, [])
    with pytest.raises(IndexError, match="query must be 0 to 24, got 25"):
        viz.text_blocks(TEXT, blocks, selected, 25)
    with pytest.raises(IndexError, match="head must be 0 to 1, got 2"):
        viz.text_html(TEXT, blocks, selected, LINE, head=2)
    with pytest.raises(ValueError, match=r"0 to 2 and hold queries, got \[3\]"):
        viz.line_heatmap(TEXT, blocks, selected, lines=[0, 3])
    packed = partition([0, 20, 25], block_size=5)
    wide = np.repeat(packed.of_query[:, None, None], 2, axis=1)
    with pytest.raises(ValueError, match="got 6 of 2 sequences"):
        viz.text_blocks(TEXT, packed, wide, LINE)

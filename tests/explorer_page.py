"""The block explorer in an open page: acting on it, reading it, what it must show."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pictures import scene

from moba_lab import explorer as package
from moba_lab.example import running_example
from moba_lab.viz import block_weights, states
from moba_lab.viz.words import reads

TEXT = b"def f(a):\n  return a\n\nprint(f(1))"[:32]
SMALL = """
from moba_lab.example import running_example
from moba_lab.explorer import BlockExplorer

e, text = running_example(), {text}
explorer = BlockExplorer(e.q, e.k, e.v, block_size=4, topk=3, query=22, text=text)
explorer
"""
LARGE = """
import numpy as np

q, k, v = np.random.default_rng(0).normal(size=(3, 1024, 1, 8))
BlockExplorer(q, k, v, block_size=16, topk=4, query=1000)
"""
CELLS = {"small": SMALL.format(text=TEXT), "large": LARGE}

SETTINGS = """root => {
    const sliders = [...root.querySelectorAll('input[type=range]')];
    const [topk, block_size, head] = sliders.map(
        slider => parseInt(slider.getAttribute('aria-valuetext').match(/\\d+/)[0]));
    const query = root.querySelector('[role=option]').getAttribute('aria-posinset') - 1;
    return {query, topk, block_size, head};
}"""
SHOWN = """root => ({
    sentence: root.querySelector('[aria-live=polite]').textContent,
    rows: [...root.querySelectorAll('tbody')].map(group => ({
        block: Number(group.dataset.block),
        score: group.querySelectorAll('td')[1].textContent,
        share: group.querySelectorAll('td')[2].textContent,
        text: group.querySelector('code')?.textContent,
        own: group.querySelector('mark')?.textContent,
    })),
})"""
# Every text with its colour and the colours behind it, the nearest first.
COLORS = """root => {
    const behind = element => element === null ? [] : [
        getComputedStyle(element).backgroundColor, ...behind(element.parentElement)];
    const writes = element => [...element.childNodes].some(
        node => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    const found = [...root.querySelectorAll('*')].filter(writes).map(element => [
        element.textContent.slice(0, 20), getComputedStyle(element).color,
        behind(element)]);
    const label = getComputedStyle(root.querySelector('.cursor'), '::before');
    return [...found, ['label of the query', label.color, [label.backgroundColor]]];
}"""
CELL_COLORS = """(root, [query, block, blocks]) => {
    const find = name => root.querySelector(name);
    const [canvas, rows, map] = ['.cells', '.rows', '.map'].map(find);
    const queries = find('[role=option]').getAttribute('aria-setsize');
    const dense = canvas.width / canvas.clientWidth;
    const wide = canvas.width / blocks, high = rows.clientHeight / queries * dense;
    const y = query * high - map.scrollTop * dense;
    const {data} = canvas.getContext('2d').getImageData(
        block * wide, y, Math.floor(wide), Math.floor(high));
    return Array.from({length: data.length / 4}, (_, n) =>
        '#' + [...data.slice(4 * n, 4 * n + 3)].map(
            part => part.toString(16).padStart(2, '0')).join('').toUpperCase());
}"""
FOCUSED = """() => {
    const {activeElement: focused} = document;
    const {outlineStyle, outlineWidth, outlineColor} = getComputedStyle(focused);
    const name = focused.labels?.[0]?.textContent ?? focused.getAttribute('aria-label');
    return {name, outlineStyle, outlineWidth: parseFloat(outlineWidth), outlineColor};
}"""
# Elements that take time to change, which readers may have asked pages not to do.
MOVING = """root => [...root.querySelectorAll('*')].filter(element =>
    ['', '::before', '::after'].some(part => {
        const style = getComputedStyle(element, part);
        return style.transitionDuration !== '0s' || style.animationDuration !== '0s'
            || style.scrollBehavior === 'smooth';
    })).map(element => element.className)"""
# What Safari reports when rows scroll under a pointer that rests.
REST = """root => root.querySelector('.rows').dispatchEvent(
    new PointerEvent('pointermove', {bubbles: true, clientX: 100, clientY: 200}))"""


class ExplorerPage:
    """One explorer of a page.

    Attributes:
        page: the page.
        root: its locator.
    """

    def __init__(self, page, number):
        self.page, self.root = page, page.locator(".moba-explorer").nth(number)
        self.map = self.root.get_by_role("listbox", name="queries")

    def settings(self):
        """Wait until Python has answered, and return what is chosen."""
        self.root.locator("[aria-busy=false]").wait_for()
        return self.root.evaluate(SETTINGS)

    def shown(self):
        self.settings()
        return self.root.evaluate(SHOWN)

    def slider(self, name):
        return self.root.get_by_role("slider", name=name)

    def point(self, query, steps=2):
        """Move the pointer onto the row of a query."""
        rows = self.root.locator(".rows")
        self.map.scroll_into_view_if_needed()
        box = rows.bounding_box()
        count = int(self.root.get_by_role("option").get_attribute("aria-setsize"))
        y = box["y"] + (query + 0.5) * box["height"] / count
        self.page.mouse.move(box["x"] + 20, y, steps=steps)

    def cell_colors(self, query, block, blocks):
        return set(self.root.evaluate(CELL_COLORS, [query, block, blocks]))


def check_small(view):
    """Assert that the small explorer shows what the reference says."""
    chosen, e = view.settings(), running_example()
    query, head = chosen["query"], chosen["head"]
    sizes = {"block_size": chosen["block_size"], "topk": chosen["topk"]}
    ref = scene(e.q, e.k, e.v, e.cu_seqlens, **sizes)
    cells = states(ref.selected, ref.blocks)[query, head]
    lse = (ref.lse_current, ref.lse_past, ref.routing)
    weights = block_weights(*lse, ref.blocks, head)[query]
    shown = view.shown()
    assert shown["sentence"] == f"What to see: {reads(cells, query)}."
    blocks = [n for n in ref.selected[query, head].tolist() if n >= 0]
    assert [row["block"] for row in shown["rows"]][: len(blocks)] == blocks
    for row in shown["rows"][: len(blocks)]:
        n = row["block"]
        share = float(row["share"].removesuffix("%")) / 100
        assert share == pytest.approx(weights[n], abs=0.00051)
        start, end = ref.blocks.start[n], min(ref.blocks.end[n], query + 1)
        assert row["text"] == TEXT[start:end].decode().replace("\n", "↵")
        if n != blocks[-1]:
            score = ref.scores[query, head, n]
            assert float(row["score"]) == pytest.approx(score, abs=0.0051)
    own = shown["rows"][len(blocks) - 1]
    assert (own["score"], own["own"]) == ("own", own["text"][-1])


def contrasts(view):
    """Return {text: contrast} of every text to what lies behind it."""
    return {
        name: contrast(color, behind)
        for name, color, behind in view.root.evaluate(COLORS)
    }


def contrast(color, behind):
    """Return the contrast of WCAG 2 between a colour and the colours behind it."""
    ground = np.ones(3)
    for layer in reversed(behind):
        ground = blend(layer, ground)
    light = sorted(map(luminance, (blend(color, ground), ground)))
    return (light[1] + 0.05) / (light[0] + 0.05)


def blend(color, ground):
    """Lay a CSS colour, rgb(...) or rgba(...), over another."""
    red, green, blue, *rest = map(float, re.findall(r"[\d.]+", color))
    alpha = rest[0] if rest else 1.0
    return alpha * np.array([red, green, blue]) / 255 + (1 - alpha) * ground


def luminance(color):
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


PAGE = """<!DOCTYPE html><title>explorer</title><link rel="icon" href="data:,">
<style>{css}</style><body><script type="module">
const state = {state};
const bytes = Uint8Array.from(atob(state.picture.cells), c => c.charCodeAt(0));
state.picture.cells = new DataView(bytes.buffer);
const heard = {{}};
const model = {{
    get: name => state[name],
    set: (name, value) => {{ state[name] = value; heard[`change:${{name}}`]?.(); }},
    save_changes: () => {{}},
    on: (event, callback) => {{ heard[event] = callback; }},
    off: event => {{ delete heard[event]; }},
}};
const source = new Blob([{code}], {{type: 'text/javascript'}});
const module = await import(URL.createObjectURL(source));
module.default.render({{model, el: document.body}});
</script>"""


def without_kernel(explorer):
    """Return a page that shows an explorer where neither Lab nor Python answers."""
    folder = Path(package.__file__).parent
    picture = dict(explorer.picture)
    picture["cells"] = base64.b64encode(picture["cells"]).decode()
    names = ("block_size", "topk", "head", "query", "detail", "states")
    state = {name: getattr(explorer, name) for name in names} | {"picture": picture}
    return PAGE.format(
        css=(folder / "explorer.css").read_text(),
        code=json.dumps((folder / "explorer.js").read_text()),
        state=json.dumps(state),
    )

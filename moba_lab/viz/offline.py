"""Make matplotlib's HTML films small, and independent of any other server."""

import base64
import hashlib
import io
import re

import numpy as np
from PIL import Image

from moba_lab.viz.style import COLOR, GRID, LINE, State

# The colours of a frame: the states, greys for text and lines, and two blends of
# neighbours. A palette made from each frame would shift the colours of the states.
PALETTE = [*(COLOR[state] for state in State), LINE, GRID, "#80B8D9", "#AC7F1E"]
BUTTONS = {
    "fa-minus": "slower",
    "fa-fast-backward": "first",
    "fa-step-backward": "previous",
    "fa-play fa-flip-horizontal": "play back",
    "fa-pause": "pause",
    "fa-play": "play",
    "fa-step-forward": "next",
    "fa-fast-forward": "last",
    "fa-plus": "faster",
}


def offline(page, alt):
    """Return a film's HTML without links, with words on its buttons, and smaller."""
    page = re.sub(r"<link[^>]*>", "", page)
    for icon, word in BUTTONS.items():
        page = page.replace(f'<i class="fa {icon}"></i>', word)
    page = page.replace("width: 36px;", "padding: 0px 5px;")
    page, ground = share_ground(page)
    page = page.replace(
        '<img id="',
        f'<img alt="{alt}" style="background:url({ground}) 0 0/100% 100%" id="',
    )
    page = page.replace('type="range"', 'type="range" aria-label="query"')
    # A name made from the content keeps the committed notebooks free of chance.
    chance = re.search(r"_anim_img([0-9a-f]{32})", page)[1]
    content = page.replace(chance, "").encode()
    return page.replace(chance, hashlib.sha256(content).hexdigest()[:32])


def share_ground(page):
    """Keep of every frame only what differs from the last one, and lay that below.

    Returns:
        The page, and the last frame as a data URL.
    """
    pattern = re.compile(r"data:image/png;base64,[^\"]*")
    frames = [decode(url) for url in pattern.findall(page)]
    ground = frames[-1]
    urls = iter([encode(frame, differs(frame, ground)) for frame in frames])
    page = pattern.sub(lambda _: next(urls), page)
    return page, encode(ground, np.ones(ground.shape[:2], dtype=bool))


def differs(frame, ground):
    """Return (height, width) bool: in each line, from the first difference to the last.

    What lies between is kept too, because unbroken lines make smaller files.
    """
    changed = (frame != ground).any(axis=2)
    after = np.maximum.accumulate(changed, axis=1)
    before = np.maximum.accumulate(changed[:, ::-1], axis=1)[:, ::-1]
    return after & before


def decode(url):
    """Return the pixels (height, width, 3) of a frame; its lines end in a backslash."""
    data = base64.b64decode(url.partition(",")[2].replace("\\\n", ""))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def encode(pixels, kept):
    """Return pixels as a PNG in the palette, transparent where kept is False."""
    colors = [int(color[i : i + 2], 16) for color in PALETTE for i in (1, 3, 5)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors)
    image = Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.NONE)
    clear = len(PALETTE)
    small = Image.fromarray(np.where(kept, np.asarray(image), clear).astype(np.uint8))
    # A palette that ends before the transparent colour would leave it opaque.
    small.putpalette([*colors, 255, 255, 255])
    file = io.BytesIO()
    small.save(file, format="png", bits=4, optimize=True, transparency=clear)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

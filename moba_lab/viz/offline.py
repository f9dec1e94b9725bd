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
# Unchanged pixels in a row that cost less to keep than to leave out.
GAP = 40
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


def offline(page, alt, slider="query"):
    """Return a film's HTML without links, with words on its buttons, and smaller.

    Args:
        page: HTML from `FuncAnimation.to_jshtml`.
        alt: text of its picture for screen readers.
        slider: what its slider chooses, for screen readers.
    """
    page = re.sub(r"<link[^>]*>", "", page)
    for icon, word in BUTTONS.items():
        page = page.replace(f'<i class="fa {icon}"></i>', word)
    page = page.replace("width: 36px;", "padding: 0px 5px;")
    page, ground = share_ground(page)
    page = page.replace(
        '<img id="',
        f'<img alt="{alt}" style="background:url({ground}) 0 0/100% 100%" id="',
    )
    page = page.replace('type="range"', f'type="range" aria-label="{slider}"')
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
    """Return (height, width) bool: the differences, and short gaps between them.

    Gaps are kept too, because unbroken lines make smaller files.
    """
    changed = (frame != ground).any(axis=2)
    column = np.arange(changed.shape[1])
    before = np.maximum.accumulate(np.where(changed, column, -GAP), axis=1)
    after = np.where(changed, column, column[-1] + GAP)
    after = np.minimum.accumulate(after[:, ::-1], axis=1)[:, ::-1]
    return after - before <= GAP


def decode(url):
    """Return the pixels (height, width, 3) of a frame; its lines end in a backslash."""
    data = base64.b64decode(url.partition(",")[2].replace("\\\n", ""))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def encode(pixels, kept):
    """Return pixels as a WebP in the palette, transparent where kept is False.

    Lossless WebP is half as large as the same picture in PNG. A higher quality is no
    better in the picture, hardly smaller, and takes fifty times as long.
    """
    colors = [int(color[i : i + 2], 16) for color in PALETTE for i in (1, 3, 5)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors)
    image = Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.NONE)
    image = image.convert("RGB")
    image.putalpha(Image.fromarray(np.where(kept, 255, 0).astype(np.uint8)))
    file = io.BytesIO()
    image.save(file, format="webp", lossless=True, quality=50, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"

"""Measure whether heads choose the block in which a called name was defined."""

import re
from dataclasses import dataclass

import numpy as np
import torch

DEFINITION = re.compile(rb"\b(?:def|class)[ ]+(\w+)")


@dataclass(frozen=True)
class Call:
    """A call in a text of a name defined earlier in it; all offsets are in bytes.

    name: the called name.
    definition: offset of the name's first byte after `def` or `class`.
    call: offset of the name's first byte where it is called.
    """

    name: str
    definition: int
    call: int


@dataclass(frozen=True)
class Recall:
    """How often each head chose the block of a definition, from the bytes of its calls.

    hit: (layers, H) share of the queried bytes whose head chose the block.
    control: (layers, H) the same blocks, from the other bytes of the call's block.
    chance: the share that blocks chosen at random would reach.
    calls, queries: how many calls and queried bytes were counted.
    """

    hit: np.ndarray
    control: np.ndarray
    chance: float
    calls: int
    queries: int


def find_calls(text, shortest=6):
    r"""Find calls of functions, methods and classes that the text itself defines.

    Args:
        text: bytes of Python source.
        shortest: names of fewer bytes are passed over, as are `__special__` names and
            names defined more than once.

    Returns:
        `Call`s in the order of their offsets.

    >>> find_calls(b"def parse_line(s):\n    return s\n\nx = parse_line('a')\n")
    [Call(name='parse_line', definition=4, call=37)]
    """
    defined = {}
    for match in DEFINITION.finditer(text):
        defined.setdefault(match[1], []).append(match.start(1))
    calls = []
    for name, offsets in defined.items():
        if len(offsets) > 1 or len(name) < shortest or name.startswith(b"__"):
            continue
        for match in re.finditer(rb"\b" + name + rb"(?=\()", text):
            if match.start() > offsets[0]:
                calls.append(Call(name.decode(), offsets[0], match.start()))
    return sorted(calls, key=lambda call: call.call)


def far_calls(text, block_size, distance=3, shortest=6):
    """Keep the calls whose definition lies at least `distance` blocks before."""
    return [
        call
        for call in find_calls(text, shortest)
        if call.call // block_size - (call.definition + len(call.name)) // block_size
        >= distance
    ]


@torch.no_grad()
def definition_recall(model, texts, read=3, distance=3):
    """Count how often each head chooses the block of a called name's definition.

    A queried byte belongs to the name in the call, with at least `read` bytes of the
    name before it, so that the head has something to recognise. It is a hit if the head
    chose a block that holds some of the name in the definition. Every text is cut into
    windows of the model's context.

    Args:
        model: `moba_lab.model.Model`, all layers "moba".
        texts: list of (n,) uint8.
        read: bytes of the name that must have been read before.
        distance: least number of blocks from the definition to the call.

    Returns:
        `Recall`.

    Raises:
        ValueError: the texts hold no such call.
    """
    context, block_size = model.config.context, model.config.block_size
    found = []
    for text in texts:
        for start in range(0, len(text), context):
            window = text[start : start + context]
            calls = far_calls(window.tobytes(), block_size, distance)
            if calls:
                found += _count_window(model, window, calls, read)
    if not found:
        raise ValueError(
            f"expected a call at least {distance} blocks of {block_size} bytes after "
            "its definition, found none; give more or other text"
        )
    hits, controls, chances, counts = (np.array(x) for x in zip(*found, strict=True))
    weight = counts / counts.sum()
    return Recall(
        hit=np.einsum("c,clh->lh", weight, hits),
        control=np.einsum("c,clh->lh", weight, controls),
        chance=float(weight @ chances),
        calls=len(counts),
        queries=int(counts.sum()),
    )


def _count_window(model, window, calls, read):
    block_size, topk = model.config.block_size, model.config.topk
    _, aux = model(torch.from_numpy(window.astype(np.int64)), return_aux=True)
    selected = torch.stack([layer.selected for layer in aux]).numpy()
    counted = []
    for call in calls:
        size = len(call.name)
        first = call.definition // block_size
        last = (call.definition + size - 1) // block_size
        chose = ((selected >= first) & (selected <= last)).any(-1)
        here = call.call // block_size
        queries = np.arange(call.call + read - 1, call.call + size)
        queries = queries[queries // block_size == here]
        others = np.arange(here * block_size, call.call)
        if len(queries) and len(others):
            chance = chance_of_hit(here, last - first + 1, topk - 1)
            hit, control = chose[:, queries].mean(1), chose[:, others].mean(1)
            counted.append((hit, control, chance, len(queries)))
    return counted


def chance_of_hit(past, wanted, picks):
    """Return the chance that random picks hold at least one wanted block.

    Args:
        past: number of past blocks, picked from without replacement.
        wanted: how many of them would be a hit.
        picks: how many are picked, `topk - 1`.

    >>> chance_of_hit(past=10, wanted=1, picks=3)
    0.3
    """
    miss = 1.0
    for picked in range(min(picks, past)):
        miss *= max(past - wanted - picked, 0) / (past - picked)
    return round(1 - miss, 12)


@dataclass(frozen=True)
class Lookup:
    """A call at whose name a head chose the block of the definition.

    path: file of the text.
    text: (n,) uint8, one window of the model's context.
    call: `Call`, its offsets counted in the window.
    aux: what every layer read, `LayerAux`.
    share: of the queried bytes, how many chose the block.
    """

    path: str
    text: np.ndarray
    call: Call
    aux: list
    share: float


@torch.no_grad()
def best_lookup(model, texts, layer, head, read=2, distance=6):
    """Find the call at whose name a head chooses the definition's block most often.

    Args:
        model: `moba_lab.model.Model`, with MoBA in that layer.
        texts: path -> (n,) uint8.
        layer: which layer.
        head: which of its heads.
        read: bytes of the name that come before the first queried one.
        distance: least number of blocks from the definition to the call.

    Returns:
        `Lookup`; of equals the first.

    Raises:
        ValueError: the texts hold no such call.
    """
    context, block_size, best = model.config.context, model.config.block_size, None
    for path, text in texts.items():
        for start in range(0, len(text), context):
            window = text[start : start + context]
            calls = far_calls(window.tobytes(), block_size, distance)
            if not calls:
                continue
            _, aux = model(torch.from_numpy(window.astype(np.int64)), return_aux=True)
            selected = aux[layer].selected[:, head, :-1].numpy()
            for call in calls:
                wanted = call.definition // block_size
                queries = range(call.call + read, call.call + len(call.name))
                share = (selected[queries] == wanted).any(-1).mean()
                if best is None or share > best.share:
                    best = Lookup(path, window, call, aux, float(share))
    if best is None:
        raise ValueError(
            f"expected a call {distance} blocks of {block_size} bytes after its "
            "definition, found none; give more text or a smaller distance"
        )
    return best

"""Put what a figure shows into words."""

import numpy as np

from moba_lab.viz.style import State


def listed(items, most=8):
    """Join items as prose, shortened when long.

    Example:
        >>> listed([0, 4, 5]), listed(range(20), most=3)
        ('0, 4 and 5', '0, 1, 2 and 17 more')
    """
    items = [str(item) for item in items]
    if len(items) > most:
        items = [*items[:most], f"{len(items) - most} more"]
    *head, last = items or [""]
    return f"{', '.join(head)} and {last}" if head else last


def count(number, noun):
    """Return "1 block" or "2 blocks"."""
    plural = "queries" if noun == "query" else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def reads(cells, query):
    """Say which blocks a query reads.

    Args:
        cells: (N,) `State` of every block for the query.
        query: its number.

    Returns:
        A clause without a full stop.

    Example:
        >>> reads(np.array([2, 1, 2, 3, 0]), query=14)
        'query 14 reads blocks 0, 2 and its own, 3'
    """
    past = np.flatnonzero(cells == State.SELECTED).tolist()
    own = [f"its own, {n}" for n in np.flatnonzero(cells == State.CURRENT)]
    leaks = np.flatnonzero(cells == State.LEAK)
    if past:
        noun = "block" if len(past) == 1 else "blocks"
        text = f"query {query} reads {noun} {listed(past + own)}"
    elif own:
        text = f"query {query} reads only {own[0].replace('own', 'own block')}"
    else:
        text = f"query {query} reads nothing"
    if len(leaks):
        text += f"; against the rules also {listed(leaks)}"
    return text


def farthest(cells, head=0):
    """Return the query that reads the block farthest before its own.

    Args:
        cells: (S, H, N) `State`.
        head: the head to look at.

    Returns:
        Its number; the last query if none reads a past block.
    """
    read = np.isin(cells[:, head], (State.SELECTED, State.LEAK))
    own = (cells[:, head] == State.CURRENT).argmax(axis=1)
    reach = np.where(read.any(axis=1), own - read.argmax(axis=1), 0)
    return int(len(reach) - 1 - reach[::-1].argmax())


def length(tokens):
    """Write a number of tokens with K or M where it divides.

    Example:
        >>> length(4096), length(10 * 2**20), length(1000)
        ('4K', '10M', '1,000')
    """
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def scaled(value, units):
    """Write a positive number with three digits and the unit that suits it.

    Args:
        value: number in the smallest unit that counts.
        units: dict from unit to its size, ascending.

    Example:
        >>> SECONDS
        {'µs': 1e-06, 'ms': 0.001, 's': 1.0}
        >>> scaled(0.0123, SECONDS), scaled(12345.6, SECONDS), scaled(2**21, BYTES)
        ('12.3 ms', '12,346 s', '2 MiB')
    """
    fitting = [unit for unit, size in units.items() if value >= 0.9995 * size]
    unit = (fitting or list(units))[-1]
    value = value / units[unit]
    return f"{value:,.0f} {unit}" if value >= 999.5 else f"{value:.3g} {unit}"


SECONDS = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}
BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

"""Hold one attention call, and say what its queries read under other settings."""

from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch

import moba_fast
from moba_lab.explorer.shares import block_shares
from moba_lab.viz.layout import Layout, array, check_index, layout
from moba_lab.viz.reading import as_bytes, visible
from moba_lab.viz.states import states
from moba_lab.viz.style import State
from moba_lab.viz.words import reads
from moba_ref import partition

# A page shows this much without a pause, and a canvas is at most 32,767 pixels high.
MOST_QUERIES = 2**14
MOST_CELLS = 2**22
# Up to this length every block size is offered, beyond it the powers of two.
EVERY_SIZE = 64
MOST_BLOCKS = 128


@dataclass(frozen=True)
class Choice:
    """Hold what one head of a call chose.

    Attributes:
        head: which head.
        topk: blocks per query, the current one included.
        blocks: moba_fast.Blocks.
        grid: the same as a Layout.
        selected: (S, 1, topk) block ids, -1 for none.
        scores: (S, N) float64, the gate's.
        cells: (S, N) `State`.
    """

    head: int
    topk: int
    blocks: moba_fast.Blocks
    grid: Layout
    selected: np.ndarray
    scores: np.ndarray
    cells: np.ndarray


class Call:
    """Hold the inputs of one attention call.

    Args:
        q: (S, H, D) queries, array or tensor of floats.
        k: (S, HK, D) keys; HK divides H.
        v: (S, HK, D) values.
        cu_seqlens: (B+1,) offsets of the sequences. None: one sequence.
        text: S bytes, or (S,) uint8, one for every token. None: no text.
        softmax_scale: factor on the scores. None: D ** -0.5.

    Raises:
        TypeError: if text is a str.
        ValueError: if shapes do not fit or are empty, if there are more than
            MOST_QUERIES queries, or offsets or text do not fit the tokens.
    """

    def __init__(self, q, k, v, cu_seqlens=None, text=None, softmax_scale=None):
        self.q, self.k, self.v = (_floats(x) for x in (q, k, v))
        _check_shapes(self.q, self.k, self.v)
        self.S, self.H = self.q.shape[:2]
        if self.S > MOST_QUERIES:
            raise ValueError(
                f"at most {MOST_QUERIES:,} queries can be shown, got {self.S:,}; look "
                "at a part of the call"
            )
        self.cu_seqlens = _check_offsets(cu_seqlens, self.S)
        self.softmax_scale = softmax_scale
        self.text = None if text is None else visible(as_bytes(text))
        if self.text is not None and len(self.text) != self.S:
            raise ValueError(
                f"text must hold {self.S} bytes, one for every token, "
                f"got {len(self.text)}"
            )

    @property
    def lengths(self):
        """Return (B,) the tokens of every sequence."""
        return np.diff(self.cu_seqlens)

    def check(self, *, block_size, topk, head, query):
        """Raise unless the call can be looked at with these settings.

        Raises:
            TypeError: if one is no integer.
            ValueError: if block_size or topk is less than 1, or there would be more
                than MOST_CELLS cells to draw.
            IndexError: if the head or the query does not exist.
        """
        named = {"block_size": block_size, "topk": topk, "head": head, "query": query}
        for name, value in named.items():
            if not isinstance(value, Integral):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if name in ("block_size", "topk") and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_index(head, self.H, "head")
        check_index(query, self.S, "query")
        count = self.S * self.count_blocks(block_size)
        if count > MOST_CELLS:
            raise ValueError(
                f"{self.S:,} queries and block_size={block_size} make {count:,} cells, "
                f"at most {MOST_CELLS:,} can be drawn; choose a larger block_size or "
                "look at a part of the call"
            )

    def count_blocks(self, block_size):
        """Return the number of blocks of all sequences."""
        return int((-(-self.lengths // block_size)).sum())

    def choose(self, *, block_size, topk, head):
        """Let the fast version choose the blocks of one head.

        Returns:
            Choice.
        """
        ratio = self.H // self.k.shape[1]
        q = self.q[:, head : head + 1]
        k, v = (x[:, head // ratio : head // ratio + 1] for x in (self.k, self.v))
        selected = moba_fast.moba_attention(
            q,
            k,
            v,
            block_size=block_size,
            topk=topk,
            cu_seqlens=self.cu_seqlens,
            return_aux=True,
        )[2]
        blocks = moba_fast.partition(self.cu_seqlens, block_size)
        scores = moba_fast.gate_scores(q, moba_fast.pool_keys(k, blocks), blocks)
        return Choice(
            head=head,
            topk=topk,
            blocks=blocks,
            grid=layout(blocks),
            selected=array(selected),
            scores=array(scores)[:, 0],
            cells=states(selected, blocks)[:, 0],
        )

    def sizes(self, block_size):
        """List the block sizes to offer, the one in use among them."""
        longest = int(self.lengths.max())
        if longest <= EVERY_SIZE:
            offered = range(1, longest + 1)
        else:
            offered = [2**n for n in range(longest.bit_length() + 1)]
            offered = [
                size
                for size in offered
                if size < 2 * longest and self.count_blocks(size) <= MOST_BLOCKS
            ]
        return sorted({*offered, block_size})

    def picture(self, choice):
        """Return what the page needs to draw the map of a choice.

        Returns:
            dict of JSON values, and `cells`: S * N bytes, one `State` each.
        """
        grid = choice.grid
        return {
            "head": choice.head,
            "topk": choice.topk,
            "block_size": grid.block_size,
            "heads": self.H,
            "sizes": self.sizes(grid.block_size),
            "most_topk": max(choice.topk, int(np.diff(grid.cu_blocks).max())),
            "queries": grid.S,
            "blocks": grid.N,
            "edges": (np.flatnonzero(np.diff(grid.first_of_query)) + 1).tolist(),
            "cells": choice.cells.astype(np.uint8).tobytes(),
        }

    def detail(self, choice, query):
        """Return what the page says about one query.

        Returns:
            dict of JSON values: the sentence, and a row for every block that is read,
            in the order of the blocks, then one for the best block that is not.
        """
        grid, cells, scores = choice.grid, choice.cells[query], choice.scores[query]
        shares = block_shares(
            self.q[:, choice.head, None],
            self.k[:, choice.head * self.k.shape[1] // self.H, None],
            choice.selected,
            choice.blocks,
            query,
            softmax_scale=self.softmax_scale,
        )
        shown = np.flatnonzero(cells >= State.SELECTED).tolist()
        left_out = np.flatnonzero(cells == State.PAST)
        shown += left_out[np.argsort(-scores[left_out], kind="stable")[:1]].tolist()
        return {
            "head": choice.head,
            "topk": choice.topk,
            "block_size": grid.block_size,
            "query": query,
            "own": int(grid.of_query[query]),
            "left_out": len(left_out),
            "sentence": f"What to see: {reads(cells, query)}.",
            "rows": [
                {
                    "block": n,
                    "state": int(cells[n]),
                    "score": _number(scores[n]),
                    "share": _number(shares[n]),
                    "first": int(grid.start[n]),
                    "last": min(int(grid.end[n]) - 1, query),
                    "text": self._text(grid, n, query),
                }
                for n in shown
            ],
        }

    def _text(self, grid, n, query):
        """Return the text of a block up to the query, None where there is no text."""
        if self.text is None:
            return None
        return self.text[grid.start[n] : min(grid.end[n], query + 1)]


def _floats(x):
    """Return an array or a tensor as a float32 or float64 tensor on the CPU."""
    x = torch.as_tensor(x).detach().cpu()
    return x if x.dtype == torch.float64 else x.float()


def _check_shapes(q, k, v):
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if (
        any(x.ndim != 3 or 0 in x.shape for x in (q, k, v))
        or k.shape != v.shape
        or q.shape[::2] != k.shape[::2]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            "expected q (S, H, D), k and v (S, HK, D) where HK divides H and none is "
            f"empty, got q {shapes[0]}, k {shapes[1]}, v {shapes[2]}"
        )


def _check_offsets(cu_seqlens, S):
    """Return the offsets as a list, or say what is wrong with them."""
    if cu_seqlens is None:
        return [0, S]
    offsets = partition(array(cu_seqlens), block_size=S).cu_seqlens.tolist()
    if offsets[-1] != S:
        raise ValueError(f"cu_seqlens must end at the {S} tokens, got {offsets[-1]}")
    return offsets


def _number(value):
    """Return a float for JSON, which has neither infinities nor NaN: None for them."""
    return float(value) if np.isfinite(value) else None

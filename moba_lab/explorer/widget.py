"""The explorer itself: a widget where anywidget is installed, else a picture."""

import warnings
from pathlib import Path

from traitlets import Dict, Int, List, TraitError, validate

from moba_lab.explorer.call import Call
from moba_lab.explorer.still import still
from moba_lab.viz.show import bundle
from moba_lab.viz.style import COLOR, INK, State, labels
from moba_lab.viz.words import farthest

try:
    from anywidget import AnyWidget as Base
except ModuleNotFoundError:
    from traitlets import HasTraits as Base

FOLDER = Path(__file__).parent
SETTINGS = ("block_size", "topk", "head")


class BlockExplorer(Base):
    """Explore one attention call: point at a query and see what it reads, and why.

    Where the widget cannot run (a stored notebook, a page without a kernel, Jupyter
    without anywidget) the explorer shows a picture of the same.

    Args:
        q: (S, H, D) queries, array or tensor of floats.
        k: (S, HK, D) keys; HK divides H.
        v: (S, HK, D) values.
        block_size: tokens per block, at least 1.
        topk: blocks per query, the current one included, at least 1.
        cu_seqlens: (B+1,) offsets of the sequences. None: one sequence.
        text: S bytes, or (S,) uint8, one for every token. None: no text.
        head: the head to begin with.
        query: the query to begin with. None: the one that looks back farthest.
        softmax_scale: factor on the scores. None: D ** -0.5.

    Attributes:
        block_size, topk, head, query: what is chosen now. They follow what the reader
            does and can be set; a value that does not fit raises a TraitError and
            changes nothing.
        picture: what the map shows, `Call.picture`.
        detail: what is shown about the query, `Call.detail`.
        states: colour, ink and label of every state.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if shapes, offsets, block_size, topk or text do not fit, or if
            there are too many cells to draw.
        IndexError: if the head or the query does not exist.

    Example:
        >>> from moba_lab.example import running_example
        >>> e = running_example()
        >>> explorer = BlockExplorer(e.q, e.k, e.v, block_size=4, topk=3, query=22)
        >>> explorer.detail["sentence"]
        'What to see: query 22 reads blocks 0, 1 and its own, 5.'
        >>> explorer.topk = 2
        >>> explorer.detail["sentence"]
        'What to see: query 22 reads block 1 and its own, 5.'
    """

    _esm = FOLDER / "explorer.js"
    _css = FOLDER / "explorer.css"

    block_size = Int(1).tag(sync=True)
    topk = Int(1).tag(sync=True)
    head = Int(0).tag(sync=True)
    query = Int(0).tag(sync=True)
    picture = Dict().tag(sync=True)
    detail = Dict().tag(sync=True)
    states = List().tag(sync=True)

    def __init__(
        self,
        q,
        k,
        v,
        *,
        block_size,
        topk,
        cu_seqlens=None,
        text=None,
        head=0,
        query=None,
        softmax_scale=None,
    ):
        self._call = Call(q, k, v, cu_seqlens, text, softmax_scale)
        chosen = {"block_size": block_size, "topk": topk, "head": head}
        self._call.check(**chosen, query=0 if query is None else query)
        chosen = {name: int(value) for name, value in chosen.items()}
        self._choice = self._call.choose(**chosen)
        if query is None:
            query = farthest(self._choice.cells[:, None])
        super().__init__(
            **chosen,
            query=int(query),
            picture=self._call.picture(self._choice),
            detail=self._call.detail(self._choice, int(query)),
            states=_states(self._choice.grid.packed),
        )
        self.observe(self._choose, SETTINGS)
        self.observe(self._describe, "query")
        if not hasattr(self, "comm"):
            warnings.warn(
                "anywidget is not installed, so the explorer is a still picture; "
                "pip install anywidget",
                stacklevel=2,
            )

    @classmethod
    def of_layer(cls, aux, text=None, *, topk=None, head=0, query=None):
        """Explore what one layer of the small model read.

        Args:
            aux: `moba_lab.model.LayerAux`.
            text: S bytes, or (S,) uint8, what the model read. None: no text.
            topk: blocks per query. None: as in the layer, which must be of MoBA; for
                a layer that attends in full say what a gate should choose.
            head: the head to begin with.
            query: the query to begin with. None: the one that looks back farthest.

        Raises:
            ValueError: if the layer attends in full and topk is None.
        """
        if topk is None:
            if aux.selected is None:
                raise ValueError(
                    'this layer attends in full, expected one of kind "moba"; give '
                    "topk to see what a gate would choose"
                )
            topk = aux.selected.shape[-1]
        return cls(
            aux.q,
            aux.k,
            aux.v,
            block_size=aux.blocks.block_size,
            topk=topk,
            cu_seqlens=aux.cu_seqlens,
            text=text,
            head=head,
            query=query,
        )

    @validate("block_size", "topk", "head", "query")
    def _valid(self, proposal):
        values = {name: getattr(self, name) for name in (*SETTINGS, "query")}
        values[proposal.trait.name] = proposal.value
        try:
            self._call.check(**values)
        except (ValueError, IndexError) as error:
            # Only a TraitError makes traitlets take the assignment back.
            raise TraitError(str(error)) from error
        return proposal.value

    def _choose(self, _):
        """Recompute everything after a setting has changed."""
        chosen = {name: getattr(self, name) for name in SETTINGS}
        self._choice = self._call.choose(**chosen)
        self.picture = self._call.picture(self._choice)
        self._describe(None)

    def _describe(self, _):
        self.detail = self._call.detail(self._choice, self.query)

    def figure(self):
        """Draw what is shown now, as a figure of `moba_lab.viz`."""
        return still(self._choice, self.detail)

    def _repr_mimebundle_(self, **options):
        """Offer the widget where there is one, and the picture for everywhere else."""
        data, metadata = bundle(self.figure())
        if hasattr(Base, "_repr_mimebundle_"):
            shown, more = super()._repr_mimebundle_(**options)
            data, metadata = shown | data, more | metadata
        return data, metadata


def _states(packed):
    """Return colour, ink and label of every state, as in the figures."""
    named = labels(packed)
    return [
        {"color": COLOR[state], "ink": INK[state], "label": named[state]}
        for state in State
    ]

"""The two packages behind one interface, and inputs for both."""

from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

import moba_fast
import moba_ref

settings.register_profile("fixed seeds", derandomize=True, deadline=None)
settings.load_profile("fixed seeds")


@dataclass(frozen=True)
class Impl:
    """One package: `array` makes its input, every other name is the package's."""

    name: str
    module: ModuleType

    def array(self, x):
        return torch.as_tensor(x) if self.module is moba_fast else np.asarray(x)

    def __getattr__(self, function):
        return getattr(self.module, function)

    def __repr__(self):
        return self.name


REF, FAST = Impl("ref", moba_ref), Impl("fast", moba_fast)
IMPLS = [REF, FAST]


@dataclass(frozen=True)
class Case:
    """Inputs of one call, float64."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    cu_seqlens: list
    cu_seqlens_k: list
    block_size: int
    topk: int

    @property
    def options(self):
        return {
            "block_size": self.block_size,
            "topk": self.topk,
            "cu_seqlens": self.cu_seqlens,
            "cu_seqlens_k": self.cu_seqlens_k,
        }

    def run(self, impl, **options):
        """Call moba_attention and return NumPy arrays out, lse, selected."""
        tensors = [impl.array(x) for x in (self.q, self.k, self.v)]
        result = impl.moba_attention(
            *tensors, **{**self.options, **options}, return_aux=True
        )
        return tuple(np.asarray(x) for x in result)

    def partition(self, impl):
        return impl.partition(self.cu_seqlens_k, self.block_size, self.cu_seqlens)

    def replace(self, **fields):
        return replace(self, **fields)


def make_case(
    lengths, *, block_size, topk, queries=None, H=2, HK=1, D=4, seed=0, whole=False
):
    """Draw a pack; whole=True rounds to small integers, so that scores tie."""
    rng = np.random.default_rng(seed)
    cu_k = np.cumsum([0, *lengths]).tolist()
    cu_q = np.cumsum([0, *(lengths if queries is None else queries)]).tolist()
    q = rng.normal(size=(cu_q[-1], H, D))
    k, v = rng.normal(size=(2, cu_k[-1], HK, D))
    if whole:
        q, k = np.round(q), np.round(k)
    return Case(q, k, v, cu_q, cu_k, block_size, topk)


@st.composite
def cases(draw, most_tokens=24, decoding=True):
    """Draw packs with empty and short sequences, any block size, any topk, ties."""
    lengths = draw(st.lists(st.integers(0, most_tokens), min_size=1, max_size=4))
    queries = [draw(st.integers(0, n)) for n in lengths]
    HK, whole = draw(st.integers(1, 2)), draw(st.booleans())
    # Means of whole numbers are exact for powers of two, so that ties are real ties.
    sizes = st.sampled_from([1, 2, 4, 8]) if whole else st.integers(1, 9)
    return make_case(
        lengths,
        queries=queries if decoding and draw(st.booleans()) else None,
        block_size=draw(sizes),
        topk=draw(st.integers(1, 6)),
        H=HK * draw(st.integers(1, 3)),
        HK=HK,
        D=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**32 - 1)),
        whole=whole,
    )


def largest_error(a, b):
    """Return max |a - b|, or inf where one of them is not finite."""
    error = np.abs(np.asarray(a) - np.asarray(b)).max(initial=0.0)
    return error if np.isfinite(error) else np.inf

"""What a step of decoding reads: means and chosen pages, never all keys."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moba_fast import PagedKVCache, decode, pages

# Operators that may be given all pages: they look rows up, write rows or make views.
MAY_HOLD_ALL = {"index", "index_put_", "slice", "select", "alias", "unsqueeze"}


class Elements(TorchDispatchMode):
    """Count the elements of what operators make, and who is given all pages."""

    def __init__(self, pool):
        super().__init__()
        self.pool = {x.untyped_storage().data_ptr() for x in (pool.k, pool.v)}
        self.made, self.largest, self.given_pool = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tensors_in(args)}
        if given & self.pool:
            self.given_pool.add(function.__name__.split(".")[0])
        for x in tensors_in([result]):
            # Views and results of writing in place are what was given.
            if x.untyped_storage().data_ptr() not in given:
                self.made += x.numel()
                self.largest = max(self.largest, x.numel())
        return result


def tensors_in(values):
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from tensors_in(x)


def prompt(n_blocks, sequences, block_size=64, HK=2, D=16):
    """Fill a cache with sequences of n_blocks blocks, and one token more."""
    tokens = n_blocks * block_size + 1
    # One more page per sequence: growing copies all pages, now and then.
    cache = PagedKVCache(
        block_size, HK, D, sequences=sequences, pages=(n_blocks + 1) * sequences
    )
    generator = torch.Generator().manual_seed(n_blocks)
    k, v = torch.randn(2, sequences * tokens, HK, D, generator=generator)
    cache.append(k, v)
    return cache, generator


def step(cache, generator, topk, H=4):
    """Append and attend one token per sequence; return what that touched."""
    B, (_, _, HK, D) = len(cache.lengths), cache.pool.k.shape
    k, v = torch.randn(2, B, HK, D, generator=generator)
    q = torch.randn(B, H, D, generator=generator)
    with Elements(cache.pool) as elements:
        cache.append(k, v)
        cache.attend(q, topk=topk)
    return elements


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_a_step_reads_means_and_chosen_pages_only(sequences, topk):
    n_blocks, size, HK, D, H = 128, 64, 2, 16, 4
    elements = step(*prompt(n_blocks, sequences), topk, H)
    page, means = size * D, n_blocks * HK * D
    keys = ((topk - 1) * H + HK) * page
    # Keys and values are gathered once each, and laid out anew for a product.
    bound = sequences * (4 * keys + 4 * means * (topk > 1) + 2**13)
    assert elements.given_pool <= MAY_HOLD_ALL
    assert sequences * 2 * keys < elements.made <= bound
    assert elements.largest < sequences * n_blocks * size * HK * D / 8


def test_more_context_costs_means_and_nothing_else():
    HK, D, H, made = 2, 16, 4, {}
    for n_blocks in (64, 128, 256):
        made[n_blocks] = step(*prompt(n_blocks, 2), 3, H).made
    # Per block: its mean gathered, masked and laid out, then norms, scores, masks.
    per_block = 2 * (4 * HK * D + 2 * H + 8)
    for n in (64, 128):
        assert 0 < made[2 * n] - made[n] <= n * per_block
    # A key row per token would be more.
    assert per_block < 2 * 64 * HK * D / 4


def test_without_a_gate_context_costs_nothing():
    made = [step(*prompt(n, 2), 1).made for n in (64, 256)]
    # Only the row of the page table is longer.
    assert made[1] - made[0] <= 2 * 2 * (256 - 64)


def test_the_count_sees_a_pass_over_the_keys():
    cache, generator = prompt(64, 1)
    elements = step(cache, generator, None)
    assert elements.largest >= 64 * 64 * 2 * 16
    with Elements(cache.pool) as elements:
        cache.pool.k.sum()
    assert elements.given_pool == {"sum"}


def test_a_block_is_averaged_once_by_reading_it():
    cache, generator = prompt(64, 1)
    x = torch.randn(62, 2, 16, generator=generator)
    cache.append(x, x)
    before = cache.pool.k_mean.clone()
    with Elements(cache.pool) as elements:
        cache.append(x[:1], x[:1])
    # The page is read, and so are the tables that say where its tokens are.
    assert elements.made <= 4 * 64 * 2 * 16
    changed = (cache.pool.k_mean != before).any(-1).any(-1).nonzero().ravel()
    assert changed.tolist() == [cache.table.host[0, 64].item()]


@pytest.mark.parametrize("topk", [3, None])
def test_what_is_copied_at_once_is_bounded(topk, monkeypatch):
    monkeypatch.setattr(pages, "ELEMENTS_PER_COPY", 2**14)
    elements = step(*prompt(64, 8), topk)
    assert elements.largest <= 2**14


def test_a_step_needs_no_number_from_the_device(monkeypatch):
    # Tensors of the device "meta" have no numbers: whoever asks for one fails. The
    # gate asks whether scores tie, which is its own affair.
    monkeypatch.setattr(
        decode, "top_blocks", lambda scores, count, *_: scores.topk(count).indices
    )
    k, v = torch.empty(2, 9, 4, 2, 8, dtype=torch.bfloat16, device="meta")
    k_mean = torch.empty(9, 2, 8, device="meta")
    table = [[3, 1, 0], [2, 4, 6]]
    cache = PagedKVCache.from_pages(
        k, v, table, [9, 8], k_mean=k_mean, free_pages=[5, 7, 8]
    )
    x, q = (torch.empty(2, n, 8, dtype=k.dtype, device="meta") for n in (2, 4))
    for _ in range(3):
        cache.append(x, x)
        cache.reorder([1, 1])
        for topk in (1, 2, 3, None):
            out, lse, selected = cache.attend(q, topk=topk, return_aux=True)
            assert (out.device.type, out.shape) == ("meta", q.shape)
            assert (lse.dtype, lse.shape) == (torch.float32, (2, 4))
            assert topk is None or selected.shape == (2, 4, topk)
    with pytest.raises(RuntimeError, match="meta"):
        out.sum().item()

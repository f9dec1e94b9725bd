"""What is estimated and what is copied before a kernel runs."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import moba_fast
from moba_fast import op, workspace
from moba_fast._flash import KERNELS
from moba_fast.varlen import fit_head
from moba_fast.workspace import bytes_for_sums


def test_rows_that_fit_a_kernel_are_not_copied():
    x = torch.randn(5, 2, 64)
    assert fit_head(x, 8).data_ptr() == x.data_ptr()
    assert fit_head(x[:, 1:], 8).data_ptr() == x[:, 1:].data_ptr()


def test_rows_that_do_not_fit_are_padded_with_zeros():
    x = torch.randn(5, 2, 12)
    padded = fit_head(x, 8)
    assert padded.shape == (5, 2, 16)
    assert torch.equal(padded[..., :12], x)
    assert not padded[..., 12:].any()


@pytest.mark.parametrize(
    ("n_keys", "deterministic", "copies"),
    # 65,536 keys are 16 blocks: 132 processors need 9 programs for each of them.
    [(65_536, True, 9), (65_536, False, 1), (4096 * 132, True, 1), (0, True, 132)],
)
def test_deterministic_sums_are_kept_once_per_program(
    monkeypatch, n_keys, deterministic, copies
):
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    q, k = (torch.empty(n, 1, 128, device="meta") for n in (1, n_keys))
    per_query, per_key = bytes_for_sums(q, k, 4096, 12, deterministic)
    assert per_query == (copies - 1) * 11 * 512
    assert per_key == copies * 16


class Alive(TorchDispatchMode):
    """Count the bytes that tensors take, but for those that were there before."""

    def __init__(self, *there):
        super().__init__()
        self.sizes = {x.untyped_storage()._cdata: 0 for x in there}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return result

    def count(self, storage):
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, storage):
        self.now -= self.sizes.pop(storage)


class LikeFlashAttention:
    """Attend plainly, but let only that be counted which FlashAttention allocates."""

    head_multiple = 8

    def forward(self, *args):
        with _disable_current_modes():
            results = KERNELS["plain"].forward(*args)
        return tuple(x.clone() for x in results)

    def backward(self, dout, q, *args):
        with _disable_current_modes():
            grads = KERNELS["plain"].backward(dout, q, *args)
        sums_of_dq = torch.zeros_like(q, dtype=torch.float32)
        grads = tuple(x.clone() for x in grads)
        del sums_of_dq
        return grads


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("dtype", "D", "topk", "limit"),
    [
        (torch.bfloat16, 64, 4, 2**23),
        (torch.float32, 64, 4, 2**24),
        (torch.bfloat16, 8, 8, 2**31),
    ],
)
def test_a_call_takes_what_is_estimated(backward, dtype, D, topk, limit, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 4096, 4, D, generator=generator).to(dtype).unbind()
    options = {"block_size": 64, "topk": topk, "return_aux": True}
    out, lse, selected = moba_fast.moba_attention(q, k, v, **options)
    monkeypatch.setitem(KERNELS, "aten", LikeFlashAttention())
    monkeypatch.setattr(op, "kernel_of", lambda *_: "aten")
    # As on a GPU, where larger parts are not slower.
    monkeypatch.setattr(workspace, "BEST_ON_CPU", 2**60)
    how = None, None, 64, D**-0.5, "flash", False, limit
    # Inside an operator no mode would see anything.
    with Alive(q, k, v, out, lse, selected) as alive:
        if backward:
            tensors = out, q, k, v, out, lse, selected
            results = op.run_attend_backward(*tensors, *how)
        else:
            results = op.run_attend(q, k, v, selected, *how, False)
    taken = alive.most - sum(x.untyped_storage().nbytes() for x in results)
    part = workspace.parts(q, k, 64, topk, limit, backward)[0]
    per_query, per_key = workspace.bytes_per_row(q, 1, topk, backward)
    heads, rows = part.heads_k.stop - part.heads_k.start, part.queries[0][1]
    estimate = heads * (per_key * len(k) + per_query * rows)
    assert estimate / 3 < taken <= estimate <= limit

"""What is estimated and what is copied before a kernel runs."""

from types import SimpleNamespace

import pytest
import torch

from moba_fast.varlen import fit_head
from moba_fast.workspace import bytes_for_sums


def test_rows_that_fit_a_kernel_are_not_copied():
    x = torch.randn(5, 2, 64)
    assert fit_head(x).data_ptr() == x.data_ptr()
    assert fit_head(x[:, 1:]).data_ptr() == x[:, 1:].data_ptr()


def test_rows_that_do_not_fit_are_padded_with_zeros():
    x = torch.randn(5, 2, 12)
    padded = fit_head(x)
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

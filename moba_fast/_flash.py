"""Attend to packed sequences with the flash attention that is here, and keep the lse.

The only file that imports flash-attn or calls PyTorch's private flash operators. Their
common contract is in `varlen`; `choose` says which one backend "flash" runs.
"""

import importlib
import inspect
import os
from contextlib import contextmanager
from functools import cache

import torch

from moba_fast import _batches

aten = torch.ops.aten
# What backend "flash" may run, the best first.
GPU_KERNELS = ("flash-attn-4", "flash-attn", "aten")
VARIABLE = "MOBA_FAST_KERNEL"
LARGEST_HEAD = 256
# Keys that PyTorch's operator for CPUs takes at once; below SPLIT_FROM halves are slow.
KEYS_AT_ONCE, SPLIT_FROM = 512, 256


class Batched:
    """A kernel over batches of sequences of one shape. Always deterministic."""

    def __init__(self, attend, differentiate):
        self.attend, self.differentiate = attend, differentiate

    def forward(self, q, k, v, pack, causal, softmax_scale):
        """Attend; see `varlen.attention`."""
        return _batches.forward(self.attend, q, k, v, pack, causal, softmax_scale)

    def backward(self, dout, q, k, v, out, lse, pack, causal, softmax_scale, _):
        """Differentiate; see `varlen.attention_backward`."""
        tensors = dout, q, k, v, out, lse
        return _batches.backward(
            self.differentiate, *tensors, pack, causal, softmax_scale
        )


class Aten:
    """FlashAttention-2 as built into PyTorch."""

    head_multiple = 8

    @staticmethod
    def forward(q, k, v, pack, causal, softmax_scale):
        """Attend; see `varlen.attention`."""
        out, lse, *_ = aten._flash_attention_forward(
            *(q, k, v, pack.cu_q, pack.cu_k, pack.max_q, pack.max_k),
            *(0.0, causal, False),
            scale=softmax_scale,
        )
        return out, lse.T

    @staticmethod
    def backward(dout, q, k, v, out, lse, pack, causal, softmax_scale, deterministic):
        """Differentiate; see `varlen.attention_backward`."""
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
        with algorithms(deterministic):
            return aten._flash_attention_backward(
                *(dout, q, k, v, out, lse.T.contiguous()),
                *(pack.cu_q, pack.cu_k, pack.max_q, pack.max_k),
                *(0.0, causal, unused, unused),
                scale=softmax_scale,
            )


class FlashAttn:
    """The flash-attn package, 2.6 to 2.8, by its private functions with lse."""

    head_multiple = 8

    @staticmethod
    def forward(q, k, v, pack, causal, softmax_scale):
        """Attend; see `varlen.attention`."""
        result = package("flash-attn")._flash_attn_varlen_forward(
            *(q, k, v, pack.cu_q, pack.cu_k, pack.max_q, pack.max_k),
            *(0.0, softmax_scale, causal),
        )
        # Up to 2.6 it returned q, k, v and a padded output, too.
        lse = result[5] if len(result) == 8 else result[1]
        return result[0], lse.T

    @staticmethod
    def backward(dout, q, k, v, out, lse, pack, causal, softmax_scale, deterministic):
        """Differentiate; see `varlen.attention_backward`."""
        function = package("flash-attn")._flash_attn_varlen_backward
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        one = "window_size" in inspect.signature(function).parameters
        names = ("window_size_left", "window_size_right")
        windows = {"window_size": (-1, -1)} if one else dict.fromkeys(names, -1)
        function(
            *(dout, q, k, v, out, lse.T.contiguous(), dq, dk, dv),
            *(pack.cu_q, pack.cu_k, pack.max_q, pack.max_k),
            *(0.0, softmax_scale, causal),
            **windows,
            **{"softcap": 0.0, "alibi_slopes": None, "deterministic": deterministic},
        )
        return dq, dk, dv


class FlashAttn4:
    """The flash-attn-4 package: its public forward, its private backward with lse."""

    # On an H200 4.0.0b36 returned wrong dq for 8, 16, 40, 48, 72, 80, 104 and 112.
    head_multiple = 32

    @staticmethod
    def forward(q, k, v, pack, causal, softmax_scale):
        """Attend; see `varlen.attention`."""
        out, lse = package("flash-attn-4").flash_attn_varlen_func(
            *(q, k, v),
            **FlashAttn4.options(pack, causal, softmax_scale),
            return_lse=True,
        )
        return out, lse.T

    @staticmethod
    def backward(dout, q, k, v, out, lse, pack, causal, softmax_scale, deterministic):
        """Differentiate; see `varlen.attention_backward`."""
        return package("flash-attn-4")._flash_attn_bwd(
            *(q, k, v, out, dout, lse.T.contiguous()),
            **FlashAttn4.options(pack, causal, softmax_scale),
            deterministic=deterministic,
        )

    @staticmethod
    def options(pack, causal, softmax_scale):
        """Name the arguments that both directions share."""
        return {
            "cu_seqlens_q": pack.cu_q,
            "cu_seqlens_k": pack.cu_k,
            "max_seqlen_q": pack.max_q,
            "max_seqlen_k": pack.max_k,
            "softmax_scale": softmax_scale,
            "causal": causal,
        }


@contextmanager
def algorithms(deterministic):
    """Ask PyTorch for deterministic algorithms, or leave it as it is."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def default_kernel(q):
    """Name the kernel of backend "torch" on q's device."""
    return "cpu" if q.device.type == "cpu" else "plain"


def takes_batches(kernel):
    """Say whether a kernel works in batches of sequences of one shape."""
    return isinstance(KERNELS[kernel], Batched)


def choose(name=None):
    """Say which kernel backend "flash" runs.

    Args:
        name: one of GPU_KERNELS; None: what the environment variable MOBA_FAST_KERNEL
            names, otherwise the first one that runs here.

    Returns:
        name, or None where none runs.
        reason: why it was taken, or why there is none.

    Raises:
        ValueError: if there is no such kernel, or it does not run here.

    Example:
        >>> choose("flash-attn-1")
        Traceback (most recent call last):
        ValueError: unknown kernel 'flash-attn-1': choose one of 'flash-attn-4', ...
    """
    forced = name or os.environ.get(VARIABLE)
    missing = {kernel: why_not(kernel) for kernel in GPU_KERNELS}
    if forced is None:
        for kernel, reason in missing.items():
            if not reason:
                return kernel, KERNELS[kernel].__doc__.rstrip(".")
        return None, "; ".join(f"{k}: {reason}" for k, reason in missing.items())
    by = "the call" if name else VARIABLE
    if forced not in missing:
        names = ", ".join(map(repr, GPU_KERNELS))
        raise ValueError(f"unknown kernel {forced!r}: choose one of {names}")
    if missing[forced]:
        raise ValueError(
            f"kernel {forced!r}, asked for by {by}, does not run here: "
            f"{missing[forced]}"
        )
    return forced, f"asked for by {by}"


@cache
def why_not(kernel):
    """Say why a kernel does not run here, or "" if it does."""
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    if kernel == "aten":
        return "" if torch.backends.cuda.is_flash_attention_available() else "not built"
    try:
        package(kernel)
    except ImportError as error:
        return f"{kernel} cannot be imported ({error})"
    return ""


@cache
def package(kernel):
    """Import the module of a package that has the functions used here."""
    modules = {
        "flash-attn": "flash_attn.flash_attn_interface",
        "flash-attn-4": "flash_attn.cute.interface",
    }
    return importlib.import_module(modules[kernel])


def cpu_attention(q, k, v, causal, softmax_scale):
    """Attend with PyTorch's flash operator; as `_batches.plain_attention`."""
    m, n = q.shape[-2], k.shape[-2]
    if causal and q.dtype.itemsize > 2 and SPLIT_FROM <= m == n <= KEYS_AT_ONCE:
        return by_halves(q, k, v, softmax_scale)
    q, k, v = map(with_adjacent_elements, (q, k, v))
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, **cpu_mask(q, k, causal), scale=softmax_scale
    )


def by_halves(q, k, v, softmax_scale):
    """Attend causally as `cpu_attention`, without most scores that a mask would hide.

    The operator computes all scores of KEYS_AT_ONCE keys and masks those of later ones.
    Here the first half of the queries meets no key of the second, and so on in halves.
    """
    half = q.shape[-2] // 2
    (q_a, q_b), (k_a, k_b), (v_a, v_b) = (
        (x[..., :half, :], x[..., half:, :]) for x in (q, k, v)
    )
    first = cpu_attention(q_a, k_a, v_a, True, softmax_scale)
    own = cpu_attention(q_b, k_b, v_b, True, softmax_scale)
    past = cpu_attention(q_b, k_a, v_a, False, softmax_scale)
    merged = torch.logaddexp(own[1], past[1])
    out, lse = q.new_empty(q.shape), torch.cat([first[1], merged], dim=2)
    out[..., :half, :] = first[0]
    weights = [(x - merged).exp_()[..., None] for x in (own[1], past[1])]
    second = torch.mul(own[0], weights[0], out=out[..., half:, :])
    second.addcmul_(past[0], weights[1])
    return out, lse


def cpu_backward(dout, q, k, v, out, lse, causal, softmax_scale):
    """Differentiate with PyTorch's flash operator; as `_batches.plain_backward`."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *map(with_adjacent_elements, (dout, q, k, v, out)),
        lse.contiguous(),
        dropout_p=0.0,
        **cpu_mask(q, k, causal),
        scale=softmax_scale,
    )


def with_adjacent_elements(x):
    """Return x with stride 1 in its last axis, which the CPU operator takes as given.

    It checks nothing and reads wrong memory otherwise.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def cpu_mask(q, k, causal):
    """Return the CPU operator's arguments for a causal or a full attention.

    Its own causal mask puts the first query at the first key, so it serves only where
    there are as many queries as keys.
    """
    if not causal or q.shape[-2] == k.shape[-2]:
        return {"is_causal": causal}
    mask = q.new_zeros(q.shape[-2], k.shape[-2])
    after = _batches.after(q, k)
    return {"is_causal": False, "attn_mask": mask.masked_fill(after, -torch.inf)}


KERNELS = {
    "flash-attn-4": FlashAttn4,
    "flash-attn": FlashAttn,
    "aten": Aten,
    "cpu": Batched(cpu_attention, cpu_backward),
    "plain": Batched(_batches.plain_attention, _batches.plain_backward),
}

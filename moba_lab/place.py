"""Say where and how a model is trained: device, precision, compiled or not."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Dense bfloat16 FLOP/s from NVIDIA's data sheets, SXM versions, without sparsity.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Place:
    """A device and how it computes.

    device: "cpu" or "cuda".
    precision: "fp32", or "bf16" for `torch.autocast`; weights stay in float32.
    compile: whether `torch.compile` builds the model.
    """

    device: str = "cpu"
    precision: str = "fp32"
    compile: bool = False

    @property
    def is_gpu(self):
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def autocast(self):
        """Return the context in which the model computes."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device, PRECISIONS[self.precision])

    def compiled(self, function):
        """Compile a function, where that is wanted, for shapes that stay the same."""
        return torch.compile(function, dynamic=False) if self.compile else function

    def put(self, array):
        """Copy a NumPy array to the device, without waiting for it."""
        tensor = torch.from_numpy(array)
        if not self.is_gpu:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def choose_place(device="auto", precision="auto", compile=False):
    """Return the `Place` of these options; "auto" is a GPU, and there bf16.

    Raises:
        ValueError: device or precision has no such value, or there is no GPU.

    >>> choose_place("cpu")
    Place(device='cpu', precision='fp32', compile=False)
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f'expected "auto", "cpu" or "cuda" as device, got {device!r}')
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "expected a GPU for --device cuda, but PyTorch finds none; use --device cpu"
        )
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    if precision not in PRECISIONS:
        names = ", ".join(["auto", *PRECISIONS])
        raise ValueError(f"expected a precision of {names}, got {precision!r}")
    return Place(device, precision, compile)


@cache
def peak_flops(place):
    """Return the FLOP/s that a place can reach at most, and where the number is from.

    On hardware without an entry in `PEAKS` a large matrix product is timed.
    """
    if place.is_gpu and place.precision == "bf16":
        name = torch.cuda.get_device_name()
        for known, peak in PEAKS.items():
            if known in name:
                return peak, f"{known} data sheet, dense bf16"
    # Imported late, for it takes a second that no training needs.
    from moba_fast.ceilings import matmul_rate

    dtype = "bf16" if place.is_gpu else "fp32"
    return matmul_rate(place.device), f"a large {dtype} product, timed"

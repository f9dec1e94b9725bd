"""Move sizes between host and device, and know when that is not allowed."""

import torch


def expand_runs(lengths, total):
    """Repeat every index as often as its length says.

    Args:
        lengths: (R,) integers.
        total: their sum, given so that the host need not wait for the device.

    Example:
        >>> expand_runs(torch.tensor([2, 0, 3]), 5)
        tensor([0, 0, 2, 2, 2])
    """
    index = torch.arange(len(lengths), device=lengths.device)
    return index.repeat_interleave(lengths, output_size=total)


def capturing(x):
    """Say whether a CUDA graph is being captured on the device of x.

    The host cannot read sizes then, so callers take upper bounds that depend on shapes
    alone.
    """
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(x, device):
    """Send a small tensor of the host to a device without waiting for the device.

    Args:
        x: tensor of integers on the CPU; one-dimensional while a graph is captured.
        device: where it goes.
    """
    if device.type != "cuda":
        return x.to(device)
    if torch.cuda.is_current_stream_capturing():
        # A graph would copy from host memory that is gone at its replay, but it fills.
        return torch.stack([torch.full((), n, device=device) for n in x.tolist()])
    return x.pin_memory().to(device, non_blocking=True)

"""Measure the loss of every position on held-out files that are long enough."""

import numpy as np
import torch

from moba_lab.data import BOS
from moba_lab.place import Place


def whole_windows(texts, context, most=None):
    """Cut files into windows that lie in one file, without overlap.

    Args:
        texts: path -> (n,) uint8.
        context: bytes that are predicted in a window.
        most: windows to return, spread over the files; None means all.

    Returns:
        windows: (W, context + 1) int64; the first one of a file opens with `BOS`.
        files: (W,) indices of their files, ascending; windows of a file are alike, so
            a spread has to be taken over files.

    Raises:
        ValueError: no file is that long.

    >>> texts = {"a": np.arange(1, 8, dtype=np.uint8), "b": np.ones(2, np.uint8)}
    >>> whole_windows(texts, 3)[0].tolist()
    [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    windows, files = [], []
    for index, text in enumerate(texts.values()):
        tokens = np.concatenate([[BOS], text]).astype(np.int64)
        for start in range(0, len(tokens) - context, context):
            windows.append(tokens[start : start + context + 1])
            files.append(index)
    if not windows:
        raise ValueError(
            f"expected a held-out file of at least {context} bytes, found none; use a "
            "shorter context or a corpus of longer files"
        )
    windows, files = np.stack(windows), np.array(files)
    if most and most < len(windows):
        some = np.linspace(0, len(windows) - 1, most).astype(int)
        windows, files = windows[some], files[some]
    return windows, files


@torch.no_grad()
def window_losses(model, windows, place=None, tokens_at_once=2**17):
    """Compute the loss of every position of every window.

    Args:
        model: `moba_lab.model.Model`.
        windows: (W, S + 1) int64.
        place: `Place` of the model; None means the CPU in float32.
        tokens_at_once: that go through the model together, at most.

    Returns:
        (W, S) float32, nats.
    """
    place, losses = place or Place(), []
    rows = max(1, tokens_at_once // windows.shape[1])
    for first in range(0, len(windows), rows):
        some = np.ascontiguousarray(windows[first : first + rows])
        tokens = place.put(some)
        with place.autocast():
            found = model.losses(
                tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            )
        losses.append(found.float().cpu().numpy())
    return np.concatenate(losses)


def file_means(losses, files):
    """Average windows of the same file.

    Args:
        losses: (W, ...) float.
        files: (W,) indices of their files.

    Returns:
        means: (F, ...) of every file.
        counts: (F,) windows of every file.

    >>> file_means(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 2]))
    (array([2., 5.]), array([2, 1]))
    """
    names, counts = np.unique(files, return_counts=True)
    means = np.stack([losses[files == name].mean(0) for name in names])
    return means, counts

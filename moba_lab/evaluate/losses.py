"""Measure the loss by position, per token, and per byte so that tokenizers compare."""

import inspect
import math
from contextlib import closing, contextmanager

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from moba_lab.evaluate.texts import ROOM, too_short

# Equal parts of the context of which every one gets a mean.
PARTS = 16
# Logits that are there at once, at most.
LOGITS = 2**26


def text_windows(subject, haystack, length, most):
    """Cut windows of equal length from all over a text.

    Args:
        subject: `Subject`.
        haystack: `Haystack` of one text.
        length: tokens of a window.
        most: windows; fewer where they would overlap.

    Returns:
        ids: (W, length) int64.
        sizes: (W, length) float64, bytes that every token stands for.

    Raises:
        ValueError: the text is shorter than one window.
    """
    [text], [starts] = haystack.texts, haystack.starts
    room = length * subject.bytes_per_token
    count = max(1, min(most, int(len(text) // (1.2 * room))))
    ids, sizes = [], []
    last = max(0, len(text) - int(1.2 * room))
    for at in np.linspace(0, last, count) if count > 1 else [0]:
        first = int(starts[abs(starts - at).argmin()])
        piece = text[first : first + int(ROOM * room)].decode(errors="ignore")
        own, of_own = subject.ids_and_bytes(piece)
        if len(own) >= length:
            ids.append(own[:length])
            sizes.append(of_own[:length])
    if not ids:
        raise too_short(length)
    return np.stack(ids), np.stack(sizes)


def token_losses(model, ids):
    """Compute the loss of every token but the first, given those before it.

    Args:
        model: causal language model of transformers.
        ids: (W, S) integers.

    Returns:
        (W, S - 1) float32, nats; column p is about the token at position p + 1.
    """
    device = model.get_input_embeddings().weight.device
    rows = torch.as_tensor(ids, device=device)
    return torch.stack([row_losses(model, row[None]) for row in rows]).numpy()


def row_losses(model, row):
    """Compute the losses of one row (1, S): (S - 1,) float32 on the CPU."""
    losses, targets = [], row[0, 1:]
    # Closed whatever happens, for the model is not itself while parts are read.
    with closing(logits_in_parts(model, row)) as parts:
        for logits in parts:
            some, targets = targets[: len(logits)], targets[len(logits) :]
            logits = logits[: len(some)].float()
            losses.append(cross_entropy(logits, some, reduction="none"))
    return torch.cat(losses).cpu()


@torch.no_grad()
def logits_in_parts(model, row):
    """Yield the logits of all positions, some at a time.

    The layers run once; then the head of the model reads some of what they gave. All
    logits at once would take more memory than anything else in a long text.

    Args:
        model: causal language model of transformers.
        row: (1, S) ids.

    Yields:
        (n, vocabulary).
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    n, size = row.shape[1], max(1, LOGITS // vocabulary)
    body = model.get_decoder()
    kept = hidden_states(model, body, row) if n > size else []
    if not kept:
        yield model(row, use_cache=False).logits[0]
        return
    with replaced_forward(body, kept[0]):
        for first in range(0, n, size):
            at = torch.arange(first, min(n, first + size), device=row.device)
            yield model(row, use_cache=False, logits_to_keep=at).logits[0]


def hidden_states(model, body, row):
    """Return a list of what the layers of a model give.

    It is empty for a model that cannot give the logits of some positions only.
    """
    kept = []
    if body is model or not takes_few_logits(model):
        return kept
    hook = body.register_forward_hook(lambda *call: kept.append(call[-1]))
    try:
        model(row, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return kept


def takes_few_logits(model):
    """Say whether a model can give the logits of some positions only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@contextmanager
def replaced_forward(module, result):
    """Let a module return a result that is known already."""
    before = module.__dict__.get("forward")
    module.forward = lambda *args, **options: result
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def by_position(losses, sizes, parts=PARTS):
    """Average losses over equal parts of the context.

    Args:
        losses: (W, S - 1) nats, see `token_losses`.
        sizes: (W, S) bytes of every token.
        parts: how many, fewer where there are fewer positions.

    Returns:
        dict: loss, nats per token; perplexity, its exponential; bits_per_byte; loss_se,
        standard error of the loss over windows; part_losses and part_bits, nats per
        token and bits per byte of every part; windows; tokens, predicted ones.

    >>> by_position(np.full((1, 4), math.log(2)), np.full((1, 5), 2.0), parts=2)[
    ...     "part_bits"]
    [0.5, 0.5]
    """
    told = sizes[:, 1:]
    cuts = np.array_split(np.arange(losses.shape[1]), min(parts, losses.shape[1]))
    windows = len(losses)
    spread = np.std(losses.mean(1), ddof=1) if windows > 1 else None
    loss = float(losses.mean())
    return {
        "windows": windows,
        "tokens": losses.size,
        "loss": loss,
        "loss_se": None if spread is None else float(spread / windows**0.5),
        "perplexity": math.exp(loss),
        "bits_per_byte": bits(losses, told),
        "bytes_per_token": float(told.sum() / losses.size),
        "part_losses": [float(losses[:, cut].mean()) for cut in cuts],
        "part_bits": [bits(losses[:, cut], told[:, cut]) for cut in cuts],
    }


def bits(losses, sizes):
    """Return the bits per byte of tokens with losses in nats; NaN without a byte."""
    size = sizes.sum()
    return float(losses.sum() / math.log(2) / size) if size else math.nan

"""Say whether the gate chose the blocks that hold an answer."""

import numpy as np
import torch

# What became of an example, see `outcome`.
OUTCOMES = ("right", "reading error", "routing error")


@torch.no_grad()
def needle_choices(model, example):
    """Ask every head whether it read the byte that must be written next.

    The query that predicts byte i of the answer wants the block that holds byte i of
    the needle. Layers with full attention read every block.

    Args:
        model: `moba_lab.model.Model`.
        example: `Example` with one needle, whose bytes the answer begins with.

    Returns:
        (layers, H, n) bool for the n bytes of the needle.

    Raises:
        ValueError: there is not one needle, or the answer does not begin with it.
    """
    [(first, end)] = example.needles if len(example.needles) == 1 else [(0, 0)]
    needle = example.prompt[first:end]
    if not needle or not example.answer.startswith(needle):
        raise ValueError(
            "expected an example with one needle, which the answer begins with, got "
            f"{len(example.needles)}"
        )
    device = model.embedding.weight.device
    tokens = torch.tensor(list(example.text[:-1]), device=device)
    _, aux = model(tokens, return_aux=True)
    queries = len(example.prompt) - 1 + np.arange(end - first)
    return np.stack([chose(layer, queries, np.arange(first, end)) for layer in aux])


def chose(aux, queries, tokens):
    """Return whether query i read the block of token i, for every head: (H, n) bool.

    Args:
        aux: `moba_lab.model.LayerAux`.
        queries: (n,) places.
        tokens: (n,) places.
    """
    heads = aux.q.shape[1]
    if aux.selected is None:
        return np.ones((heads, len(queries)), dtype=bool)
    of_token = torch.as_tensor(aux.blocks.of_token).cpu().numpy()
    selected = aux.selected.cpu().numpy()[queries]
    return (selected == of_token[tokens][:, None, None]).any(-1).T


def outcome(predicted, answer, choices):
    """Tell a routing error from a reading error.

    A wrong answer is a routing error if, at its first wrong byte, no head of any layer
    had the block that holds the byte: nothing could have read it from there. It is a
    reading error if some head had the block.

    Args:
        predicted: bytes, from `scoring.predictions`.
        answer: bytes.
        choices: (layers, H, n) bool from `needle_choices`; bytes of the answer behind
            the needle count as read.

    Returns:
        One of `OUTCOMES`.

    >>> choices = np.array([[[True, False]]])
    >>> outcome(b"41", b"42", choices), outcome(b"12", b"42", choices)
    ('routing error', 'reading error')
    """
    if predicted == answer:
        return "right"
    pairs = zip(predicted, answer, strict=True)
    wrong = next(i for i, (a, b) in enumerate(pairs) if a != b)
    read = wrong >= choices.shape[-1] or choices[..., wrong].any()
    return "reading error" if read else "routing error"

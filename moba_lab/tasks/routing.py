"""Say whether the gate chose the blocks that hold an answer."""

import numpy as np
import torch

# What became of an example, see `outcome`.
OUTCOMES = ("right", "reading error", "routing error")


@torch.no_grad()
def read_needle(model, example):
    """Let a model write an answer, and ask every head whether it read where it stands.

    The query that predicts byte i of the answer wants the block that holds byte i of
    the needle. Layers with full attention read every block.

    Args:
        model: `moba_lab.model.Model`.
        example: `Example` with one needle, whose bytes the answer begins with.

    Returns:
        said: bytes, as `scoring.predictions` returns them.
        choices: (layers, H, n) bool for the n bytes of the needle.
        aux: list of `moba_lab.model.LayerAux` of the pass.

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
    logits, aux = model(tokens, return_aux=True)
    last = len(example.prompt) - 1
    said = bytes(logits[last:].argmax(-1).tolist())
    queries = last + np.arange(end - first)
    wanted = np.arange(first, end)
    choices = np.stack([chose(layer, queries, wanted) for layer in aux])
    return said, choices, aux


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
    blocks = torch.as_tensor(aux.blocks.of_token).cpu().numpy()[tokens]
    selected = aux.selected[torch.as_tensor(queries)].cpu().numpy()
    return (selected == blocks[:, None, None]).any(-1).T


def outcome(said, answer, choices):
    """Tell a routing error from a reading error.

    A wrong answer is a routing error if, at its first wrong byte, no head of any layer
    had the block that holds the byte: nothing could have read it from there. It is a
    reading error if some head had the block.

    Args:
        said: bytes, the likeliest ones given the answer so far.
        answer: bytes.
        choices: (layers, H, n) bool from `read_needle`; bytes of the answer behind the
            needle count as read.

    Returns:
        One of `OUTCOMES`.

    >>> choices = np.array([[[True, False]]])
    >>> outcome(b"41", b"42", choices), outcome(b"12", b"42", choices)
    ('routing error', 'reading error')
    """
    if said == answer:
        return "right"
    pairs = zip(said, answer, strict=True)
    wrong = next(i for i, (a, b) in enumerate(pairs) if a != b)
    read = wrong >= choices.shape[-1] or choices[..., wrong].any()
    return "reading error" if read else "routing error"

"""Score what a model writes: exact match, and the share of strings that it holds.

Exact match needs no generation. A greedy answer equals the wanted one if and only if,
given the wanted answer so far, the likeliest next byte is the wanted one at every
place: where the first greedy byte is right, the second is predicted from the same text,
and so on; where one is wrong, the answers differ already. So one pass over prompt and
answer decides, for many examples at once.
"""

import numpy as np
import torch

# Where the layers named "moba" read blocks: everywhere, or in the prompt only.
DECODE = ("moba", "full")


def string_recall(answer, references):
    """Return the share of the references that an answer holds, in any case of letters.

    RULER's rule for needles, variables and counted words (arXiv 2404.06654,
    "recall-based accuracy"); further text in the answer costs nothing.

    Args:
        answer: bytes or str.
        references: of the same type.

    >>> string_recall(b"they are 12 and 7", [b"7", b"12", b"9", b"8"])
    0.5
    """
    found = [reference.lower() in answer.lower() for reference in references]
    return sum(found) / len(found)


@torch.no_grad()
def predictions(model, examples, decode="moba"):
    """Predict every byte of the answers from the prompt and the answer before it.

    Args:
        model: `moba_lab.model.Model`.
        examples: list of `Example`.
        decode: "moba": layers attend in the answer as in the prompt; "full": every
            layer attends in full there (paper, section 3.3).

    Returns:
        list of bytes, the likeliest byte at every place of the answer.
    """
    lengths = [len(example.text) - 1 for example in examples]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    tokens = np.concatenate(
        [np.frombuffer(e.text[:-1], np.uint8) for e in examples]
    ).astype(np.int64)
    # The last byte of the prompt is the first query whose prediction is generated, but
    # its own attention belongs to the prefill.
    prompts = torch.tensor([len(example.prompt) for example in examples])
    logits = run(model, torch.from_numpy(tokens), cu_seqlens, prompts, decode)
    best = logits.argmax(-1).cpu().numpy().astype(np.uint8)
    starts = cu_seqlens[:-1].tolist()
    return [
        best[start + len(e.prompt) - 1 : start + length].tobytes()
        for start, length, e in zip(starts, lengths, examples, strict=True)
    ]


def exact_matches(model, examples, decode="moba"):
    """Return, for every example, whether the greedy answer is the wanted one.

    Args and decode as in `predictions`.

    Returns:
        (len(examples),) bool.
    """
    said = predictions(model, examples, decode)
    return np.array([a == e.answer for a, e in zip(said, examples, strict=True)])


@torch.no_grad()
def greedy(model, prompt, count, stop=b"", decode="moba"):
    """Write the likeliest byte again and again.

    The whole text is read again for every byte, so that nothing is kept that could
    differ from a single pass.

    Args:
        model: `moba_lab.model.Model`.
        prompt: bytes.
        count: bytes to write at most.
        stop: a byte after which nothing more is written; empty: none.
        decode: as in `predictions`.

    Returns:
        bytes, at most count.
    """
    text = bytearray(prompt)
    for _ in range(count):
        tokens = torch.tensor(list(text))
        ends = torch.tensor([0, len(text)], dtype=torch.int32)
        logits = run(model, tokens, ends, torch.tensor([len(prompt)]), decode)
        text.append(int(logits[-1].argmax()))
        if text[-1:] == stop:
            break
    return bytes(text[len(prompt) :])


def run(model, tokens, cu_seqlens, prompts, decode):
    """Return the logits of a pack whose sequences begin with prompts."""
    if decode not in DECODE:
        raise ValueError(f'expected decode to be "moba" or "full", got {decode!r}')
    device = model.embedding.weight.device
    prompts = prompts.to(device) if decode == "full" else None
    return model(tokens.to(device), cu_seqlens.to(device), prompt_lengths=prompts)

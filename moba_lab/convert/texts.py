"""Turn texts into tokens, and tokens into windows to train on and to measure."""

from pathlib import Path

import numpy as np
import torch

from moba_lab.data import BOS
from moba_lab.hub import FORMATS

IGNORED = -100


def cached_tokens(path, tokenizer, make_texts):
    """Return the tokens of texts in a row, and keep them in a file.

    Args:
        path: of the file, `.npy`; where it is, the texts are not read again.
        tokenizer: of transformers.
        make_texts: function of no arguments that returns the texts as bytes.

    Returns:
        (n,) int32, as many texts as there are, each opened by the tokenizer's first
        token or else closed by its last.
    """
    path = Path(path)
    if not path.exists():
        whole = np.concatenate([token_ids(tokenizer, text) for text in make_texts()])
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.save(file, whole)
        path.with_suffix(".tmp").replace(path)
    return np.load(path, mmap_mode="r")


def token_ids(tokenizer, text):
    """Return the tokens of one text, (n,) int32, with what separates it from others."""
    text = text.decode("utf-8", errors="replace")
    ids = tokenizer(text, verbose=False)["input_ids"]
    opened = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    if not opened and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return np.array(ids, dtype=np.int32)


def training_texts(corpus):
    """Return the training files of a `Corpus`, as bytes."""
    return [text for text in corpus.train.tobytes().split(bytes([BOS])) if text]


class Windows(torch.utils.data.Dataset):
    """Windows of a row of tokens, one after another, for the library's `Trainer`.

    Args:
        tokens: (n,) integers.
        length: of a window.
        seed: decides where the first one begins.

    Raises:
        ValueError: there are not enough tokens for one window.

    >>> [row["input_ids"].tolist() for row in Windows(np.arange(7), 3, seed=1)]
    [[1, 2, 3], [4, 5, 6]]
    """

    def __init__(self, tokens, length, seed):
        if len(tokens) < length:
            raise ValueError(
                f"expected at least {length} tokens to train on, got {len(tokens)}; "
                "use more text or a shorter context"
            )
        room = min(length, len(tokens) - length + 1)
        first = int(np.random.default_rng(seed).integers(room))
        self.tokens, self.length = tokens, length
        self.starts = range(first, len(tokens) - length + 1, length)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        start = self.starts[index]
        row = np.array(self.tokens[start : start + self.length], dtype=np.int64)
        return {"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)}


def held_out_windows(tokenizer, texts, length, most):
    """Cut windows to measure on, each within one text where texts are long enough.

    Args:
        tokenizer: of transformers.
        texts: list of bytes.
        length: tokens of a window.
        most: windows; they are taken from all over the texts.

    Returns:
        (W, length) int64.

    Raises:
        ValueError: all texts together are shorter than one window.
    """
    rows = [token_ids(tokenizer, text) for text in texts]
    windows = cut(rows, length)
    if len(windows) < min(2, most):
        windows = cut([np.concatenate(rows)], length)
    if not windows:
        raise ValueError(
            f"expected held-out texts of at least {length} tokens together, got "
            f"{sum(map(len, rows))}; use more text or a shorter context"
        )
    some = np.linspace(0, len(windows) - 1, min(most, len(windows))).astype(int)
    return np.stack([windows[i] for i in some]).astype(np.int64)


def cut(rows, length):
    """Cut rows into windows, without overlap and without a rest."""
    return [
        row[start : start + length]
        for row in rows
        for start in range(0, len(row) - length + 1, length)
    ]


def tuning_rows(name):
    """Read a dataset to fine-tune on, a list of dicts.

    Args:
        name: of a dataset, or FORMAT:PATH with a format of `moba_lab.hub.FORMATS`.

    Raises:
        ValueError: a row has neither prompt and completion nor messages.
    """
    import datasets

    kind, _, path = name.partition(":")
    if path and kind in FORMATS:
        found = datasets.load_dataset(kind, data_files=path, split="train")
    else:
        found = datasets.load_dataset(name, split="train")
    columns = set(found.column_names)
    if not ({"prompt", "completion"} <= columns or "messages" in columns):
        raise ValueError(
            f"expected columns prompt and completion, or messages, in {name}, got "
            f"{', '.join(sorted(columns))}"
        )
    return list(found)


def answers(tokenizer, rows, length):
    """Turn rows into tokens of which only the answer counts.

    Args:
        tokenizer: of transformers; for messages it must have a chat template.
        rows: from `tuning_rows`.
        length: longer ones are left out.

    Returns:
        list of {"input_ids", "labels"}, each (n,) int64.

    Raises:
        ValueError: none is short enough.
    """
    found = []
    for row in rows:
        asked, said = question_and_answer(tokenizer, row)
        if len(asked) + len(said) <= length:
            ids, labels = torch.tensor([*asked, *said]), [IGNORED] * len(asked)
            labels = torch.tensor([*labels, *said])
            found.append({"input_ids": ids, "labels": labels})
    if not found:
        raise ValueError(
            f"expected answers of at most {length} tokens with their questions, got "
            f"{len(rows)} longer ones; use longer stages"
        )
    return found


def question_and_answer(tokenizer, row):
    """Return the tokens of a row's question and of its answer, two lists."""
    if row.get("messages"):
        whole = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, tokenize=True
        )["input_ids"]
        asked = tokenizer.apply_chat_template(
            row["messages"][:-1],
            return_dict=True,
            tokenize=True,
            add_generation_prompt=True,
        )["input_ids"]
        return asked, whole[len(asked) :]
    asked = tokenizer(row["prompt"], verbose=False)["input_ids"]
    said = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return asked, said if end is None else [*said, end]


def collate(rows):
    """Make a batch of rows, those that are shorter padded at the end."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": mask,
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }

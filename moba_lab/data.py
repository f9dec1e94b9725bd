"""Text for the small model: Python's own standard library, found on every machine.

Nothing is downloaded and no text is shipped: `checkpoints/corpus.tsv` lists the files
(path, bytes, SHA-256, split) that the shipped model was trained and measured on.
"""

import builtins
import hashlib
import keyword
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MANIFEST = Path(__file__).parent / "checkpoints" / "corpus.tsv"

# Whole packages, so that no held-out file has a sibling among the training files.
HELD_OUT = ("asyncio", "concurrent", "json", "tomllib", "wsgiref", "zoneinfo")

# Installed packages, tests, and tables (character maps, topic texts, colour demos).
EXCLUDED = frozenset(
    {
        *("site-packages", "dist-packages", "lib-dynload", "test", "tests"),
        *("idle_test", "turtledemo", "encodings", "pydoc_data"),
    }
)

# Written when Python is built, so they differ from machine to machine.
GENERATED = ("_sysconfigdata", "config-")

# A byte that no source file contains: it opens every file, in training and evaluation.
BOS = 0

# Words that `rename_names` replaces, less those that mean the same in every file.
NAME = re.compile(rb"[A-Za-z_]\w{3,}")
KEPT = frozenset(word.encode() for word in [*keyword.kwlist, *dir(builtins), "self"])


@dataclass(frozen=True)
class File:
    """One text file of the corpus."""

    path: str
    size: int
    sha256: str
    split: str


@dataclass(frozen=True)
class Corpus:
    """The files of a folder, read: one training stream, held-out files by name.

    train: (n,) uint8, every training file opened by the byte `BOS`.
    held_out: path relative to `root` -> (n_i,) uint8, without `BOS`.
    """

    root: Path
    files: tuple[File, ...]
    train: np.ndarray
    held_out: dict[str, np.ndarray]


@dataclass(frozen=True)
class Differences:
    """How a folder differs from a manifest; true when it differs at all."""

    changed: tuple[str, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]

    def __bool__(self):
        return bool(self.changed or self.missing or self.added)

    def __str__(self):
        if not self:
            return "every file agrees with the manifest"
        parts = []
        for name in ("changed", "missing", "added"):
            paths = getattr(self, name)
            if paths:
                shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
                parts.append(f"{len(paths)} {name}: {shown}")
        return "; ".join(parts)


def stdlib_root():
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load_corpus(root=None):
    """Read the corpus below `root`, the same on every run.

    Args:
        root: folder of text files; None means the standard library's `.py` files, less
            tests, installed packages and tables, with the packages `HELD_OUT` held out.
            Of any other folder every UTF-8 file is taken and every 16th held out.

    Returns:
        `Corpus`. Files are in the order of their paths; of files with equal bytes only
        one is kept, the held-out one before all others.

    Raises:
        ValueError: the folder gives no training file or no held-out file.
    """
    if root is None:
        root = stdlib_root()
        texts = _read_stdlib(root)
        return _corpus(root, texts, _held_out_packages(texts))
    return corpus_of_texts(Path(root), _read_folder(Path(root)))


def folder_texts(root):
    """Read the text files below a folder.

    Returns:
        path relative to it -> bytes, in the order of the paths; what is empty or not
        UTF-8, or holds `BOS`, is left out.
    """
    return _only_text(_read_folder(Path(root)))


def corpus_of_texts(root, texts):
    """Make a corpus of texts, with every 16th held out.

    Args:
        root: where they come from.
        texts: name -> bytes; what is empty or not UTF-8, or holds `BOS`, is left out.

    Returns:
        `Corpus`, as `load_corpus`.

    Raises:
        ValueError: there is no training text or no held-out text.
    """
    texts = _only_text(texts)
    return _corpus(root, texts, set(list(texts)[::16]))


def _corpus(root, texts, held_out):
    files, kept = [], set()
    for path in sorted(texts, key=lambda path: (path not in held_out, path)):
        digest = hashlib.sha256(texts[path]).hexdigest()
        if digest not in kept:
            kept.add(digest)
            split = "held-out" if path in held_out else "train"
            files.append(File(path, len(texts[path]), digest, split))
    if {file.split for file in files} != {"train", "held-out"}:
        raise ValueError(
            f"expected at least two different text files below {root}, one to train on "
            f"and one to hold out, got {len(files)}; name another folder"
        )
    train = b"".join(bytes([BOS]) + texts[f.path] for f in files if f.split == "train")
    return Corpus(
        root=root,
        files=tuple(sorted(files, key=lambda file: file.path)),
        train=np.frombuffer(train, dtype=np.uint8),
        held_out={
            f.path: np.frombuffer(texts[f.path], dtype=np.uint8)
            for f in files
            if f.split == "held-out"
        },
    )


def write_manifest(files, path=MANIFEST):
    """Write one line per file: split, bytes, SHA-256 and path, separated by tabs."""
    lines = [f"{f.split}\t{f.size}\t{f.sha256}\t{f.path}\n" for f in files]
    Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")


def read_manifest(path=MANIFEST):
    """Read what `write_manifest` wrote, as a tuple of `File`."""
    rows = Path(path).read_text(encoding="utf-8").splitlines()
    fields = [row.split("\t") for row in rows]
    return tuple(File(name, int(size), sha, split) for split, size, sha, name in fields)


def compare_with_manifest(files, manifest):
    """Say which files differ from the manifest.

    Args:
        files: `Corpus.files` of this machine.
        manifest: the expected files, from `read_manifest`.

    Returns:
        `Differences`, each of its fields in the order of the paths.

    >>> here = [File("ast.py", 3, "aa", "train"), File("new.py", 1, "cc", "train")]
    >>> there = [File("ast.py", 3, "bb", "train"), File("old.py", 1, "dd", "train")]
    >>> print(compare_with_manifest(here, there))
    1 changed: ast.py; 1 missing: old.py; 1 added: new.py
    """
    here = {file.path: file for file in files}
    there = {file.path: file for file in manifest}
    both = sorted(here.keys() & there.keys())
    return Differences(
        changed=tuple(path for path in both if here[path] != there[path]),
        missing=tuple(sorted(there.keys() - here.keys())),
        added=tuple(sorted(here.keys() - there.keys())),
    )


def verify_corpus(corpus, manifest_path=MANIFEST):
    """Compare a corpus with the shipped manifest; warn, and go on, if they differ.

    Another Python version has other files: the model still works on them, but its
    numbers are not those of its card.
    """
    differences = compare_with_manifest(corpus.files, read_manifest(manifest_path))
    if differences:
        warnings.warn(
            f"the files below {corpus.root} are not those of the shipped model's card "
            f"({differences}); numbers will differ from the card's",
            stacklevel=2,
        )
    return differences


class BatchSampler:
    """Cut a stream into windows and draw each once per epoch, in a seeded order.

    The order is a function of (seed, epoch) alone, so the state is two integers. Every
    epoch cuts at another offset, so the windows' borders move through the text.

    Args:
        stream: (n,) uint8.
        batch: windows per batch.
        context: bytes per window.
        seed: any integer of 0 or more.
        rename: share of the windows that go through `rename_names`.
        whole_files: cut within files, those that are longer than a window.

    Raises:
        ValueError: the stream is too short, or none of its files is long enough.

    >>> sampler = BatchSampler(np.arange(9, dtype=np.uint8), batch=1, context=4, seed=0)
    >>> tokens, targets = sampler.next_batch()
    >>> bool((tokens[1:] == targets[:-1]).all())
    True
    """

    def __init__(self, stream, batch, context, seed, rename=0.0, whole_files=False):
        if len(stream) < 2 * context:
            raise ValueError(
                f"expected a stream of at least 2 * context = {2 * context} bytes, got "
                f"{len(stream)}; use more text or a smaller context"
            )
        self.stream, self.batch, self.context, self.seed = stream, batch, context, seed
        self.rename = rename
        self._spans = _long_files(stream, context) if whole_files else None
        self.epoch = self.window = 0
        self._starts = self._order()

    def next_batch(self):
        """Return `tokens, targets`, each (batch * context,) int64, windows in a row."""
        rows = np.stack([self._next_window() for _ in range(self.batch)])
        rows = rows.astype(np.int64)
        return rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)

    def skip(self, windows):
        """Go on as if so many more windows had been read."""
        self.window += windows
        while self.window > len(self._starts):
            self.window -= len(self._starts)
            self.epoch += 1
            self._starts = self._order()

    def state_dict(self):
        """Return what `load_state_dict` needs to go on with the same batches."""
        return {"seed": self.seed, "epoch": self.epoch, "window": self.window}

    def load_state_dict(self, state):
        """Go on where `state_dict` was taken."""
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._starts = self._order()
        self.window = state["window"]

    def _next_window(self):
        if self.window == len(self._starts):
            self.epoch, self.window = self.epoch + 1, 0
            self._starts = self._order()
        start = self._starts[self.window]
        row = self.stream[start : start + self.context + 1]
        rng = np.random.default_rng([self.seed, self.epoch, self.window])
        self.window += 1
        return rename_names(row, rng) if rng.random() < self.rename else row

    def _order(self):
        rng, step = np.random.default_rng([self.seed, self.epoch]), self.context
        if self._spans is None:
            offset = rng.integers(step)
            return rng.permutation(np.arange(offset, len(self.stream) - step, step))
        starts = [
            np.arange(first + rng.integers(min(step, last - step - first)), last - step)
            for first, last in self._spans
        ]
        return rng.permutation(np.concatenate([of_file[::step] for of_file in starts]))


def rename_names(text, rng, share=0.5):
    """Give names new spellings of the same length, each the same wherever it stands.

    A model that reads such text cannot know a name by heart: from its second occurrence
    on it has to be looked up, which is what we want to see attention do.

    Args:
        text: (n,) uint8.
        rng: numpy Generator.
        share: probability that a name gets a new spelling.

    Returns:
        (n,) uint8; letters of names become other letters of the same case, while short
        words, keywords and builtins stay.

    >>> text = np.frombuffer(b"def Find_it(x): Find_it(x)", dtype=np.uint8)
    >>> rename_names(text, np.random.default_rng(0), share=1.0).tobytes()
    b'def Nhib_ae(x): Nhib_ae(x)'
    """
    text = text.tobytes()
    spelling = {}
    for name in dict.fromkeys(NAME.findall(text)):
        if name not in KEPT and rng.random() < share:
            letters = rng.integers(26, size=len(name)).tolist()
            spelling[name] = bytes(map(_other_letter, name, letters))
    renamed = NAME.sub(lambda match: spelling.get(match[0], match[0]), text)
    return np.frombuffer(renamed, dtype=np.uint8)


def _other_letter(old, letter):
    if chr(old).islower():
        return ord("a") + letter
    return ord("A") + letter if chr(old).isupper() else old


def _long_files(stream, context):
    """Return (first, last + 1) of every file that holds a window and its targets."""
    first = np.flatnonzero(stream == BOS)
    last = np.append(first[1:], len(stream))
    long = last - first > context
    if not long.any():
        raise ValueError(
            f"expected a file of more than {context} bytes to cut windows from, the "
            f"longest has {(last - first).max(initial=0)}; use a smaller context"
        )
    return list(zip(first[long].tolist(), last[long].tolist(), strict=True))


def _read_stdlib(root):
    texts = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not EXCLUDED & set(parts) and not parts[0].startswith(GENERATED):
            texts["/".join(parts)] = path.read_bytes()
    return {path: texts[path] for path in sorted(texts) if texts[path]}


def _read_folder(root):
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def _held_out_packages(texts):
    return {path for path in texts if path.split("/")[0] in HELD_OUT}


def _only_text(texts):
    return {name: texts[name] for name in sorted(texts) if _is_text(texts[name])}


def _is_text(data):
    if not data:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return bytes([BOS]) not in data

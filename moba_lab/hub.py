"""Read a corpus from a Hugging Face dataset, by its name or from local files."""

from pathlib import Path

from moba_lab.data import corpus_of_texts

# Formats that `datasets` reads from files: json:PATH, csv:PATH and so on.
FORMATS = ("json", "csv", "parquet", "text")


def load_dataset_corpus(name, config=None, column="text"):
    """Read every row of a dataset's training split as one text.

    Args:
        name: of a dataset on the Hub, such as "roneneldan/TinyStories", for those with
            a network; or FORMAT:PATH with a format of `FORMATS`.
        config: name of its configuration, where it has several.
        column: that holds the texts.

    Returns:
        `moba_lab.data.Corpus`; every 16th text is held out, or whatever `load_corpus`
        does for a folder.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such column, or less than two different texts.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "expected the package datasets for --dataset, found none; install it with "
            "pip install 'moba-notebooks[train]', or give a folder with --data"
        ) from error
    kind, _, path = name.partition(":")
    if path and kind in FORMATS:
        found = datasets.load_dataset(kind, data_files=path, split="train")
    else:
        found = datasets.load_dataset(name, config, split="train")
    if column not in found.column_names:
        raise ValueError(
            f"expected a column of texts named {column!r} in {name}, got "
            f"{', '.join(found.column_names)}; choose one with --dataset-column"
        )
    width = len(str(len(found)))
    texts = {
        f"{row:0{width}}": (text or "").encode()
        for row, text in enumerate(found[column])
    }
    return corpus_of_texts(Path(path or name), texts)

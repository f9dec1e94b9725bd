"""Run by `make test-oldest` beside the others: they see the version they should."""

import os
from importlib.metadata import version
from pathlib import Path

import transformers

PINS = Path(__file__).parent.parent / "constraints-oldest.txt"


def test_the_version_is_the_one_that_is_meant():
    old = "transformers-oldest" in os.environ.get("PYTHONPATH", "")
    assert ("transformers-oldest" in transformers.__file__) == old
    assert (f"=={transformers.__version__}\n" in PINS.read_text()) == old
    assert version("transformers") == transformers.__version__

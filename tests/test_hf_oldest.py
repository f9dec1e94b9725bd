"""The tests see the version that they should, and the README says which it was."""

import os
import re
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from hf_models import logits, make, tokens

ROOT = Path(__file__).parent.parent
PINS = ROOT / "constraints-oldest.txt"
README = (ROOT / "README.md").read_text()


def test_the_version_is_the_one_that_is_meant():
    old = "transformers-oldest" in os.environ.get("PYTHONPATH", "")
    assert ("transformers-oldest" in transformers.__file__) == old
    assert (f"=={transformers.__version__}\n" in PINS.read_text()) == old
    assert version("transformers") == transformers.__version__


def test_the_readme_names_the_versions():
    [named] = re.findall(r"tested on transformers (\S+) and (\S+) \|", README)
    assert transformers.__version__ in named
    assert f"transformers=={named[0]}\n" in PINS.read_text()
    assert f"transformers=={named[1]}\n" in (ROOT / "constraints.txt").read_text()


def test_the_lines_of_the_readme_switch_a_model():
    [code] = re.findall(r"```python\n(import moba_fast.hf\n.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 2
    model = make("llama", num_hidden_layers=4)
    exec(code, {"model": model})
    assert model.config._attn_implementation == "moba"
    assert model.config.moba["topk"] == 3
    assert torch.isfinite(logits(model, tokens(1, 9))).all()

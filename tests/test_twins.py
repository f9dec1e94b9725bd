"""The two packages have the same files, functions and arguments, and keep apart."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import moba_fast
import moba_ref

ROOT = Path(__file__).parent.parent
PACKAGES = ["moba_ref", "moba_fast", "moba_lab"]
ONLY_REF = {"moba_attention_definition", "token_mask"}
ONLY_FAST = {"Backend", "OutOfPagesError", "PagedKVCache", "backends"}
ONLY_FAST_ARGUMENTS = [
    *("backend", "deterministic", "workspace_bytes", "kernel"),
    # What is known already, so that nobody computes it or waits for it again.
    *("longest", "offsets", "first", "slots", "place"),
]
STAGES = ["attend", "backward", "blocks", "combine", "gate", "moba", "route"]
ALLOWED = {
    "moba_ref": {"numpy", "einops", "moba_ref"},
    # tqdm is the progress bar of commands.
    "moba_fast": {"torch", "tqdm", "moba_fast"},
}
# What a folder may import beside, and nobody else.
FOLDERS = {"kernels": {"triton"}, "hf": {"transformers"}}


def source_files(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported_packages(path):
    """List the top-level packages that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or package_of(path)).split(".")[0]


def package_of(path):
    return path.relative_to(ROOT).parts[0]


def test_every_stage_has_a_file_in_both_packages():
    for package in ("moba_ref", "moba_fast"):
        stems = {path.stem for path in source_files(package)}
        assert set(STAGES) <= stems


def test_the_same_names_are_public():
    assert set(moba_ref.__all__) - ONLY_REF == set(moba_fast.__all__) - ONLY_FAST


@pytest.mark.parametrize("name", sorted(set(moba_ref.__all__) - ONLY_REF))
def test_twins_take_the_same_arguments_in_the_same_order(name):
    ref, fast = getattr(moba_ref, name), getattr(moba_fast, name)
    assert ref.__module__.split(".")[1] == fast.__module__.split(".")[1]
    expected = list(inspect.signature(ref).parameters)
    found = list(inspect.signature(fast).parameters)
    found = [p for p in found if p not in ONLY_FAST_ARGUMENTS]
    assert found == expected


@pytest.mark.parametrize("name", sorted(set(moba_ref.__all__) - ONLY_REF))
def test_the_fast_docstring_points_to_its_twin(name):
    assert f"Same contract as moba_ref.{name}" in getattr(moba_fast, name).__doc__


@pytest.mark.parametrize("package", ["moba_ref", "moba_fast"])
def test_imports_follow_the_arrows(package):
    for path in source_files(package):
        allowed = ALLOWED[package] | FOLDERS.get(path.parent.name, set())
        for name in imported_packages(path):
            assert name in allowed or name in sys.stdlib_module_names, (path, name)


def test_private_flash_operators_are_called_in_one_file():
    texts = {path.name: path.read_text() for path in source_files("moba_fast")}
    own = "torch.ops.moba_fast"
    callers = [n for n, text in texts.items() if "torch.ops" in text.replace(own, "")]
    assert callers == ["_flash.py"]


def test_no_file_of_odds_and_ends():
    stems = {path.stem for package in PACKAGES for path in source_files(package)}
    assert not stems & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize(("package", "most"), [("moba_ref", 150), ("moba_fast", 300)])
def test_files_are_short(package, most):
    for path in source_files(package):
        assert len(path.read_text().splitlines()) <= most, path

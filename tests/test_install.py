"""The files that install the project agree with each other and with the commands."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Cannot be installed without a GPU.
NOT_PINNED = {"flash-attn"}
# Conda gets torch through pip, from the wheels that constraints.txt names.
NOT_FROM_CONDA = {"torch"}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file="constraints.txt"):
    """Return {name: version} of a file of pins."""
    lines = (ROOT / file).read_text().splitlines()
    found = [line.split("==") for line in lines if not line.startswith("#")]
    return {normal(name): Version(version) for name, version in found}


def requirements(*extras):
    listed = list(PROJECT["dependencies"])
    for extra in extras:
        listed += EXTRAS[extra]
    return [Requirement(line) for line in listed]


@pytest.mark.parametrize("wanted", requirements(*EXTRAS), ids=str)
def test_every_requirement_has_a_pin_that_satisfies_it(wanted):
    if normal(wanted.name) in NOT_PINNED:
        assert normal(wanted.name) not in pins()
    else:
        assert pins()[normal(wanted.name)] in wanted.specifier


def test_the_oldest_transformers_of_the_range_is_run():
    [wanted] = [r for r in requirements("models") if r.name == "transformers"]
    pinned = pins("constraints-oldest.txt")["transformers"]
    assert pinned in wanted.specifier
    assert f">={pinned.major}.{pinned.minor}" in str(wanted.specifier)
    assert pinned < pins()["transformers"]


def test_torch_is_pinned_without_a_build_tag():
    assert str(pins()["torch"]) == "2.13.0"


def test_conda_installs_what_pip_would():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, last = environment["dependencies"]
    assert environment["channels"] == ["conda-forge"]
    assert last == {"pip": ["-e ."]}
    names = {normal(re.split("[=<>]", package)[0]) for package in packages}
    wanted = {normal(r.name) for r in requirements("notebooks")} - NOT_FROM_CONDA
    assert names == wanted | {"python", "make", "pip"}
    assert f"python={sys.version_info[0]}.{sys.version_info[1]}" in packages or (
        "python=3.11" in packages
    )


def test_an_install_has_every_file_that_is_not_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packed = project["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for package, patterns in packed.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    there = {
        path
        for package in ("moba_ref", "moba_fast", "moba_lab")
        for path in (ROOT / package).rglob("*.*")
        if path.suffix not in (".py", ".pyc")
    }
    assert there <= installed


def test_flash_attn_is_a_step_of_its_own():
    assert (
        "pip install --no-build-isolation flash-attn"
        in (ROOT / "environment.yml").read_text()
    )


@pytest.mark.parametrize(
    "target", ["notebooks", "test", "test-slow", "lab", "lint", "bench"]
)
def test_targets_install_once_and_first(target):
    dry = subprocess.run(
        ["make", "--dry-run", "--always-make", "lint", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert dry.stdout.count("pip install") == 1
    assert dry.stdout.index("pip install") < dry.stdout.index("ruff check")


def test_an_old_python_is_refused_with_a_hint(tmp_path):
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 2.7.18"\nexit 1\n')
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    result = subprocess.run(
        ["make", "lint", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "expected Python 3.11 or newer, got Python 2.7.18" in result.stdout
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.rstrip().endswith("make lint test test-oldest")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["test"]["steps"][-1] == {"run": "bash .ci/run"}


ONLY_NUMPY_AND_EINOPS = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        allowed = {"numpy", "einops", "moba_ref"}
        top = name.split(".")[0]
        if top not in allowed | set(sys.stdlib_module_names) and top.isidentifier():
            if not top.startswith(("_", "charset_normalizer")):
                raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
try:
    import torch
except ModuleNotFoundError:
    import moba_ref
    import numpy
    q = numpy.ones((6, 2, 4))
    print(moba_ref.moba_attention(q, q, q, block_size=2, topk=2).shape)
"""


def test_the_reference_needs_only_numpy_and_einops():
    result = subprocess.run(
        [sys.executable, "-c", ONLY_NUMPY_AND_EINOPS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "(6, 2, 4)", result.stderr


def test_a_skip_in_ci_is_a_failure(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    skipped = 'import pytest\n\n\ndef test_it():\n    pytest.skip("no chromium")\n'
    (tmp_path / "test_skipped.py").write_text(skipped)
    # Stands for the package, which takes seconds to import.
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = bool\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for ci, code in (("", 0), ("true", 1)):
        result = subprocess.run(
            command, cwd=tmp_path, env={"CI": ci}, capture_output=True, text=True
        )
        assert result.returncode == code, result.stdout
        assert ("skipped in CI" in result.stdout) == bool(ci)

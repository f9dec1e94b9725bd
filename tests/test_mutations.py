"""Break the packages on purpose: every mutation must turn a test red."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("moba_ref", "moba_fast", "moba_lab")


@dataclass(frozen=True)
class Mutation:
    """Replace `old` by `new` in one file; the named test file must notice."""

    name: str
    path: str
    old: str
    new: str
    noticed_by: str


MUTATIONS = [
    Mutation(
        "block end off by one",
        "moba_ref/blocks.py",
        "min(token + block_size, last)",
        "min(token + block_size - 1, last)",
        "test_blocks.py",
    ),
    Mutation(
        "block end off by one",
        "moba_fast/blocks.py",
        "torch.minimum(start + block_size,",
        "torch.minimum(start + block_size - 1,",
        "test_blocks.py",
    ),
    Mutation(
        "< for <=",
        "moba_ref/attend.py",
        "np.arange(start, end) <= blocks",
        "np.arange(start, end) < blocks",
        "test_attend.py",
    ),
    Mutation(
        "< for <=",
        "moba_fast/_batches.py",
        "triu(n - m + 1)",
        "triu(n - m)",
        "test_causality.py",
    ),
    Mutation(
        "current block dropped",
        "moba_ref/combine.py",
        "out, lse = out_current.copy(), lse_current.copy()",
        "out, lse = 0 * out_current, lse_current - np.inf",
        "test_combine.py",
    ),
    Mutation(
        "current block dropped",
        "moba_fast/combine.py",
        "torch.stack([lse_current, *lse_parts]).logsumexp(0)",
        "torch.stack(lse_parts).logsumexp(0)",
        "test_combine.py",
    ),
    Mutation(
        "heads and tokens swapped in lse",
        "moba_ref/attend.py",
        "out[queries, h], lse[queries, h] = softmax_attention(",
        "out[queries, h], lse.reshape(lse.shape[::-1]).T[queries, h] = "
        "softmax_attention(",
        "test_attend.py",
    ),
    Mutation(
        "heads and tokens swapped in lse",
        "moba_fast/_batches.py",
        "part[1].transpose(1, 2)",
        "part[1].reshape(part[0].transpose(1, 2).shape[:3])",
        "test_attend.py",
    ),
    Mutation(
        "softmax_scale forgotten",
        "moba_ref/attend.py",
        "q @ k.T * softmax_scale",
        "q @ k.T",
        "test_attend.py",
    ),
    Mutation(
        "softmax_scale forgotten",
        "moba_fast/_flash.py",
        "q, k, v, **cpu_mask(q, k, causal), scale=softmax_scale",
        "q, k, v, **cpu_mask(q, k, causal)",
        "test_attend.py",
    ),
    Mutation(
        "softmax_scale forgotten backward",
        "moba_ref/backward.py",
        "(dweights - delta[rows, h, None]) * softmax_scale",
        "(dweights - delta[rows, h, None])",
        "test_backward.py",
    ),
    Mutation(
        "merge without max",
        "moba_ref/combine.py",
        "largest = np.maximum(lse_a, lse_b)",
        "largest = np.zeros_like(lse_a)",
        "test_combine.py",
    ),
    Mutation(
        "merge without max",
        "moba_fast/combine.py",
        ".logsumexp(0)",
        ".exp().sum(0).log()",
        "test_combine.py",
    ),
    Mutation(
        "future block allowed",
        "moba_ref/gate.py",
        "scores[i, h, first:current] = (k_mean[first:current, h]",
        "scores[i, h, first:current + 2] = (k_mean[first:current + 2, h]",
        "test_gate.py",
    ),
    Mutation(
        "future block allowed",
        "moba_fast/gate.py",
        "past = (block >= first[:, None]) & (block < current[:, None])",
        "past = block >= first[:, None]",
        "test_gate.py",
    ),
    Mutation(
        "lower block does not win ties",
        "moba_fast/gate.py",
        "indices[..., :count]",
        "indices[..., -count:]",
        "test_gate.py",
    ),
]
ids = [f"{m.name}, {m.path.split('/')[0]}" for m in MUTATIONS]


def copy_packages(folder):
    """Copy the packages and the unit tests, so that they can be broken."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package,
            folder / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copytree(
        ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder, *files):
    """Run test files of a copy against the packages of the same copy."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *files, "-p", "no:cacheprovider"],
        cwd=folder / "tests",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("mutation", MUTATIONS, ids=ids)
def test_mutation_turns_a_test_red(mutation, tmp_path):
    copy_packages(tmp_path)
    path = tmp_path / mutation.path
    source = path.read_text()
    assert source.count(mutation.old) >= 1, f"{mutation.path} lost: {mutation.old}"
    path.write_text(source.replace(mutation.old, mutation.new))
    result = run_tests(tmp_path, mutation.noticed_by)
    # 1 is pytest's "tests ran and some failed"; 2 would be a broken collection.
    assert result.returncode == 1, result.stdout[-2000:] + result.stderr[-2000:]
    assert "FAILED" in result.stdout


def test_an_unbroken_copy_is_green_and_is_what_is_tested(tmp_path):
    copy_packages(tmp_path)
    probe = "import moba_ref, moba_fast\n\n\ndef test_origin():\n"
    for package in ("moba_ref", "moba_fast"):
        probe += f"    assert {package}.__file__.startswith({str(tmp_path)!r})\n"
    (tmp_path / "tests" / "test_origin.py").write_text(probe)
    result = run_tests(tmp_path, "test_origin.py", "test_limits.py")
    assert result.returncode == 0, result.stdout[-2000:]

"""Break the packages on purpose: every mutation must turn a test red."""

import multiprocessing
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("moba_ref", "moba_fast", "moba_lab")
# Processes that begin with the slow imports done, where that is safe.
PROCESSES = multiprocessing.get_context(
    "forkserver" if sys.platform == "linux" else "spawn"
)
PROCESSES.set_forkserver_preload(
    ["torch._dynamo", "triton.language", "hypothesis.strategies", "einops", "pytest"]
)


@dataclass(frozen=True)
class Mutation:
    """Replace `old` by `new` in one file; the named test, or file, must notice."""

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
        "merge in one pass without max",
        "moba_fast/combine.py",
        ".logsumexp(1, keepdim=True)",
        ".exp().sum(1, keepdim=True).log()",
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
    Mutation(
        "means of later blocks of a chunk missing",
        "moba_fast/cache.py",
        "expand_ranges(before, completed)",
        "expand_ranges(before, completed.clamp(max=1))",
        "test_cache.py::test_a_chunk_for_one_sequence_and_a_token_for_the_others",
    ),
    Mutation(
        "chunk begins one token too early",
        "moba_fast/cache.py",
        "sequence, position = expand_ranges(self.lengths, count)",
        "sequence, position = expand_ranges(self.lengths - 1, count)",
        "test_cache.py::test_beams_share_whole_pages_and_copy_the_last_one",
    ),
    Mutation(
        "lengths not reordered",
        "moba_fast/cache.py",
        "self.lengths[index], self.table.select(index)",
        "self.lengths[: len(index)], self.table.select(index)",
        "test_cache.py::test_beams_share_whole_pages_and_copy_the_last_one",
    ),
    Mutation(
        "page written that another beam holds",
        "moba_fast/pages.py",
        "copies = ~(all_write[which] & (first[which] == place))",
        "copies = first[which] != place",
        "test_cache.py::test_beams_share_whole_pages_and_copy_the_last_one",
    ),
    Mutation(
        "page free that another beam holds",
        "moba_fast/pages.py",
        "pages[self.users[pages] == 0]",
        "pages[self.users[pages] <= 1]",
        "test_cache.py::test_a_page_is_free_when_its_last_user_is_gone",
    ),
    Mutation(
        "page of a short block given back",
        "moba_fast/pages.py",
        "needed = -(-lengths // self.pool",
        "needed = (lengths // self.pool",
        "test_cache.py::test_crop_and_append_again_equals_never_having_appended",
    ),
    Mutation(
        "< for <= in decoding",
        "moba_fast/decode.py",
        "offset > position[:, None] % block_size",
        "offset >= position[:, None] % block_size",
        "test_cache.py::test_softmax_scale_is_used",
    ),
    Mutation(
        "query heads dealt out to key heads in turn",
        "moba_fast/decode.py",
        "head_k = head // (q.shape[1] // pool.k.shape[2])",
        "head_k = head % pool.k.shape[2]",
        "test_cache.py::test_softmax_scale_is_used",
    ),
    Mutation(
        "current block read twice in decoding",
        "moba_fast/decode.py",
        "past.masked_fill(past >= current",
        "past.masked_fill(past > current",
        "test_cache.py::test_equal_keys_select_the_lower_block",
    ),
    Mutation(
        "last share of the queries left out",
        "moba_fast/workspace.py",
        "pairwise([*range(0, n_queries, max(rows, 1)), n_queries])",
        "pairwise(range(0, n_queries + 1, max(rows, 1)))",
        "test_fuzz.py::test_a_workspace_of_the_size_that_the_error_names_is_enough",
    ),
    Mutation(
        "last heads left out where a group is not full",
        "moba_fast/workspace.py",
        "pairwise([*range(0, heads_k, group), heads_k])",
        "pairwise(range(0, heads_k + 1, group))",
        "test_fuzz.py::test_parts_of_huge_calls_fit_int32_offsets",
    ),
    Mutation(
        "keys forgotten in what a head needs",
        "moba_fast/workspace.py",
        "max(fixed + per_query * n_queries, 1)",
        "max(per_query * n_queries, 1)",
        "test_fuzz.py::test_parts_of_huge_calls_fit_int32_offsets",
    ),
    Mutation(
        "indices forgotten in what a pair needs",
        "moba_fast/workspace.py",
        "(per_pair + INDEX_BYTES)",
        "per_pair",
        "test_workspace.py::test_a_call_takes_what_is_estimated",
    ),
    Mutation(
        "gathered gradients forgotten in what a pair needs",
        "moba_fast/workspace.py",
        "per_pair += 2 * narrow + wide",
        "per_pair += wide",
        "test_workspace.py::test_a_call_takes_what_is_estimated",
    ),
    Mutation(
        "error names less workspace than is needed",
        "moba_fast/workspace.py",
        "fixed + fewest * per_query",
        "fewest * per_query",
        "test_fuzz.py::test_a_workspace_of_the_size_that_the_error_names_is_enough",
    ),
    Mutation(
        "keys of a split call not counted from its first",
        "moba_fast/varlen.py",
        "pack.cu_k[i : j + 1] - c",
        "pack.cu_k[i : j + 1]",
        "test_fuzz.py::test_split_calls_give_what_one_call_gives",
    ),
    Mutation(
        "gradients of keys without a query left out",
        "moba_fast/varlen.py",
        "parts.append([torch.zeros_like(x) for x in (q[a:b], k[c:d], v[c:d])])",
        "pass",
        "test_backward.py::test_keys_that_no_query_reads_get_zeros",
    ),
    Mutation(
        "padding rows of a split call left out",
        "moba_fast/varlen.py",
        "(len(q), len(k)) if j == count",
        "(b, d) if j == count",
        "test_fuzz.py::test_calls_of_gpu_kernels_have_at_most_65_535_sequences",
    ),
    Mutation(
        "mean of a block missing that the last token completes",
        "moba_fast/cache.py",
        "completed = self.lengths // self.block_size",
        "completed = (self.lengths - 1) // self.block_size",
        "test_cache.py::test_means_of_long_blocks_do_not_depend_on_the_cut",
    ),
    Mutation(
        "heads swapped in lse of decoding",
        "moba_fast/decode.py",
        "return out.to(q.dtype), lse",
        "return out.to(q.dtype), lse.flip(1)",
        "test_cache.py::test_selected_replaces_the_gate",
    ),
    Mutation(
        "pages of another sequence copied",
        "moba_fast/last_tokens.py",
        "cache.table.host[sequences[row], block]",
        "cache.table.host[row, block]",
        "test_cache.py::test_a_chunk_for_one_sequence_and_a_token_for_the_others",
    ),
    Mutation(
        "blocks of a copy counted from its own start",
        "moba_fast/last_tokens.py",
        "torch.where(selected < 0, -1, selected + shift)",
        "selected",
        "test_cache.py::test_a_chunk_for_one_sequence_and_a_token_for_the_others",
    ),
    Mutation(
        "means of open blocks copied",
        "moba_fast/last_tokens.py",
        ".masked_fill(complete[:, None, None] == 0, 0)",
        "",
        "test_cache.py::test_the_gate_sees_no_mean_that_was_not_written",
    ),
    Mutation(
        "last key of a block left out of its mean",
        "moba_fast/kernels/pool.py",
        "last = tl.minimum(first + PART, end)",
        "last = tl.minimum(first + PART, end - 1)",
        "test_kernels_pool.py::test_blocks_of_any_length",
    ),
    Mutation(
        "last part of a long block left out of its mean",
        "moba_fast/kernels/pool.py",
        "filled = tl.cdiv(length, PART)",
        "filled = length // PART",
        "test_kernels_pool.py::test_long_blocks_are_divided",
    ),
    Mutation(
        "own block scored as a past one",
        "moba_fast/kernels/gate.py",
        "(block < current[:, None])",
        "(block <= current[:, None])",
        "test_kernels_gate.py::test_the_reference_chooses_the_same",
    ),
    Mutation(
        "ties to the higher block",
        "moba_fast/kernels/gate.py",
        "COLUMNS - 1 - ",
        "0 + ",
        "test_kernels_gate.py::test_ties_go_to_the_lower_block",
    ),
    Mutation(
        "ties taken again by the next pass",
        "moba_fast/kernels/gate.py",
        "(block > last[:, None])",
        "(block >= last[:, None])",
        "test_kernels_gate.py::test_passes_part_ties",
    ),
    Mutation(
        "means rounded to float16",
        "moba_fast/kernels/gate_means.py",
        "finite_or_zero(mean - rounded.to(tl.float32))",
        "finite_or_zero(rounded.to(tl.float32) * 0)",
        "test_kernels_gate.py::test_means_have_more_bits_than_queries",
    ),
    Mutation(
        "slot written to its neighbour",
        "moba_fast/kernels/route.py",
        "row * slots + pair % slots",
        "row * slots + (pair + 1) % slots",
        "test_kernels_route.py::test_every_pair_is_in_the_list_of_its_block",
    ),
    Mutation(
        "heads of a group forgotten in where lists begin",
        "moba_fast/kernels/route.py",
        "places + i * (ratio * chunks)",
        "places + i * chunks",
        "test_kernels_route.py::test_every_pair_is_in_the_list_of_its_block",
    ),
    Mutation(
        "pairs of a tile written over each other",
        "moba_fast/kernels/route.py",
        "pairs + free + rank",
        "pairs + free",
        "test_kernels_route.py::test_a_block_that_everybody_chose",
    ),
    Mutation(
        "list with one tile too many",
        "moba_fast/kernels/route.py",
        "< tl.cdiv(end - begin, rows)",
        "<= tl.cdiv(end - begin, rows)",
        "test_kernels_route.py::test_tiles_cover_every_list_once",
    ),
    Mutation(
        "keys after a short block read",
        "moba_fast/kernels/attend.py",
        'scores = tl.where((key < block_size)[None, :], scores, float("-inf"))',
        "pass",
        "test_kernels_attend.py::test_parts_are_those_of_the_reference",
    ),
    Mutation(
        "last keys of a long block left out",
        "moba_fast/kernels/attend.py",
        "tl.range(whole, block_size, KEYS",
        "tl.range(whole, whole, KEYS",
        "test_kernels_attend.py::test_parts_are_those_of_the_reference",
    ),
    Mutation(
        "earlier keys not rescaled to a new maximum",
        "moba_fast/kernels/tiles.py",
        "acc = acc * shrink[:, None]",
        "pass",
        "test_kernels_attend.py::test_parts_are_those_of_the_reference",
    ),
    Mutation(
        "< for <=",
        "moba_fast/kernels/combine.py",
        "(n + key)[None, :] <= (at + row)[:, None]",
        "(n + key)[None, :] < (at + row)[:, None]",
        "test_kernels_attend.py::test_shares_of_the_queries",
    ),
    Mutation(
        "slots swapped in lse",
        "moba_fast/kernels/combine.py",
        "pair[:, None] + slot[None, :], block",
        "pair[:, None] + (SLOTS - 1 - slot)[None, :], block",
        "test_kernels_attend.py::test_shares_of_the_queries",
    ),
    Mutation(
        "merge without max",
        "moba_fast/kernels/combine.py",
        "largest, tl.maximum(largest, tl.max(lse, 1))",
        "largest, largest",
        "test_kernels_attend.py::test_large_scores_do_not_overflow",
    ),
    Mutation(
        "slots of no pair read",
        "moba_fast/kernels/combine.py",
        "(weight != 0.0)[:, None]",
        "valid[:, None]",
        "test_kernels_attend.py::test_shares_of_the_queries",
    ),
    Mutation(
        "heads dealt out to key heads in turn",
        "moba_fast/kernels/combine.py",
        "queries, head // RATIO, first",
        "queries, head % (HEADS // RATIO), first",
        "test_kernels_attend.py::test_shares_of_the_queries",
    ),
    Mutation(
        "part sums added twice",
        "moba_fast/kernels/backward_past.py",
        "(list_start // part_rows + i)",
        "(list_start // part_rows)",
        "test_kernels_backward.py::test_a_block_that_all_choose_is_summed_in_parts",
    ),
    Mutation(
        "a part more than a full list has",
        "moba_fast/kernels/backward_past.py",
        "- list_start - 1) // part_rows",
        "- list_start) // part_rows",
        "test_kernels_backward.py::test_a_list_may_fill_its_parts",
    ),
    Mutation(
        "gradients of a pair written for its neighbour",
        "moba_fast/kernels/backward_past.py",
        "at_dq = dq + (pair // SLOTS)",
        "at_dq = dq + (pair // (SLOTS + 1))",
        "test_kernels_backward.py::test_atomic_sums_agree_with_the_reference",
    ),
    Mutation(
        "< for <=",
        "moba_fast/kernels/backward_current.py",
        "key[:, None] <= last[None, :]",
        "key[:, None] < last[None, :]",
        "test_kernels_backward.py::test_agrees_with_the_reference",
    ),
    Mutation(
        "softmax_scale forgotten",
        "moba_fast/kernels/backward_current.py",
        "sum_k *= softmax_scale",
        "pass",
        "test_kernels_backward.py::test_agrees_with_the_reference",
    ),
    Mutation(
        "rows of no pair added to dq",
        "moba_fast/kernels/backward_current.py",
        "valid & (named >= 0)",
        "valid",
        "test_kernels_backward.py::test_a_list_may_fill_its_parts",
    ),
    Mutation(
        "output's share forgotten",
        "moba_fast/kernels/backward_tile.py",
        "(dweights - delta[None, :])",
        "dweights",
        "test_kernels_backward.py::test_agrees_with_the_reference",
    ),
    Mutation(
        "dk of former shares overwritten",
        "moba_fast/kernels/backward_current.py",
        "sum_k += load_tile(at_dk, dk_strides[0], mask, KEYS, WIDTH)",
        "pass",
        "test_kernels_backward.py::test_gradients_of_keys_are_added_to_what_is_there",
    ),
    Mutation(
        "< for <=",
        "moba_fast/cpp/combine.cpp",
        "= own + r + 1 - j;",
        "= own + r - j;",
        "test_compiled.py",
    ),
    Mutation(
        "a tile of keys too much is read without a mask",
        "moba_fast/cpp/combine.cpp",
        "if (j + n <= own + 1)",
        "if (j + n <= own + count)",
        "test_compiled.py",
    ),
    Mutation(
        "merge without max",
        "moba_fast/cpp/combine.cpp",
        "float largest = own;",
        "float largest = 0;",
        "test_compiled.py",
    ),
    Mutation(
        "softmax_scale forgotten",
        "moba_fast/cpp/attend.cpp",
        "scale * LOG2E",
        "LOG2E",
        "test_compiled.py",
    ),
    Mutation(
        "weights not shrunk when a larger score comes",
        "moba_fast/cpp/tile.h",
        "out[d][w] *= shrink[w];",
        "out[d][w] *= 1.0f;",
        "test_compiled.py",
    ),
    Mutation(
        "future block allowed",
        "moba_fast/cpp/gate.cpp",
        "(id >= from[w]) & (id < to[w])",
        "(id >= from[w])",
        "test_compiled.py",
    ),
    Mutation(
        "ties are not told",
        "moba_fast/cpp/gate.cpp",
        "unclear[row] = close || ",
        "unclear[row] = ",
        "test_compiled.py",
    ),
    Mutation(
        "NaN is not told",
        "moba_fast/cpp/gate.cpp",
        "close || ((int32_t*)best.unclear)[r]",
        "close",
        "test_compiled.py",
    ),
    Mutation(
        "NaN of a key that is not read yet",
        "moba_fast/cpp/vectors.h",
        "readable[w] > (int32_t)i ? sum : acc[c][w]",
        "sum",
        "test_fuzz.py",
    ),
    Mutation(
        "heads of a group in another order",
        "moba_fast/cpp/route.cpp",
        "head_k * ratio; head < (head_k + 1) * ratio; head++",
        "head_k; head < heads; head += heads_k",
        "test_compiled.py",
    ),
]
ids = [f"{m.name}, {m.path}" for m in MUTATIONS]


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


def run_tests(folder, *tests):
    """Run tests of a copy against the packages of the same copy.

    Returns:
        pytest's exit code, and what it printed.
    """
    printed = folder / "printed.txt"
    process = PROCESSES.Process(target=run_pytest, args=(folder, tests, printed))
    process.start()
    process.join(timeout=300)
    process.kill()
    process.join()
    return process.exitcode, printed.read_text()


def run_pytest(folder, tests, printed):
    """Run tests of a copy in this process, which knows nothing of the original."""
    assert not [name for name in sys.modules if name.split(".")[0] in PACKAGES]
    os.chdir(folder / "tests")
    sys.path.insert(0, str(folder))
    file = os.open(printed, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    # A broken kernel runs in the interpreter: on a GPU it could harm its neighbours.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # Broken C++ is compiled, too.
    os.environ["XDG_CACHE_HOME"] = str(folder)
    sys.exit(pytest.main(["-q", "-x", *tests, "-p", "no:cacheprovider"]))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=ids)
def test_mutation_turns_a_test_red(mutation, tmp_path):
    if "kernels" in mutation.path:
        pytest.importorskip("triton", reason="triton is not here")
    copy_packages(tmp_path)
    path = tmp_path / mutation.path
    source = path.read_text()
    assert source.count(mutation.old) >= 1, f"{mutation.path} lost: {mutation.old}"
    path.write_text(source.replace(mutation.old, mutation.new))
    code, printed = run_tests(tmp_path, mutation.noticed_by)
    # 1 is pytest's "tests ran and some failed"; 2 would be a broken collection.
    assert code == 1, printed[-4000:]
    assert "FAILED" in printed


def test_an_unbroken_copy_is_green_and_is_what_is_tested(tmp_path):
    copy_packages(tmp_path)
    probe = "import moba_ref, moba_fast\n\n\ndef test_origin():\n"
    for package in ("moba_ref", "moba_fast"):
        probe += f"    assert {package}.__file__.startswith({str(tmp_path)!r})\n"
    (tmp_path / "tests" / "test_origin.py").write_text(probe)
    code, printed = run_tests(tmp_path, "test_origin.py", "test_limits.py")
    assert code == 0, printed[-4000:]


@pytest.mark.slow
def test_whatever_notices_a_mutation_is_green_on_an_unbroken_copy(tmp_path):
    copy_packages(tmp_path)
    code, printed = run_tests(tmp_path, *sorted({m.noticed_by for m in MUTATIONS}))
    assert code == 0, printed[-4000:]

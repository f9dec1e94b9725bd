"""The C++ functions: what they compute, and what happens where they do not compile."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from impls import FAST, REF, make_case

import moba_fast
from moba_fast import compiled, gate, torch_kernels
from moba_fast.backends import kernel_of
from moba_fast.cpp import build
from moba_fast.cpp.attend import attend_past
from moba_fast.cpp.combine import attend_current
from moba_fast.cpp.gate import MOST_SLOTS, select_blocks
from moba_fast.cpp.memory import Scratch
from moba_fast.cpp.route import build_lists
from moba_fast.workspace import compiled_parts
from moba_lab.check_cases import CASES, Case, Target, check_case

COMPILED = Target("cpu", "compiled", "torch:compiled", ("float32",))
# A tile has 48 queries with AVX-512; a masked tile of keys begins at any of 64.
MORE_CASES = [
    Case("tiles that end early", (49, 97, 65), 64, 2, H=2, HK=1),
    Case("tiles of keys that end early", (700,), 130, 3, H=2, HK=2, D=33),
    Case("many slots", (400,), 4, 60, H=2, HK=1, D=16),
    Case("a tile over many sequences", (5, 1, 0, 7, 30, 2, 9), 4, 3, H=2, HK=2),
]


def tensors(case):
    return [torch.tensor(x).float() for x in (case.q, case.k, case.v)]


@pytest.mark.parametrize("case", [*CASES, *MORE_CASES], ids=lambda case: case.name)
def test_it_agrees_with_the_reference(case):
    for check in check_case(COMPILED, case, "float32"):
        assert check.ok, check


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_far_from_0_do_no_harm(sign):
    case = make_case([300], block_size=32, topk=4, H=1, D=8)
    q, k, v = tensors(case)
    # All scores are about 500, or about -500.
    q, k = q * 0.01 + 8, k * 0.01 + 8
    options = case.options | {"softmax_scale": 1.0, "return_aux": True}
    found = moba_fast.moba_attention(
        sign * q, k, v, backend="torch:compiled", **options
    )
    exact = (x.double() for x in (sign * q, k, v))
    out, lse, _ = moba_fast.moba_attention(*exact, **options | {"selected": found[2]})
    assert (found[1] * sign > 490).all()
    assert (found[0] - out).abs().max() < 1e-3
    assert (found[1] - lse).abs().max() < 1e-3


def test_large_calls_take_it_and_small_ones_do_not(monkeypatch):
    monkeypatch.setattr(torch_kernels, "LARGE_CALL", 60)
    kernels = [kernel_of("torch", torch.zeros(n, 2, 8)) for n in (29, 30)]
    assert kernels == ["cpu", "compiled"]
    assert kernel_of("auto", torch.zeros(30, 2, 8)) == "compiled"
    for q in (torch.zeros(99, 9, 8).double(), torch.zeros(99, 9, 257)):
        assert kernel_of("torch", q) == "cpu"


@pytest.mark.parametrize(
    ("backend", "q", "message"),
    [
        ("torch:compiled", torch.zeros(3, 1, 8).half(), "needs float32 on a CPU, got"),
        ("torch:compiled", torch.zeros(3, 1, 257), "needs D of at most 256, got 257"),
        ("torch:aten", torch.zeros(3, 1, 8), "one of 'compiled', 'cpu', 'plain'"),
        ("triton:compiled", torch.zeros(3, 1, 8), "unknown backend 'triton:compiled'"),
    ],
)
def test_what_does_not_fit_is_refused(backend, q, message):
    with pytest.raises(ValueError, match=message):
        moba_fast.moba_attention(q, q, q, block_size=2, topk=2, backend=backend)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads):
    case = make_case([600, 41], block_size=32, topk=4, H=4, HK=2, D=24)
    options = case.options | {"backend": "torch:compiled", "return_aux": True}
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            results.append(moba_fast.moba_attention(*tensors(case), **options))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["whole", "every second", "heads last"])
def test_each_function_takes_any_layout(layout):
    case = make_case([90, 0, 31], block_size=16, topk=3, H=4, HK=2, D=12)
    plain = tensors(case)
    if layout == "every second":
        given = [x.repeat_interleave(2, 2)[..., ::2] for x in plain]
    else:
        order = (0, 1, 2) if layout == "whole" else (1, 2, 0)
        back = np.argsort(order).tolist()
        given = [x.permute(order).contiguous().permute(back) for x in plain]
    blocks = case.partition(FAST)
    results = []
    for q, k, v in (plain, given):
        selected = select_blocks(q, gate.pool_keys(k, blocks), blocks, case.topk)
        lists = build_lists(selected, blocks, 2)
        past = attend_past(q, k, v, lists, blocks, 0.3)
        out, lse = torch.empty_like(plain[0]), torch.empty(q.shape[:2])
        attend_current(q, k, v, *past, selected, blocks, 0.3, out, lse)
        results.append((selected, out, lse))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_blocks_may_be_named_in_any_integers(dtype):
    case = make_case([90], block_size=16, topk=3, H=2, HK=1, D=8)
    options = case.options | {"backend": "torch:compiled", "return_aux": True}
    out, _, selected = moba_fast.moba_attention(*tensors(case), **options)
    # Without padding they fit into bytes, too.
    late = [x[-16:] if i == 0 else x for i, x in enumerate(tensors(case))]
    options |= {"cu_seqlens": [0, 16], "selected": selected[-16:].to(dtype)}
    assert torch.equal(moba_fast.moba_attention(*late, **options)[0], out[-16:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_makes_no_difference(dtype):
    case = make_case([90], block_size=16, topk=3, D=8)
    options, inputs = case.options | {"backend": "torch:compiled"}, tensors(case)
    expected = moba_fast.moba_attention(*inputs, **options)
    try:
        torch.set_default_dtype(dtype)
        found = moba_fast.moba_attention(*inputs, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("block_size", [128, 256])
@pytest.mark.parametrize("value", [-torch.inf, -3e38])
def test_scores_that_are_minus_infinity_weigh_nothing(value, block_size):
    case = make_case([300], block_size=block_size, topk=2, H=1, D=8)
    q, k, v = tensors(case)
    # A whole tile of keys comes first, and all keys of a past block.
    q, k[: block_size // 2] = q.abs() + 1, value
    found, _, selected = moba_fast.moba_attention(
        *(q, k, v), **case.options, backend="torch:compiled", return_aux=True
    )
    exact = (x.double() for x in (q, k, v))
    out = moba_fast.moba_attention(
        *exact, **case.options, backend="torch:plain", selected=selected
    )
    after = slice(block_size // 2, None)
    assert out[after].isfinite().all()
    assert (found - out)[after].abs().max() < 1e-5


def test_the_functions_refuse_other_dtypes():
    x, blocks = torch.zeros(4, 1, 2), moba_fast.partition([0, 4], 4)
    selected = torch.zeros(4, 1, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match="int32 on the CPU, got torch"):
        build_lists(selected, blocks, 1)
    with pytest.raises(TypeError, match="float32 on the CPU, got torch"):
        select_blocks(x.double(), torch.zeros(1, 1, 2), blocks, 2)


def test_an_output_without_adjacent_elements_is_refused():
    x, blocks = torch.zeros(4, 1, 2), moba_fast.partition([0, 4], 4)
    selected = torch.zeros(4, 1, 1, dtype=torch.int32)
    out = torch.zeros(4, 1, 4)[..., ::2]
    with pytest.raises(ValueError, match="adjacent elements, got strides"):
        attend_current(x, x, x, x, x, selected, blocks, 1.0, out, torch.zeros(4, 1))


def test_lists_are_those_of_the_routing():
    case = make_case([150, 3, 70], block_size=8, topk=5, H=4, HK=2)
    q, k, _ = tensors(case)
    blocks = case.partition(FAST)
    selected = gate.select_blocks(q, gate.pool_keys(k, blocks), blocks, case.topk)
    lists = build_lists(selected, blocks, 2)
    n_blocks, found = len(blocks.start), []
    for i, (a, b) in enumerate(lists.cu_pairs.unfold(0, 2, 1).tolist()):
        for pair in lists.pairs[a:b].tolist():
            row, slot = divmod(pair, lists.slots)
            query, head = divmod(row, 4)
            assert selected[query, head, slot] == i % n_blocks
            assert head // 2 == i // n_blocks
            found.append((i // n_blocks, i % n_blocks, head, query))
    assert len(found) == (selected[..., :-1] >= 0).sum() > 500
    assert found == sorted(found)


@pytest.mark.parametrize("topk", [2, 3, 9, 40])
def test_ties_go_to_the_lower_block(topk):
    case = make_case([40, 33], block_size=1, topk=topk, H=2, HK=1, D=3, whole=True)
    q, k, _ = tensors(case)
    blocks = case.partition(FAST)
    # Many equal keys, and all means equal for the queries that are zero.
    k = k.clamp(-1, 1)
    q[::5] = 0
    k_mean = gate.pool_keys(k, blocks)
    found = select_blocks(q, k_mean, blocks, topk)
    expected = REF.select_blocks(q.numpy(), k_mean.numpy(), case.partition(REF), topk)
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k_mean"])
def test_scores_that_are_not_finite_are_left_to_the_other_gate(name, value):
    case = make_case([60], block_size=4, topk=3, D=5)
    q, k, _ = tensors(case)
    blocks = case.partition(FAST)
    inputs = {"q": q, "k_mean": gate.pool_keys(k, blocks)}
    inputs[name][3, 0, 1] = value
    found = select_blocks(*inputs.values(), blocks, 3)
    assert torch.equal(found, gate.select_blocks(*inputs.values(), blocks, 3))


def test_more_slots_than_are_kept_are_left_to_the_other_gate():
    case = make_case([200], block_size=1, topk=MOST_SLOTS + 1, D=3)
    q, k, _ = tensors(case)
    blocks = case.partition(FAST)
    for topk in (MOST_SLOTS + 1, MOST_SLOTS + 2):
        found = select_blocks(q, k, blocks, topk)
        assert torch.equal(found, gate.select_blocks(q, k, blocks, topk))


def test_few_rows_need_the_other_gate(monkeypatch):
    case = make_case([3000], block_size=16, topk=4, H=2, HK=2, D=32)
    q, k, _ = tensors(case)
    blocks, seen = case.partition(FAST), []
    original = gate.select_blocks

    def watched(q, *rest):
        seen.append(len(q))
        return original(q, *rest)

    monkeypatch.setattr(gate, "select_blocks", watched)
    select_blocks(q, gate.pool_keys(k, blocks), blocks, 4)
    assert sum(seen) < 10


def test_scratch_is_used_again():
    scratch = Scratch()
    first = scratch.take("keys", 4, 3)
    assert scratch.take("keys", 2, 5).data_ptr() == first.data_ptr()
    assert scratch.take("values", 4, 3).data_ptr() != first.data_ptr()
    assert scratch.take("keys", 5, 3).shape == (5, 3)


def test_parts_of_a_call_give_the_same_bits():
    case = make_case([700], block_size=32, topk=4, H=4, HK=2, D=16)
    q, k, v = tensors(case)
    blocks = case.partition(FAST)
    selected = compiled.select(q, k, blocks, 4)
    limit = 2**18
    parts = compiled_parts(q, k, 4, limit)
    assert len(parts) == 2
    assert all(len(part.queries) > 1 for part in parts)
    whole, parts = (
        compiled.attend(q, k, v, selected, blocks, 0.3, each) for each in (2**31, limit)
    )
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


def look(tmp_path, **environment):
    """Ask a new process for the library; return what it says."""
    code = "from moba_fast.cpp import build; print(*build.look_for_library())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        **{"capture_output": True, "text": True, "check": True},
        env=environment,
    ).stdout


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_process_compiles_and_the_next_one_loads(tmp_path):
    log = tmp_path / "log"
    counted = f'echo "$@" >> {log}; exec c++ "$@"'
    compiler = script(tmp_path / "counted", counted)
    for _ in range(2):
        assert f"C++ by {compiler}" in look(tmp_path, CXX=compiler)
    compilations = [line for line in log.read_text().splitlines() if "-shared" in line]
    assert len(compilations) == 1
    assert len(list((tmp_path / "moba_fast").glob("*.so"))) == 1


def test_where_nothing_compiles_the_reason_is_told(tmp_path):
    nothing = {"PATH": str(tmp_path), "CXX": ""}
    assert "None no C++ compiler was found" in look(tmp_path, **nothing)
    assert "MOBA_FAST_COMPILE is 0" in look(tmp_path, MOBA_FAST_COMPILE="0")
    assert "None /no/such/c++ failed: " in look(tmp_path, CXX="/no/such/c++")
    broken = script(tmp_path / "broken", "echo it hurts >&2; exit 1")
    assert f"None {broken} failed: it hurts" in look(tmp_path, CXX=broken)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "failed: " in look(blocked)


def test_a_library_that_is_none_is_compiled_again(tmp_path):
    look(tmp_path)
    [path] = (tmp_path / "moba_fast").glob("*.so")
    path.write_bytes(b"")
    assert "C++ by" in look(tmp_path)
    assert path.stat().st_size > 10_000


def test_no_home_and_strange_messages_are_no_errors(tmp_path):
    strange = script(tmp_path / "strange", "printf '\\377' >&2; exit 1")
    assert f"None {strange} failed: \N{REPLACEMENT CHARACTER}" in look(
        tmp_path, CXX=strange, PYTHONIOENCODING="utf-8"
    )
    code = "import pathlib; from moba_fast.cpp import build\n"
    code += "def nowhere():\n    raise RuntimeError('no home')\n"
    code += "pathlib.Path.home = nowhere; print(*build.look_for_library())"
    environment = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        **{"capture_output": True, "text": True, "check": True},
        env=environment,
    )
    assert "failed: no home" in done.stdout
    assert "calls take PyTorch's slower flash operator" in done.stderr


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instructions_give_the_same(capability, tmp_path):
    code = "import torch; from moba_fast import moba_attention\n"
    code += "x = torch.randn(3, 300, 2, 24, generator=torch.Generator().manual_seed(0))"
    code += "\na, b = (moba_attention(*x, block_size=64, topk=3, backend=f'torch:{n}')"
    code += " for n in ('compiled', 'cpu'))\nprint((a - b).abs().max().item())"
    environment = {"ATEN_CPU_CAPABILITY": capability, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        **{"capture_output": True, "text": True, "check": True},
        env={**os.environ, **environment},
    )
    assert float(done.stdout) < 2e-6


def test_where_nothing_compiles_calls_run_all_the_same(monkeypatch):
    def missing():
        return None, "no C++ compiler was found"

    monkeypatch.setattr(build, "look_for_library", missing)
    monkeypatch.setattr(torch_kernels, "LARGE_CALL", 1)
    x = torch.ones(4, 1, 2)
    assert kernel_of("torch", x) == "cpu"
    assert moba_fast.moba_attention(x, x, x, block_size=2, topk=2).isfinite().all()
    with pytest.raises(ValueError, match="does not run here: no C\\+\\+ compiler"):
        moba_fast.moba_attention(
            x, x, x, block_size=2, topk=2, backend="torch:compiled"
        )


def test_the_limits_are_those_of_the_sources():
    folder = Path(build.__file__).parent
    assert f"MOST_D = {build.MOST_D}," in (folder / "tile.h").read_text()
    assert f"MOST_KEPT = {MOST_SLOTS + 1};" in (folder / "gate.cpp").read_text()

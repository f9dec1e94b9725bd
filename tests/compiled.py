"""Compile what a host function launches, for GPUs that are not here.

A job names a function that launches kernels and its arguments. The function runs on CPU
tensors in a process of its own, where a launch compiles the kernel for the target, just
as a real launch would with these arguments, and runs nothing. So host functions must
not look at results, which they must not do on a GPU either.

    echo '[{"call": "launch_gate:pool_keys", "target": "sm_90"}]' \\
        | python tests/compiled.py
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parent
# Bytes of shared memory that one program may use.
SHARED = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}


@dataclass(frozen=True)
class Job:
    """One call to compile: "module:function", the target, arguments in JSON's types."""

    call: str
    target: str
    arguments: dict = field(default_factory=dict)

    def __str__(self):
        values = "-".join(str(value) for value in self.arguments.values())
        return f"{self.call.split(':')[1]}-{self.target}-{values}"


@dataclass(frozen=True)
class Kernel:
    """What became of one launch.

    Attributes:
        name: of the kernel.
        registers: per thread.
        spills: bytes per thread that did not fit into registers.
        reloads: instructions in loops that load or store them; None for AMD.
        shared: bytes of shared memory.
        wgmma: instructions of Hopper's asynchronous tensor cores in the PTX.
        products: (rows, inner size, columns) of what these multiply, each once.
        num_warps: warps per program.
    """

    name: str
    registers: int
    spills: int
    reloads: int | None
    shared: int
    wgmma: int
    products: list
    num_warps: int


def compile_jobs(jobs):
    """Compile all jobs without the interpreter, in a process per processor.

    Next to other workers of pytest-xdist in one, which compiles nothing twice.

    Returns:
        One entry per job: its launches in order, list of Kernel, or the text of what
        went wrong.
    """
    count = 1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count()
    with ThreadPoolExecutor() as pool:
        shares = list(pool.map(compile_share, [jobs[i::count] for i in range(count)]))
    return [shares[i % count][i // count] for i in range(len(jobs))]


def compile_share(jobs):
    """Compile jobs in one process of their own; see `compile_jobs`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    result = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([vars(job) for job in jobs]),
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    done = json.loads(result.stdout.splitlines()[-1])
    return [d if isinstance(d, str) else [Kernel(**k) for k in d] for d in done]


def check_all(jobs, check):
    """Compile jobs, check the launches of each, and fail with all that is wrong.

    Args:
        jobs: list of Job.
        check: function of a job and its launches, with assertions.
    """
    wrong = []
    for job, launches in zip(jobs, compile_jobs(jobs), strict=True):
        try:
            assert not isinstance(launches, str), launches
            check(job, launches)
        except AssertionError as error:
            wrong.append(f"{job}: {launches}\n{error}")
    assert not wrong, "\n\n".join(wrong)


class Target:
    """Stand in for the driver of a GPU: say which one it would be."""

    def __init__(self, name):
        from triton.backends.compiler import GPUTarget

        self.name = name
        if name.startswith("sm_"):
            self.target = GPUTarget("cuda", int(name[3:]), 32)
        else:
            self.target = GPUTarget("hip", name, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # Triton keeps what it compiled by device.
        return self.name

    def get_current_stream(self, device):
        return 0


def compile_job(job):
    """Run the job's function with launches that only compile; return the kernels."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Target(job.target))
    launched, run = [], JITFunction.run

    def only_compile(kernel, *args, grid, warmup, **options):
        launched.append(run(kernel, *args, grid=grid, warmup=True, **options))
        return launched[-1]

    module, function = job.call.split(":")
    JITFunction.run = only_compile
    try:
        getattr(importlib.import_module(module), function)(**job.arguments)
    finally:
        JITFunction.run = run
    return [vars(describe(kernel)) for kernel in launched]


def describe(kernel):
    """Read registers and spills off a triton CompiledKernel."""
    read = read_cubin if "cubin" in kernel.asm else read_amdgcn
    registers, spills, reloads = read(kernel)
    return Kernel(
        name=kernel.name,
        registers=registers,
        spills=spills,
        reloads=reloads,
        shared=kernel.metadata.shared,
        wgmma=kernel.asm.get("ptx", "").count("wgmma.mma_async"),
        products=async_products(kernel.asm["ttgir"]),
        num_warps=kernel.metadata.num_warps,
    )


def async_products(ttgir):
    """List the shapes of products on Hopper's asynchronous tensor cores."""
    shapes = re.findall(
        r"warp_group_dot .* : \S*<(\d+)x(\d+)x.* -> tensor<\d+x(\d+)x", ttgir
    )
    return sorted({tuple(map(int, shape)) for shape in shapes})


def read_cubin(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        # Spilled registers are what these kernels have on the stack.
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        registers, spills = map(int, found)
        reloads = count_reloads(cuobjdump("-sass", file.name)) if spills else 0
    return registers, spills, reloads


def cuobjdump(option, path):
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_reloads(sass):
    """Count the instructions in loops that access the stack."""
    code = re.findall(r"/\*(\w{4,})\*/\s+(.*?);", sass)
    code = [(int(at, 16), instruction) for at, instruction in code]
    loops = []
    for at, instruction in code:
        target = re.search(r"\bBRA\b.*?(0x\w+)", instruction)
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    return sum(
        any(first <= at <= last for first, last in loops)
        for at, instruction in code
        if re.search(r"\b(LDL|STL)\b", instruction)
    )


def read_amdgcn(kernel):
    text = kernel.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    spilled = number("vgpr_spill_count") + number("sgpr_spill_count")
    return number("vgpr_count"), 4 * spilled, None


def main():
    """Compile the jobs on standard input, print what became of them as one line."""
    done = []
    for job in json.load(sys.stdin):
        try:
            done.append(compile_job(Job(**job)))
        except Exception as error:
            done.append(f"{type(error).__name__}: {error}")
    print(json.dumps(done))


if __name__ == "__main__":
    main()

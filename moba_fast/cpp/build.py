"""Compile the C++ files with the compiler of this machine, once, and load them."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

HERE = Path(__file__).parent
# At 0 nothing is compiled, and nothing that was compiled is loaded.
VARIABLE = "MOBA_FAST_COMPILE"
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fno-strict-aliasing")
# The instructions that PyTorch looks for. Clang would divide vectors of 512 bits and
# have too few registers for the halves.
AVX2 = ("-mavx2", "-mfma")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
TARGETS = {"AVX512": (*AVX2, *AVX512, "-mprefer-vector-width=512"), "AVX2": AVX2}
# After so many seconds a compiler is given up.
PATIENCE = 120
# As in tile.h.
MOST_D = 256


@cache
def look_for_library():
    """Compile and load once per process; a compiler that fails is worth a warning.

    Returns:
        loaded: ctypes.CDLL, or None.
        reason: the compiler that was used, or why there is no library.
    """
    if os.environ.get(VARIABLE) == "0":
        return None, f"{VARIABLE} is 0"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        return None, f"no C++ compiler was found ({', '.join(COMPILERS)}, or CXX)"
    try:
        return load(compiler), f"C++ by {compiler}"
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        reason = f"{compiler} failed: {said}"
        warnings.warn(
            f"the C++ kernels of moba_fast do not run here, and calls take PyTorch's "
            f"slower flash operator: {reason}",
            stacklevel=2,
        )
        return None, reason


def load(compiler):
    """Load the library; compile it again if the file is no library."""
    path = compiled(compiler)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink()
        return ctypes.CDLL(str(compiled(compiler)))


def compiled(compiler):
    """Return the path of the library; compile it if no process has done so before."""
    sources = sorted(HERE.glob("*.cpp"))
    target = TARGETS.get(torch.backends.cpu.get_cpu_capability(), ())
    command = [*compiler.split(), *OPTIONS, *target]
    texts = [x.read_text() for x in (*sources, *sorted(HERE.glob("*.h")))]
    about = [platform.machine(), *command, run([command[0], "--version"]), *texts]
    key = hashlib.sha256("\0".join(about).encode()).hexdigest()
    path = cache_folder() / f"moba_{key[:16]}.so"
    if not path.exists():
        # Of processes that compile at the same time each one's is good.
        with TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            run([*command, *map(str, sources), "-o", str(fresh)])
            fresh.replace(path)
    return path


def run(command):
    """Run a command and return what it prints; its failure is an error with that."""
    done = subprocess.run(
        command,
        **{"capture_output": True, "text": True, "errors": "replace"},
        check=True,
        timeout=PATIENCE,
    )
    return done.stdout


def cache_folder():
    """Make and return the folder for compiled libraries, that of the user's caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "moba_fast"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def call(name, *arguments):
    """Call a compiled function, with PyTorch's number of threads as last argument.

    Args:
        name: of the function.
        arguments: tensors, by their address; int as int64, float as float32.

    Raises:
        RuntimeError: if there is no library here; the message says why.
    """
    loaded, reason = look_for_library()
    if loaded is None:
        raise RuntimeError(f"the C++ kernels do not run here: {reason}")
    function = getattr(loaded, f"moba_{name}")
    function(*map(as_c, arguments), as_c(torch.get_num_threads()))


def as_c(x):
    """Turn an argument into what ctypes passes on."""
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int64(x)


def check(x, dtype):
    """Raise a TypeError if x is not on the CPU or of another dtype; return it."""
    if x.device.type != "cpu" or x.dtype != dtype:
        raise TypeError(
            f"expected a tensor of {dtype} on the CPU, got {x.dtype} on {x.device}"
        )
    return x

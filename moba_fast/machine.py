"""Name the hardware and the versions that a measurement was made with."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4")


def describe_machine(device):
    """Name what a result depends on besides the code.

    Args:
        device: "cpu" or "cuda".

    Returns:
        dict of columns; a package that is not installed has an empty version.

    Example:
        >>> describe_machine("cpu")["torch"] == torch.__version__
        True
    """
    gpu = device == "cuda"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "driver": driver_version() if gpu else "",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
    }


def cpu_name():
    """Read the processor's name, as the kernel knows it where that is Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def driver_version():
    """Ask nvidia-smi for the version of the GPU's driver."""
    if not shutil.which("nvidia-smi"):
        return "unknown: nvidia-smi is not there"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return (result.stdout.splitlines() or ["unknown"])[0]


def version_of(package):
    """Return the version of an installed package, or "" if it is not installed."""
    if package == "torch":
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""

"""Where and with what something was made: versions, machine, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("kangaroo-decoding", "torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide results."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def device_name() -> str:
    """Of the GPU, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, GPUs."""
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def surroundings() -> dict[str, Any]:
    """All that a measurement's record says of where it was made."""
    head, dirty = commit()
    threads = torch.get_num_threads()
    return {"commit": head, "dirty": dirty, "versions": versions(), "machine": machine(), "threads": threads}


def commit() -> tuple[str | None, bool]:
    """(commit of the checkout this package runs from, whether the package differs from it); (None, False) outside."""
    package = Path(__file__).parent
    # A package that was installed into some other project's checkout is not what that checkout's commit describes.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, False
    return _git(package, "rev-parse", "HEAD"), bool(_git(package, "status", "--porcelain", "--", "."))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or not a checkout
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")  # Linux; platform knows other systems' processors, but not Linux's
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "source"

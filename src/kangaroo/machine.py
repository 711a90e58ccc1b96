"""The machine: how much memory is left, a clock that waits for it, and where and with what something was made."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from kangaroo import cgroup

MOST_THREADS = 1024
"""The most CPU threads that may be asked for: OpenMP ends the process where it cannot start them."""
KERNELS_KEPT = 256
"""By each of two caches: what batches of many sizes use again and again."""


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, what others give back when asked included."""
    if device.type == "cuda":
        # What torch holds in reserve is not free to the driver, but is to us.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    free, left = int(psutil.virtual_memory().available), cgroup.memory_left()
    return free if left is None else min(free, left)


def trim_heap() -> None:
    """Give the system back what the process's allocator holds and nothing uses, where there is a way."""
    if hasattr(psutil, "heap_trim"):  # not with every C library
        psutil.heap_trim()


def bound_kernel_caches() -> None:
    """Keep fewer of the kernels that oneDNN makes for every shape. To be called before torch makes the first.

    oneDNN keeps 1,024 of them, and so does torch's layer over it, each with about 300 kB. A server, which meets many
    shapes, would grow by 600 MB in its first hours. To make one again takes half a millisecond. Where the user has set
    the variables, they stay.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS_KEPT))


def human_bytes(count: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(pieces: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each piece of work, run in turn `repeats` times after three that warm up."""
    times: dict[str, list[float]] = {name: [] for name in pieces}
    for repeat in range(repeats + 3):
        for name, piece in pieces.items():
            synchronise(device)
            began = time.perf_counter()
            piece()
            synchronise(device)
            if repeat >= 3:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


LIBRARIES = ("kangaroo-decoding", "torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide results."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def device_name() -> str:
    """Of the GPU, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """Processor; cores and memory that this process may use; GPUs."""
    memory, limit = int(psutil.virtual_memory().total), cgroup.memory_limit()
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory if limit is None else min(memory, limit),
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

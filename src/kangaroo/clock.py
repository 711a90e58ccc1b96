"""Reading a clock when the device has caught up."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


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

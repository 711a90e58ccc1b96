"""How many CPU threads a model runs fastest with: a second one can cost a small model more than it brings."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from transformers import PreTrainedModel

from kangaroo.checks import need_whole
from kangaroo.errors import ConfigError
from kangaroo.kernels import Kernels
from kangaroo.machine import MOST_THREADS
from kangaroo.verdicts import Verdicts

ROUNDS = 7
LAYERS = 16
"""Of a model's layers, as many as no processor's cache holds."""
WORTH = 0.95
"""More threads must take this share of the time of fewer, or less."""


def set_threads(threads: int | Literal["auto"] | None, model: PreTrainedModel, compile: bool = False) -> None:
    """Use so many CPU threads; "auto" tries, None changes nothing. Raises ConfigError."""
    if threads == "auto":
        choose_threads(model, compile)
    elif threads is not None:
        if not 1 <= need_whole("threads", threads) <= MOST_THREADS:
            raise ConfigError(f"threads must be in 1..{MOST_THREADS}, got {threads}")
        torch.set_num_threads(threads)


@torch.inference_mode()
def choose_threads(model: PreTrainedModel, compile: bool = False) -> int:
    """Set and return the number of threads with which the model takes least for one token; it is kept, like verdicts.

    Whoever shares the machine is part of what is measured. A model on another device leaves all as it is. With
    `compile`, it is compiled kernels that are timed, on as many weights as they are to read.
    """
    if model.device.type != "cpu":
        return torch.get_num_threads()
    verdicts, config = Verdicts(model.device, threads=False), model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")]
    name = f"threads {config.model_type} {sizes} {model.dtype}{' compiled' if compile else ''} of {_cores()}"
    best = verdicts.get(name)
    if best is None:
        best = _fastest(_compiled_step(model) if compile else _step(model), _candidates(_cores()))
        verdicts.set(name, best)
        verdicts.save()
    torch.set_num_threads(int(best))
    return int(best)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _candidates(cores: int) -> list[int]:
    return sorted({*(2**power for power in range(cores.bit_length()) if 2**power <= cores), cores})


def _step(model: PreTrainedModel) -> Callable[[], object]:
    token = torch.ones(1, 1, dtype=torch.int64)
    return lambda: model(token, use_cache=False)


def _compiled_step(model: PreTrainedModel) -> Callable[[], object]:
    layer = model.base_model.layers[0]
    shapes = [weight.shape for weight in layer.parameters() if weight.ndim == 2]
    kernels = Kernels(model.dtype, model.device)
    weights = [kernels.pack(torch.zeros(shape, dtype=model.dtype), None) for shape in shapes * LAYERS]
    rows = {inner: torch.zeros(1, inner, dtype=model.dtype) for _, inner in shapes}
    return lambda: [one(rows[one.inner]) for one in weights]


def _fastest(step: Callable[[], object], candidates: list[int]) -> int:
    seconds: dict[int, list[float]] = {count: [] for count in candidates}
    for turn in range(ROUNDS + 1):
        for count in candidates:
            torch.set_num_threads(count)
            began = time.perf_counter()
            step()
            if turn:  # the first one warms up
                seconds[count].append(time.perf_counter() - began)
    best = candidates[0]
    for count in candidates[1:]:
        if statistics.median(seconds[count]) < WORTH * statistics.median(seconds[best]):
            best = count
    return best

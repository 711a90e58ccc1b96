"""Models and tokenizers as folders: what transformers would stumble over is found, and said, first."""

import os
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, modeling_gguf_pytorch_utils
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    get_verbosity,
    is_progress_bar_enabled,
    set_verbosity,
    set_verbosity_error,
    tqdm,
)

from kangaroo.errors import ModelError
from kangaroo.inputs import is_file, is_folder, name_path, read_object
from kangaroo.machine import available_bytes, human_bytes

TABLES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
)
MOST_LAYERS = 10_000
"""Of a model: to count the weights of more takes minutes."""
_OF_LOADERS = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, OSError, RecursionError, RuntimeError, TypeError),
    *(ValueError, HFValidationError, SafetensorError, StrictDataclassError, struct.error),
)
"""What reading a model's files raises, in transformers and below it, where they hold something unexpected."""


@contextmanager
def reading_model(what: str, name: str | Path) -> Iterator[None]:
    """While a model's files are read by transformers: whatever it makes of them becomes a ModelError.

    Files in a folder are looked at first, as a damaged one can look to transformers as if it were not there.
    """
    shown = name_path(name)
    path = Path(name)
    if is_folder(path):
        for table in TABLES:
            if is_file(path / table):
                read_object(path / table, table, ModelError)
    elif _must_be_a_folder(str(name)):
        raise ModelError(f"cannot load {what} from {shown}: no such folder")
    try:
        with quietly():
            yield
    except Exception as error:
        if not is_of_loaders(error):
            raise
        raise ModelError(f"cannot load {what} from {shown}: {first_line(error)}") from None


def is_of_loaders(error: Exception) -> bool:
    """Whether an error is one of those that transformers, and what is below it, stumble over files with."""
    # tokenizers raises nothing more special than an Exception for a tokenizer.json that it cannot read.
    return isinstance(error, _OF_LOADERS) or type(error) is Exception


WHOLE = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options of `from_pretrained` with which it also returns what `need_whole_model` looks at."""


def need_whole_model(facts: Mapping[str, Any], name: str | Path) -> None:
    """Raise ModelError for weights that are missing or do not fit: transformers makes them up, at random."""
    if missing := sorted(facts["missing_keys"]):
        raise ModelError(f"the weights in {name} are not all there: {missing[0]!r} is one of {len(missing)} missing")
    for tensor, got, wanted in sorted(facts["mismatched_keys"]):
        raise ModelError(f"the weights in {name} do not fit its config: {tensor!r} is {[*got]}, not {[*wanted]}")


@contextmanager
def quietly() -> Iterator[None]:
    """No bars and no warnings: what they warn of is an error here, or looked for elsewhere."""
    bars, verbosity = is_progress_bar_enabled(), get_verbosity()
    # The reader of GGUF files has a bar that transformers' switch for bars does not reach.
    modeling_gguf_pytorch_utils.tqdm = tqdm
    disable_progress_bar()
    set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        set_verbosity(verbosity)
        if bars:
            enable_progress_bar()


def check_size(name: str | Path, dtype: torch.dtype | None, **options: Any) -> None:
    """Raise ModelError if a folder's config describes a model that memory could not hold, before any of it is made.

    `options` are those that the model will be loaded with.
    """
    if not is_folder(Path(name)):
        return
    config = AutoConfig.from_pretrained(name, **options)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not 1 <= layers <= MOST_LAYERS:
        raise ModelError(f"{name_path(name)}/config.json describes {layers:,} layers, not 1 to {MOST_LAYERS:,}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=options.get("trust_remote_code", False))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    need = numbers * (dtype or getattr(config, "dtype", None) or torch.float32).itemsize
    free = available_bytes(torch.device("cpu"))
    if need > free and not torch.cuda.is_available():
        raise ModelError(
            f"the model that {name_path(name)}/config.json describes has {numbers:,} weights, which need "
            f"{human_bytes(need)} of memory, where {human_bytes(free)} are free"
        )


def _must_be_a_folder(name: str) -> bool:
    """Hub names have one slash at most, and begin with neither that nor a dot."""
    return name.startswith((os.sep, ".", "~")) or name.count("/") > 1 or len(name) > 200 or not name.isprintable()


def first_line(error: Exception) -> str:
    """What an error says, on one line: its first, and the second where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]

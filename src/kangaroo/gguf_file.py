"""Models and tokenizers from GGUF files, llama.cpp's format, by transformers' own readers.

Where transformers has a kernel for a file's blocks, the weights stay packed as they are in the file. On a CPU it has
none, and they are unpacked once, at load time.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from kangaroo.errors import ModelError
from kangaroo.inputs import name_path
from kangaroo.model_files import WHOLE, is_of_loaders, need_whole_model, quietly

SUFFIX = ".gguf"
Loaded = TypeVar("Loaded")


def is_gguf(name: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return str(name).endswith(SUFFIX)


def load_gguf_model(name: str | Path, dtype: torch.dtype | None, device: torch.device, **more: Any) -> PreTrainedModel:
    """The causal LM in a GGUF file; `more` as in `from_pretrained`.

    Raises ModelError for a file that is missing, damaged or of an unknown kind.
    """
    path = _existing(name)
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype, **more}
    if device.type == "cpu":
        options["quantization_config"] = GgufConfig(dequantize=True)

    model, facts = _read(path, lambda: AutoModelForCausalLM.from_pretrained(path.parent, **WHOLE, **options))
    need_whole_model(facts, path)
    model.config._name_or_path = str(path)  # where the tokenizer is
    return model


def load_gguf_tokenizer(name: str | Path) -> Any:
    """The tokenizer in a GGUF file. Raises ModelError if it holds none."""
    path = _existing(name)
    return _read(path, lambda: AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), "a tokenizer")


def _existing(name: str | Path) -> Path:
    path = Path(name)
    if not path.is_file():
        raise ModelError(f"no GGUF file at {name_path(path)}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{name_path(path)} is not a GGUF file: it does not begin as one")
    if find_spec("gguf") is None:
        raise ModelError("reading GGUF files needs the package gguf; install kangaroo-decoding[gguf]")
    return path


def _read(path: Path, read: Callable[[], Loaded], what: str = "a causal LM") -> Loaded:
    try:
        with quietly():
            return read()
    except Exception as error:
        if not is_of_loaders(error):
            raise
        text = " ".join(str(error).split())
        known = "not supported" in text
        why = text if known else f"the file is truncated, or lacks what it needs ({type(error).__name__}: {text[:120]})"
        raise ModelError(f"cannot load {what} from {name_path(path)}: {why}") from None

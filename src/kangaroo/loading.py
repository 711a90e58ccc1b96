"""Models and tokenizers from folders and hub names, or the demo's, by transformers' own loaders."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kangaroo import demo
from kangaroo.checks import LARGEST, shown
from kangaroo.demo.smollm2 import smollm2
from kangaroo.errors import ConfigError, ModelError
from kangaroo.gguf_file import is_gguf, load_gguf_model, load_gguf_tokenizer
from kangaroo.model_files import WHOLE, check_size, first_line, need_whole_model, reading_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_tokenizer(name: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder or a GGUF file, of a hub name, or of the "demo" model."""
    if is_gguf(name):
        return load_gguf_tokenizer(name)
    options = {} if revision is None else {"revision": revision}
    found = _find(name)
    with reading_model("a tokenizer", found):
        tokenizer = AutoTokenizer.from_pretrained(found, trust_remote_code=trust_remote_code, **options)
    if not isinstance(tokenizer.model_max_length, int | float):  # which is only looked at when a text is read
        raise ModelError(f"the tokenizer's model_max_length is a number, got {shown(tokenizer.model_max_length)}")
    return tokenizer


def _find(name: str | Path) -> str | Path:
    return smollm2() if str(name) == demo.NAME else name


def load_config(name: str | Path) -> Any:
    """The configuration of a model in a folder or of a hub name, without its weights."""
    found = _find(name)
    with reading_model("a causal LM", found):
        return AutoConfig.from_pretrained(found)


def load_model(
    name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A causal LM from a folder, a GGUF file or a hub name, or the "demo" model, on the GPU if there is one.

    `options` are those of `from_pretrained`.

    Raises ConfigError for a device or a type that is none, ModelError for what cannot be loaded.
    """
    place, kind = choose_device(device), choose_dtype(dtype)
    if kind is None and place.type == "cpu":
        kind = fastest_cpu_dtype()
    if is_gguf(name):
        return load_gguf_model(name, kind, place, **options).to(place)
    found = _find(name)
    with reading_model("a causal LM", found):
        check_size(found, kind, **options)
        model, facts = AutoModelForCausalLM.from_pretrained(found, dtype=kind or "auto", **WHOLE, **options)
    need_whole_model(facts, name)
    return model.to(place)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device named, or the GPU if there is one. Raises ConfigError for one that this machine has not."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        raise ConfigError(f"cannot use device {str(device)!r}: {first_line(error)}") from None
    return chosen


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type, or the one of that name. Raises ConfigError for others."""
    kind = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and kind not in DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {str(dtype)!r}")
    return kind


def fastest_cpu_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, else float32 (bfloat16 is then emulated, 100 times slower)."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The token ids that end a text, as transformers' own generation reads them."""
    value = model.generation_config.eos_token_id if model.generation_config is not None else None
    value = model.config.eos_token_id if value is None else value
    ends = [] if value is None else [*value] if isinstance(value, list | tuple) else [value]
    if not all(type(end) is int and 0 <= end <= LARGEST for end in ends):
        raise ModelError(f"the model's eos_token_id should be token ids, got {shown(value)}")
    return tuple(ends)

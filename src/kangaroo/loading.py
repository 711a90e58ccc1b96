"""Models and tokenizers from folders and hub names, or the demo's, by transformers' own loaders."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kangaroo import demo
from kangaroo.demo.smollm2 import smollm2
from kangaroo.errors import ModelError


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer in a folder, of a hub name, or of the "demo" model."""
    try:
        return AutoTokenizer.from_pretrained(_find(name))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a tokenizer from {name}: {_first_line(error)}") from None


def _find(name: str | Path) -> str | Path:
    return smollm2() if str(name) == demo.NAME else name


def load_config(name: str | Path) -> Any:
    """The configuration of a model in a folder or of a hub name, without its weights."""
    try:
        return AutoConfig.from_pretrained(_find(name))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a causal LM from {name}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def load_model(name: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal LM from a folder or hub name, or the "demo" model, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None and device.type == "cpu":
        dtype = fastest_cpu_dtype()
    try:
        model = AutoModelForCausalLM.from_pretrained(_find(name), dtype=dtype or "auto")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot load a causal LM from {name}: {_first_line(error)}") from None
    return model.to(device)


def fastest_cpu_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, else float32 (bfloat16 is then emulated, 100 times slower)."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The token ids that end a text, as transformers' own generation reads them."""
    value = model.generation_config.eos_token_id if model.generation_config is not None else None
    value = model.config.eos_token_id if value is None else value
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (int(value),)

"""Models and tokenizers from folders and hub names, by transformers' own loaders."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kangaroo.checks import shown
from kangaroo.errors import ModelError
from kangaroo.model_files import check_size, reading_model


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer in a folder or of a hub name."""
    with reading_model("a tokenizer", name):
        return AutoTokenizer.from_pretrained(name)


def load_model(name: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal LM from a folder or hub name, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None and device.type == "cpu":
        dtype = fastest_cpu_dtype()
    with reading_model("a causal LM", name):
        check_size(name, AutoConfig.from_pretrained(name), dtype)
        model, found = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # which transformers makes up, at random
        raise ModelError(f"the weights in {name} are not all there: {missing[0]!r} is one of {len(missing)} missing")
    return model.to(device)


def fastest_cpu_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, else float32 (bfloat16 is then emulated, 100 times slower)."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The token ids that end a text, as transformers' own generation reads them."""
    value = model.generation_config.eos_token_id if model.generation_config is not None else None
    value = model.config.eos_token_id if value is None else value
    ends = [] if value is None else [*value] if isinstance(value, list | tuple) else [value]
    if not all(type(end) is int and end >= 0 for end in ends):
        raise ModelError(f"the model's eos_token_id should be token ids, got {shown(value)}")
    return tuple(ends)

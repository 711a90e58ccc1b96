"""A standalone draft as a GGUF file, llama.cpp's format, with a tokenizer that llama.cpp finds equal to the target's.

Names of settings and tensors are those of the package gguf; what llama.cpp expects of them is in its converter and in
its loaders of the architectures llama, qwen2 and qwen3.
"""

import json
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kangaroo.errors import ConfigError, ModelError
from kangaroo.families import SLIDING, layer_kinds
from kangaroo.gguf_file import load_gguf_model
from kangaroo.model import Target

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name for a family."""
_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
_PRE_TOKENIZERS = {"qwen2": "qwen2", "qwen3": "qwen2"}
"""How a family's text is cut before it is tokenised; a draft reads no text, so the default does for others."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""Types of tokens (gguf.TokenType)."""


def check_gguf(config: Any, dtype: torch.dtype) -> None:
    """Raise ModelError for a model that llama.cpp would compute otherwise, ConfigError for what a file cannot hold."""
    family = config.model_type
    if find_spec("gguf") is None:
        raise ModelError("writing GGUF files needs the package gguf; install kangaroo-decoding[gguf]")
    if family not in ARCHITECTURES:
        raise ModelError(f"{family} drafts are not written for llama.cpp; {', '.join(ARCHITECTURES)} are")
    if SLIDING in layer_kinds(config, config.num_hidden_layers) and config.sliding_window < _context(config):
        raise ModelError(f"llama.cpp looks past the sliding window of {family} models; its drafts would be others")
    rope = config.rope_parameters
    if (
        rope.get("rope_type", "default") not in ("default", "linear", "llama3")
        or rope.get("partial_rotary_factor", 1) != 1
    ):
        raise ModelError(f"rotary embeddings of type {rope.get('rope_type')!r} are not written for llama.cpp")
    if rope.get("rope_type", "default") != "default" and ARCHITECTURES[family] != "llama":
        raise ModelError(f"scaled rotary embeddings of {family} models are not written for llama.cpp")
    if getattr(config, "mlp_bias", False):
        raise ModelError("llama.cpp knows no biases in the feed-forward networks of llama models")
    if _name(dtype) not in _FILE_TYPES:
        raise ConfigError(f"a GGUF file holds {', '.join(_FILE_TYPES)}, not {_name(dtype)}; give another --dtype")


def write_gguf(model: PreTrainedModel, path: Path, tokenizer: Any, source: Path | None) -> None:
    """Write a draft built by `build_standalone`; its tokenizer is copied from the GGUF file `source`, or made anew.

    Raises ModelError for a tokenizer that is not byte-level BPE where there is no file to copy from.
    """
    gguf = import_module("gguf")
    config, dtype = model.config, model.dtype
    check_gguf(config, dtype)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    try:
        writer.add_name(f"Kangaroo draft for {config.model_type}, {config.num_hidden_layers} layers")
        writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[_name(dtype)]]))
        _add_sizes(writer, config)
        if source is not None:
            _copy_tokenizer(gguf, writer, source)
        else:
            _add_tokenizer(writer, tokenizer, config)
        for name, tensor in _tensors(gguf, model):
            _add_tensor(gguf, writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_gguf(path: Path, target: Target, config: Any) -> PreTrainedModel:
    """A draft with this configuration, read from its file by transformers, computing as the target does.

    What transformers leaves unread of such files is taken from the configuration: scaled rotary embeddings, and the
    size of qwen3's heads.
    """
    unread: dict[str, Any] = {"head_dim": config.head_dim} if config.model_type == "qwen3" else {}
    if config.rope_parameters.get("rope_type", "default") != "default":
        unread["rope_parameters"] = config.rope_parameters
    implementation = target.config._attn_implementation
    cpu = torch.device("cpu")
    return load_gguf_model(path, target.dtype, cpu, attn_implementation=implementation, **unread).to(target.device)


def _context(config: Any) -> int:
    return int(config.max_position_embeddings)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_sizes(writer: Any, config: Any) -> None:
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _tensors(gguf: Any, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors by llama.cpp's names, in llama.cpp's order of rows."""
    config = model.config
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[ARCHITECTURES[config.model_type].upper()], config.num_hidden_layers
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, leaf = name.rpartition(".")
        count = heads.get(module.rpartition(".")[2])
        if count is not None and ARCHITECTURES[config.model_type] == "llama":
            tensor = _neighbours(tensor, count)
        found = names.get_name(module)
        if found is None:
            raise ModelError(f"llama.cpp has no name for {name!r} of {config.model_type} models")
        yield f"{found}.{leaf}", tensor
    if config.rope_parameters.get("rope_type", "default") != "default":
        yield "rope_freqs.weight", _rotary_factors(model)


def _neighbours(tensor: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbouring rows of a llama head where transformers rotates its halves."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _rotary_factors(model: PreTrainedModel) -> Tensor:
    """[head size / 2] by which frequencies are divided before they rotate."""
    config = model.config
    rotary = type(model.base_model.rotary_emb)(config)  # the model's own lies on no device
    exponents = torch.arange(0, _head_size(config), 2, dtype=torch.float32) / _head_size(config)
    return config.rope_parameters["rope_theta"] ** -exponents / rotary.inv_freq.float()  # type: ignore[no-any-return]


def _add_tensor(gguf: Any, writer: Any, name: str, tensor: Tensor) -> None:
    if tensor.ndim == 1:  # norms, biases and rotary factors are read in single precision
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.bfloat16:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.contiguous().numpy())


def _copy_tokenizer(gguf: Any, writer: Any, source: Path) -> None:
    fields = gguf.GGUFReader(source).fields
    if "tokenizer.ggml.tokens" not in fields:
        raise ModelError(f"{source} holds no tokenizer to copy")
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)


def _add_tokenizer(writer: Any, tokenizer: Any, config: Any) -> None:
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    if told["model"]["type"] != "BPE" or told["model"].get("byte_fallback"):
        raise ModelError(
            "only a byte-level BPE tokenizer can be written for llama.cpp; name the target's own GGUF file as --model, "
            "and its tokenizer is copied"
        )
    by_id = {id: token for token, id in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry["special"] for entry in told["added_tokens"]}
    tokens, kinds = [], []
    for id in range(config.vocab_size):
        tokens.append(by_id.get(id, f"[PAD{id}]"))
        kind = _CONTROL if added.get(id) else _USER_DEFINED if id in added else _NORMAL
        kinds.append(kind if id in by_id else _UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZERS.get(config.model_type, "default"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in told["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        if (id := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(id)
    if tokenizer.bos_token_id is not None:
        writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])

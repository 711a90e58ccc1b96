"""Drafts as GGUF files: transformers reads the same logits from them, and llama.cpp finds the target's tokens."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from chat_model import save_chat_model
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.errors import ConfigError, ModelError
from kangaroo.exchange.export import export
from kangaroo.exchange.gguf import check_gguf, read_gguf, write_gguf
from kangaroo.exchange.standalone import build_standalone, prove
from kangaroo.loading import load_tokenizer
from kangaroo.model import Target

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def make_adapter(family: str, vocab_size: int, **changes: Any) -> Adapter:
    model = tiny.build(family, vocab_size=vocab_size, **changes).float()
    model.set_attn_implementation("eager")
    return tiny.make_adapter(Target(model, exact=False), variant="full-layer").float()


def written(adapter: Adapter, path: Path, tokenizer: Any) -> Any:
    draft = build_standalone(adapter)
    write_gguf(draft, path, tokenizer, None)
    return read_gguf(path, adapter.target, draft.config)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen3", {"use_sliding_window": False}),
    ],
)
def test_a_file_holds_the_drafters_logits(family: str, changes: dict[str, Any], chat: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat / "target")
    adapter = make_adapter(family, len(tokenizer), **changes)
    assert prove(adapter, written(adapter, tmp_path / "draft.gguf", tokenizer)).largest == 0


def test_scaled_rotary_embeddings_are_written_as_factors(chat: Path, tmp_path: Path) -> None:
    tokenizer, path = load_tokenizer(chat / "target"), tmp_path / "draft.gguf"
    adapter = make_adapter("llama", len(tokenizer), rope_parameters=LLAMA3)
    assert prove(adapter, written(adapter, path, tokenizer)).largest == 0
    (factors,) = [tensor.data for tensor in gguf.GGUFReader(path).tensors if tensor.name == "rope_freqs.weight"]
    # Llama 3.1: wavelengths above context / 1 are divided by 8, those below context / 4 by nothing, between smoothly.
    wavelengths = [2 * math.pi * 10000.0 ** (2 * i / 8) for i in range(4)]
    smooth = [(32 / length - 1) / (4 - 1) for length in wavelengths]
    expected = [1 / (max(0, min(1, s)) + (1 - max(0, min(1, s))) / 8) for s in smooth]
    assert factors.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_tokenizer_is_the_targets_copied_or_made(chat: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat / "target")
    export(chat / "adapter", "llama.cpp", tmp_path / "made", model=str(chat / "target"), dtype="float32")
    made = gguf.GGUFReader(tmp_path / "made" / "draft.gguf").fields
    tokens = made["tokenizer.ggml.tokens"].contents()
    assert tokens == [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])]
    assert made["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    text = "Where would you like to eat tonight?"
    again = load_tokenizer(tmp_path / "made" / "draft.gguf")
    assert again.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    # A target that is a GGUF file itself: its tokenizer is taken over, entry by entry.
    model, path = make_adapter("llama", len(tokenizer)), tmp_path / "copied.gguf"
    write_gguf(build_standalone(model), path, None, tmp_path / "made" / "draft.gguf")
    copied = gguf.GGUFReader(path).fields
    names = [name for name in made if name.startswith("tokenizer.")]
    assert names
    assert {name: copied[name].contents() for name in names} == {name: made[name].contents() for name in names}


def test_halves_are_kept_and_named(chat: Path, tmp_path: Path) -> None:
    export(chat / "adapter", "llama.cpp", tmp_path / "d", model=str(chat / "target"), dtype="bfloat16")
    reader = gguf.GGUFReader(tmp_path / "d" / "draft.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.attn_q.weight"] == "BF16"
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    assert reader.fields["general.file_type"].contents() == int(gguf.LlamaFileType.MOSTLY_BF16)


@pytest.mark.parametrize(
    ("family", "changes", "dtype", "message"),
    [
        ("mistral", {}, torch.float32, "sliding window"),
        ("qwen2", {"use_sliding_window": False, "rope_parameters": LLAMA3}, torch.float32, "scaled rotary"),
        ("llama", {"mlp_bias": True}, torch.float32, "biases"),
        ("cohere", {}, torch.float32, "are not written for llama.cpp"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        check_gguf(tiny.build(family, **changes).config, dtype)


def test_a_precision_no_file_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="--dtype"):
        check_gguf(tiny.build("llama").config, torch.float64)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kangaroo.exchange.gguf.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"kangaroo-decoding\[gguf\]"):
        check_gguf(tiny.build("llama").config, torch.float32)

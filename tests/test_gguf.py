"""Models in llama.cpp's files: read as they were written, and refused in one line where they cannot be."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import enable_progress_bar

from chat_model import save_chat_model
from kangaroo.decoder import load
from kangaroo.errors import ModelError
from kangaroo.loading import load_model, load_tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, folder: Path, architecture: str = "llama", *, tokenizer: bool = True) -> Path:
    """The chat model in a folder as a GGUF file in full precision."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        _add_tokenizer(writer, folder)
    for name, tensor in _tensors(model).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    state, config = model.state_dict(), model.config
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in heads:  # llama.cpp rotates neighbours where transformers rotates halves
                n = heads[theirs]
                weight = weight.view(n, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            tensors[f"blk.{layer}.{theirs}.weight"] = weight
    return tensors


def _add_tokenizer(writer: "gguf.GGUFWriter", folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in told["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat")) / "target"


@torch.inference_mode()
def test_a_gguf_file_holds_the_model_that_was_written(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "model.gguf", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(20)[None] + 5
    capfd.readouterr()
    enable_progress_bar()
    read = load_model(path, torch.float32)
    load_model(folder, torch.float32)
    assert capfd.readouterr() == ("", ""), "a library shows no bars"
    assert torch.allclose(read(tokens).logits, model(tokens).logits, atol=1e-5)


def test_text_comes_out_of_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", folder)
    decoder = load(path, drafter="early-exit", dtype=torch.float32, exit_layer=1)
    prompt = "Where would you like"
    answer = decoder.generate([prompt], max_tokens=12)[0]
    assert answer.tokens == decoder.plain().generate([prompt], max_tokens=12)[0].tokens
    assert decoder.tokenizer.encode(prompt) == load(folder, drafter="none").tokenizer.encode(prompt)


def _cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder, path: path, "no GGUF file at"),
        (lambda folder, path: Path(path.write_text("hello") and path), "is not a GGUF file"),
        (lambda folder, path: _cut(write_gguf(path, folder), 0.7), "truncated"),
        (lambda folder, path: _cut(write_gguf(path, folder), 0.02), "truncated"),
        (lambda folder, path: write_gguf(path, folder, "lxxma"), "lxxma is not supported"),
    ],
    ids=["missing", "another-format", "truncated", "only-its-head", "unknown-architecture"],
)
def test_a_gguf_file_that_cannot_be_read_is_one_line(
    spoil: Callable[[Path, Path], Path], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(spoil(folder, tmp_path / "model.gguf"), torch.float32)
    assert "\n" not in str(caught.value)


def test_a_gguf_file_that_lacks_a_tensor_is_not_made_whole(folder: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", folder)
    path.write_bytes(path.read_bytes().replace(b"blk.2.ffn_up", b"blk.2.ffn_xx"))
    with pytest.raises(ModelError, match=r"not all there: 'model.layers.2.mlp.up_proj.weight'"):
        load_model(path, torch.float32)


def test_a_bit_flipped_in_the_head_of_a_gguf_file_is_refused_in_one_line_or_read(folder: Path, tmp_path: Path) -> None:
    path, chance = write_gguf(tmp_path / "model.gguf", folder), random.Random(0)
    whole, said = path.read_bytes(), list[str]()
    for at in chance.sample(range(whole.index(b"tokenizer.ggml.model")), 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        try:
            load_model(path, torch.float32)
        except ModelError as error:
            said.append(str(error))
    assert len(said) > 10
    assert not any("\n" in line for line in said)


def test_a_gguf_file_without_a_tokenizer_is_one_line(folder: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", folder, tokenizer=False)
    with pytest.raises(ModelError, match=r"cannot load a tokenizer from .*model.gguf"):
        load_tokenizer(path)


def test_without_the_package_it_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "model.gguf", folder)
    monkeypatch.setattr("kangaroo.gguf_file.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"kangaroo-decoding\[gguf\]"):
        load_model(path)

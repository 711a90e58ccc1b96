"""What cannot be imported: one line that says what is wrong, status 2, and nothing written."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import DRAFTED, eagle3, official, speculators, write
from torch import Tensor

from chat_model import save_chat_model
from command import invoke
from kangaroo.errors import AdapterError
from kangaroo.exchange.checkpoint import read_checkpoint

Config = dict[str, Any]
Tensors = dict[str, Tensor]
Q, O = "module.layers.0.self_attn.q_proj.weight", "midlayer.self_attn.o_proj.weight"  # noqa: E741


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("import"))


@pytest.fixture
def refuse(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is said of a folder that is refused."""

    def act(folder: Path, *options: str, target: Path | None = None, output: Path | None = None) -> str:
        made = output or tmp_path / "out" / "made"
        chosen = () if "--data" in options and target is None else ("--target", str(target or place / "target"))
        before = sorted(tmp_path.rglob("*"))
        assert invoke("import", str(folder), *chosen, "--output", str(made), *options) == 2
        told = capsys.readouterr()
        assert not told.out
        assert told.err.startswith("error: ")
        assert told.err.count("\n") == 1
        assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "out"] == before
        assert output is not None or not made.exists()
        return told.err

    return act


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {own: value for own, value in tensors.items() if own != name}


def changed(name: str, value: Callable[[Tensor], Any]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value(tensors[name])}


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(*shape)}


def same(tensors: Tensors) -> Tensors:
    return tensors


# --- adapters of the Kangaroo release


@pytest.mark.parametrize(
    ("config", "tensors", "named"),
    [
        ({"hidden_size": 48}, same, "hidden_size is 48, but the target has 32"),
        ({"vocab_size": 7}, same, "vocab_size is 7"),
        ({"num_attention_heads": 8}, same, "num_attention_heads is 8, but the target has 4"),
        ({"num_key_value_heads": 4}, same, "num_key_value_heads is 4"),
        ({"model_type": "mistral"}, same, "model_type is 'mistral'; only 'llama'"),
        ({"hidden_size": None}, same, "does not say 'hidden_size'"),
        ({"hidden_size": "wide"}, same, "hidden_size must be a whole number, got 'wide'"),
        ({"num_attention_heads": 0}, same, "num_attention_heads must be above 0"),
        ({"rope_theta": 5e5}, same, "another rotary embedding (base 500000) than the target's (base 10000)"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, same, "base 10000, linear, factor 2"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, same, "of type 'dynamic' are not known"),
        ({"rope_scaling": "linear"}, same, "rope_scaling must be an object"),
        ({"rms_norm_eps": 1e-5}, same, "another epsilon of the norms (1e-05) than the target's (1e-06)"),
        ({}, without("module.norm.weight"), "'norm.weight' is missing or unexpected"),
        ({}, added("layers.0.mlp.up_proj.weight", 4, 4), "'layers.0.mlp.up_proj.weight' is of a whole decoder layer"),
        ({}, added("layers.0.self_attn.q_proj.bias", 32), "q_proj.bias' is missing or unexpected"),
        ({}, added("layers.0.self_attn.q_proj.weight", 32, 32), "some tensors are there twice"),
        ({}, changed(Q, lambda value: value[:-1]), "is of shape [31, 32], not [32, 32]"),
        ({}, changed(Q, lambda value: value * torch.nan), "values that are not finite"),
        ({}, changed(Q, lambda value: value.int()), "is of type torch.int32"),
        ({}, changed(Q, lambda value: value.to_sparse()), "is not a plain tensor"),
        ({}, changed(Q, lambda value: value.tolist()), "is not a plain tensor, but list"),
        ({}, lambda tensors: {"model.layers.0.w": torch.zeros(2)}, "nothing that is known in"),
        ({}, lambda tensors: {3: torch.zeros(2)}, "should hold tensors by name"),
        ({}, lambda tensors: {}, "should hold tensors by name"),
        ({}, lambda tensors: {"rotary_emb.inv_freq": torch.ones(2)}, "there are no weights in"),
    ],
)
def test_adapters(
    place: Path,
    tmp_path: Path,
    refuse: Callable[..., str],
    config: Config,
    tensors: Callable[[Tensors], Any],
    named: str,
) -> None:
    theirs, weights = official(place)
    folder = write(tmp_path / "theirs", theirs | config, tensors(weights), "pytorch_model.bin")
    assert named in refuse(folder, "--exit-layer", "1")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "give --exit-layer (the published ones leave after 2 layers of Vicuna-7B and after 3"),
        (("--exit-layer", "4"), "exit layer must be in 0..3"),
        (("--exit-layer", "1", "--taps", "1,2,3"), "--taps does not apply"),
        (("--exit-layer", "1", "--data", "nowhere.jsonl"), "no data file at nowhere.jsonl"),
    ],
)
def test_options_of_adapters(
    place: Path, tmp_path: Path, refuse: Callable[..., str], options: tuple[str, ...], named: str
) -> None:
    folder = write(tmp_path / "theirs", *official(place), "pytorch_model.bin")
    assert named in refuse(folder, *options, target=place / "target")


def test_a_target_of_another_family(place: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    from tiny import build

    other = tmp_path / "mistral"
    build("mistral").float().save_pretrained(other)
    for file in (place / "target").glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    folder = write(tmp_path / "theirs", *official(place), "pytorch_model.bin")
    assert "for llama targets, and this one is mistral" in refuse(folder, "--exit-layer", "1", target=other)


# --- EAGLE-3 heads


@pytest.mark.parametrize(
    ("config", "tensors", "named"),
    [
        ({"hidden_size": 64}, same, "hidden_size is 64, but the target has 32"),
        ({"target_hidden_size": 64}, same, "target_hidden_size is 64, but the target has 32"),
        ({"vocab_size": 128256}, same, "vocab_size is 128256, but the target has"),
        ({"draft_vocab_size": 100}, same, "is of shape [120"),
        ({"draft_vocab_size": 10**6}, same, "is of shape [120"),
        ({"intermediate_size": 2**30}, same, "1073741824"),
        ({"num_attention_heads": 3}, same, "cannot be"),
        ({"num_key_value_heads": 4}, same, "_proj.weight' is of shape [16, 64], not [32, 64]"),
        ({"head_dim": 7}, same, "cannot be"),
        ({"model_type": "qwen3"}, same, "model_type is 'qwen3'; only 'llama' is known here"),
        ({"hidden_act": "gelu"}, same, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": 2}, same, "num_hidden_layers is 2; only 1"),
        ({"norm_before_fc": True}, same, "norm_before_fc is True; only False"),
        ({"rms_norm_eps": -1.0}, same, "rms_norm_eps must be above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, same, "of type 'yarn' are not known"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, same, "does not say 'low_freq_factor'"),
        ({"attention_bias": True}, same, "'midlayer.self_attn."),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, same, "say after how many layers the head reads"),
        ({"speculators_model_type": "mlp"}, same, "a speculator of kind 'mlp'"),
        ({}, without("d2t"), "'d2t' is missing"),
        ({}, without("midlayer.hidden_norm.weight"), "hidden_norm.weight' is missing"),
        ({}, added("midlayer.self_attn.q_norm.weight", 8), "q_norm.weight' is missing or unexpected"),
        ({}, added("layers.0.input_layernorm.weight", 32), "is missing or unexpected"),
        ({}, changed("fc.weight", lambda value: value[:, :64]), "a head of EAGLE-1 or EAGLE-2"),
        ({}, changed("fc.weight", lambda value: value[:, :95]), "'fc.weight' is of shape [32, 95], not [32, 96]"),
        ({}, changed("d2t", lambda value: value + 1000), "'d2t' does not lead to a rising list"),
        ({}, changed("d2t", lambda value: value.flip(0)), "'d2t' does not lead to a rising list"),
        ({}, changed("d2t", lambda value: value.float()), "'d2t'"),
        ({}, changed("t2d", lambda value: ~value), "'d2t' and 't2d' name different tokens"),
        ({}, changed(O, lambda value: value * torch.inf), "values that are not finite"),
    ],
)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_heads(
    place: Path,
    tmp_path: Path,
    refuse: Callable[..., str],
    config: Config,
    tensors: Callable[[Tensors], Any],
    named: str,
    file: str,
) -> None:
    theirs, weights = eagle3(place)
    assert named in refuse(write(tmp_path / "theirs", theirs | config, tensors(weights), file))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"transformer_layer_config": None}, "does not say 'hidden_size'"),
        ({"transformer_layer_config": []}, "transformer_layer_config must be an object"),
        ({"speculators_model_type": "independent"}, "only EAGLE-3 heads can be imported"),
        ({"norm_before_residual": "yes"}, "norm_before_residual must be true or false"),
    ],
)
def test_heads_of_speculators(
    place: Path, tmp_path: Path, refuse: Callable[..., str], change: Config, named: str
) -> None:
    config, tensors = speculators(*eagle3(place))
    assert named in refuse(write(tmp_path / "theirs", config | change, tensors, "model.safetensors"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--exit-layer", "1"), "holds an EAGLE-3 head: --exit-layer does not apply"),
        (("--taps", "1,2,9"), "reads states after (1, 2, 9) layers, but the target has 4"),
        (("--taps", "1,2"), "--taps takes three numbers"),
        (("--taps", "1,2,-3"), "--taps takes three numbers"),
    ],
)
def test_options_of_heads(
    place: Path, tmp_path: Path, refuse: Callable[..., str], options: tuple[str, ...], named: str
) -> None:
    assert named in refuse(write(tmp_path / "theirs", *eagle3(place), "model.safetensors"), *options)


# --- files


class Command:
    """A pickle that runs one."""

    def __init__(self, command: str):
        self._command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


@pytest.mark.parametrize("kind", ["adapter", "head"])
def test_a_pickle_that_wants_more_than_tensors(
    place: Path, tmp_path: Path, refuse: Callable[..., str], kind: str
) -> None:
    config, tensors = official(place) if kind == "adapter" else eagle3(place)
    trace = tmp_path / "ran"
    folder = write(tmp_path / "theirs", config, tensors | {"more": Command(f"touch {trace}")}, "pytorch_model.bin")  # type: ignore[dict-item]
    options = ("--exit-layer", "1") if kind == "adapter" else ()
    told = refuse(folder, *options)
    assert "asks for more than tensors" in told
    assert "system" in told
    assert not trace.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "text", "folder"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_files(place: Path, tmp_path: Path, refuse: Callable[..., str], file: str, damage: str) -> None:
    folder = write(tmp_path / "theirs", *eagle3(place), file)
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(
            {
                "cut": content[: len(content) // 2],
                "empty": b"",
                "noise": bytes(range(256)) * 40,
                "text": b"not weights",
            }[damage]
        )
    assert ("no weights in" if damage == "folder" else "is damaged") in refuse(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_that_were_changed(tmp_path: Path, zipped: bool) -> None:
    """Whatever a damaged pickle comes to, it is tensors, or refused in one line."""
    (tmp_path / "config.json").write_text("{}")
    path, told = tmp_path / "pytorch_model.bin", list[str]()
    torch.save({"a.weight": torch.ones(4, 4), "d2t": torch.arange(5)}, path, _use_new_zipfile_serialization=zipped)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(3):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            assert all(isinstance(value, Tensor) for value in read_checkpoint(tmp_path).tensors.values())
        except AdapterError as error:
            told.append(str(error))
    assert len(told) > 50
    assert not any("\n" in line for line in told)


@pytest.mark.parametrize("config", ["{", "[]", "3", '{"draft_vocab_size": NaN}', "\udcff"])
def test_damaged_configs(place: Path, tmp_path: Path, refuse: Callable[..., str], config: str) -> None:
    folder = write(tmp_path / "theirs", *eagle3(place), "model.safetensors")
    (folder / "config.json").write_bytes(config.encode(errors="surrogateescape"))
    assert "config.json" in refuse(folder)


def test_folders_that_are_none_of_these(place: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert "nothing to import in" in refuse(tmp_path / "nowhere")
    assert "nothing to import in" in refuse(tmp_path)
    assert "is a folder of this library already (adapter)" in refuse(place / "adapter", "--exit-layer", "1")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"draft_vocab_size": DRAFTED}))
    assert "no weights in" in refuse(tmp_path / "bare")


def test_an_output_that_exists(place: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    folder = write(tmp_path / "theirs", *eagle3(place), "model.safetensors")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    (tmp_path / "a file").touch()
    for output in (tmp_path / "taken", tmp_path / "a file"):
        assert "not an empty folder" in refuse(folder, output=output)
    assert "cannot write" in refuse(folder, output=tmp_path / "a file" / "made")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--data", "DATA"), "give --exit-layer (LayerSkip's 7B model: 8 of 32)"),
        (("--data", "DATA", "--exit-layer", "4"), "exit layer must be in 0..3"),
        (("--data", "DATA", "--exit-layer", "1", "--taps", "1,2,3"), "--taps does not apply"),
        (("--data", "EMPTY", "--exit-layer", "1"), "there is no text in"),
        (("--data", "LONG", "--exit-layer", "1"), "no document has a prompt that leaves 64 tokens"),
        (("--exit-layer", "1"), "give text to fit it on: --data"),
    ],
)
def test_models(place: Path, tmp_path: Path, refuse: Callable[..., str], options: tuple[str, ...], named: str) -> None:
    (tmp_path / "data.txt").write_text("Where would you like to eat tonight?")
    (tmp_path / "empty.txt").write_text("\n\n\n")
    (tmp_path / "long.txt").write_text("Where would you like to eat tonight? " * 1500)
    files = {name.upper(): str(tmp_path / f"{name}.txt") for name in ("data", "empty", "long")}
    given = [files.get(option, option) for option in options]
    assert named in refuse(place / "target", *given)


def test_a_model_is_its_own_target(place: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    other = save_chat_model(tmp_path / "other", seed=3) / "target"
    told = refuse(other, "--exit-layer", "1", target=place / "target")
    assert "is its own target: leave --target out" in told


def test_a_drafter_needs_a_target(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "theirs", *eagle3(place), "model.safetensors")
    assert invoke("import", str(folder), "--output", str(tmp_path / "made")) == 2
    assert "say which model it drafts for: --target" in capsys.readouterr().err

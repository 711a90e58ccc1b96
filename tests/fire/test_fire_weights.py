"""Tensors, calibrations and datastores that lie: every bit that is flipped, and every shape that is wrong, is found."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import Refused
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from kangaroo.decoder import load
from kangaroo.documents import Document
from kangaroo.drafters.copying.datastore import KIND, Datastore, build_datastore
from kangaroo.drafters.eagle3.head import Eagle3Config, Eagle3Head
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.calibration import Calibration
from kangaroo.drafters.medusa.heads import MedusaConfig
from kangaroo.errors import AdapterError, ConfigError, DataError, KangarooError
from kangaroo.loading import load_tokenizer
from tiny import make_adapter, target

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_adapter(target("llama")).save(tmp_path, {})
    return tmp_path


def replace_weights(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Other tensors, with the digest that belongs to them."""
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


NORM = "layers.0.norm_in.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.update({NORM: t[NORM][:-1].clone()}), "is of shape [31], not [32]"),
        (lambda t: t.update({NORM: t[NORM][None].clone()}), "is of shape [1, 32], not [32]"),
        (lambda t: t.update({NORM: torch.tensor(1.0)}), "is of shape [], not [32]"),
        (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), "float8"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int64)}), "int64"),
        (lambda t: t.update({NORM: t[NORM].bool()}), "bool"),
        (lambda t: t.update({NORM: t[NORM].to(torch.complex64)}), "complex64"),
        (lambda t: t.update({NORM: t[NORM] * math.nan}), "not finite"),
        (lambda t: t.update({NORM: t[NORM].double().fill_(1e300)}), "not finite"),
        (lambda t: t.pop(NORM), "missing or unexpected"),
        (lambda t: t.update({"x": torch.zeros(0)}), "missing or unexpected"),
        (lambda t: t.clear(), "missing or unexpected"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[Tensors], Any], named: str, folder: Path) -> None:
    replace_weights(folder, change)
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder, target("llama"))
    assert named in str(caught.value)


def test_sizes_beyond_the_targets_are_refused_before_memory_is_taken(folder: Path) -> None:
    """Such memory could not be had: whoever tries is told so by torch."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"draft_vocabulary": 10**14}))
    with pytest.raises(ConfigError, match="at most the target's"):
        Adapter.load(folder, target("llama"))
    with pytest.raises(ConfigError, match="1 to 63 heads"):
        MedusaConfig(heads=10**14)
    own = {"low": 0, "middle": 1, "high": 2, "key_value_heads": 1, "head_dim": 8, "epsilon": 1e-6}
    for sizes in ({"heads": 10**14, "intermediate_size": 8}, {"heads": 1, "intermediate_size": 10**14}):
        with pytest.raises(ConfigError, match="features, but the target has"):
            Eagle3Head(target("llama"), Eagle3Config(**own, **sizes))


def test_a_threshold_of_one_is_not_damage(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"threshold": 1}))
    assert Adapter.load(folder, target("llama")).config.threshold == 1.0


@pytest.mark.parametrize(
    "values",
    [
        {"after_right": -1},
        {"after_right": 1e308},
        {"after_right": None},
        {"after_right": "0.5"},
        {"after_right": True},
        {"confidence": [0.1, 2.0]},
        {"confidence": [0.1, 10**400]},
        {"after_right": math.nan},
        {"confidence": [0.5, 0.1]},
        {"confidence": ["0.1", "0.2"]},
        {"right": [0.9, 0.1]},
        {"right": [0.1]},
        {"right": []},
        {"right": [[0.1], [0.2]]},
        {"right": 5},
    ],
    ids=str,
)
def test_calibrations_that_are_no_chances(values: dict[str, Any], tmp_path: Path) -> None:
    table = {"confidence": [0.1, 0.9], "right": [0.2, 0.8], "after_right": 0.5}
    (tmp_path / "calibration.json").write_text(json.dumps(table))
    assert Calibration.load(tmp_path).after_right == 0.5
    (tmp_path / "calibration.json").write_text(json.dumps(table | values))
    with pytest.raises(AdapterError, match="damaged"):
        Calibration.load(tmp_path)


# --- datastores


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Any:
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def built(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "x.rest"
    texts = ["Where would you like to eat tonight?", "The answer is 42, naïve café."]
    build_datastore([Document("d", text=text) for text in texts], tokenizer, path)
    return path


def rewrite(path: Path, there: Path, change: Callable[[dict[str, str], dict[str, Any]], Any]) -> Path:
    with safe_open(path, framework="np") as file:
        facts = file.metadata()
        arrays = {name: file.get_tensor(name) for name in ("tokens", "order")}
    change(facts, arrays)
    save_arrays(arrays, there, metadata=facts)
    return there


def test_every_bit_of_a_datastore_counts(built: Path, tokenizer: Any, tmp_path: Path) -> None:
    """One of every byte, each in turn: header, facts and arrays alike."""
    whole, path = built.read_bytes(), tmp_path / "x.rest"
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            opened = Datastore.open(path, tokenizer, 300)
        except DataError:
            continue
        # Spaces that pad the header say nothing.
        assert whole[at : at + 1] == b" ", f"a flip in byte {at} was not found: {whole[max(0, at - 20) : at + 20]!r}"
        del opened


@pytest.mark.parametrize(
    "change",
    [
        lambda facts, arrays: arrays.update(tokens=np.zeros_like(arrays["tokens"])),
        lambda facts, arrays: arrays.update(order=np.zeros_like(arrays["order"])),
        lambda facts, arrays: facts.pop("digest"),
        lambda facts, arrays: facts.pop("version"),
        lambda facts, arrays: facts.pop("vocab_size"),
        lambda facts, arrays: facts.update(vocab_size="-1"),
        lambda facts, arrays: facts.update(vocab_size="9" * 5000),
        lambda facts, arrays: facts.update(vocab_size="0"),
        lambda facts, arrays: facts.update(version="x"),
        lambda facts, arrays: facts.update(version="0"),
        lambda facts, arrays: facts.update(version="1", vocab_size="70000"),
        lambda facts, arrays: facts.update(version="1") or arrays.update(order=arrays["order"] + 10_000),
        lambda facts, arrays: facts.update(version="1") or arrays.update(order=arrays["order"].astype(np.int64)),
        lambda facts, arrays: facts.update(version="1") or arrays.update(tokens=arrays["tokens"][:-1]),
        lambda facts, arrays: arrays.update(tokens=arrays["tokens"][:0], order=arrays["order"][:0]),
        lambda facts, arrays: arrays.pop("order"),
        lambda facts, arrays: arrays.update(tokens=arrays["tokens"].astype(np.float32)),
    ],
)
def test_datastores_that_lie(change: Callable[..., Any], built: Path, tokenizer: Any, tmp_path: Path) -> None:
    path = rewrite(built, tmp_path / "x.rest", change)
    with pytest.raises(DataError, match="datastore build"):
        Datastore.open(path, tokenizer, 300)


def test_a_datastore_from_before_digests_can_still_be_read(built: Path, tokenizer: Any, tmp_path: Path) -> None:
    def older(facts: dict[str, str], arrays: dict[str, Any]) -> None:
        facts.pop("digest")
        facts["version"] = "1"

    opened = Datastore.open(rewrite(built, tmp_path / "x.rest", older), tokenizer, 300)
    assert opened.documents == 2
    assert KIND


# --- models


def test_weights_that_lack_a_tensor_are_not_made_up(copy: Path, refused: Refused) -> None:
    path = copy / "target" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    ask = ("generate", "--drafter", "none", "--prompt", "x", "--model", str(copy / "target"))
    assert "model.layers.2.mlp.up_proj.weight" in refused(*ask)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"vocab_size": 301}, "do not fit its config: 'lm_head.weight' is ["),
        ({"num_attention_heads": 3}, "attention heads"),
        ({"hidden_size": 48}, "do not fit its config"),
        ({"hidden_size": 0}, "do not fit its config"),
        ({"num_hidden_layers": 9}, "missing"),
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers"),
        ({"vocab_size": -5}, "-5"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"max_position_embeddings": 0}, "context"),
        ({"max_position_embeddings": 7}, "context"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_its_weights(
    values: dict[str, Any], named: str, copy: Path, refused: Refused
) -> None:
    path = copy / "target" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert named in refused("generate", "--drafter", "none", "--prompt", "x", "--model", str(copy / "target"))


def test_a_longest_text_that_is_no_number(copy: Path, refused: Refused) -> None:
    path = copy / "target" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "x"}))
    assert "model_max_length" in refused("generate", "--drafter", "none", "--prompt", "x", "--model", str(path.parent))


@pytest.mark.parametrize("end", [2**63, -1, [5, 2**31], "x", 1.5, True])
def test_ends_that_are_no_tokens(end: Any, copy: Path, refused: Refused) -> None:
    path = copy / "target" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": end}))
    refused("generate", "--drafter", "none", "--prompt", "x", "--model", str(copy / "target"))


def test_bits_of_an_adapters_settings_are_found_or_change_no_text(copy: Path) -> None:
    """Its weights are known by a digest; how it drafts decides nothing about the text."""
    Calibration((0.1, 0.5, 0.9), (0.2, 0.5, 0.9), after_right=0.6).save(copy / "adapter")
    plain = load(str(copy / "target"), drafter="none", dtype="float64")
    settings = {"stop": "auto", "draft_cost": 0.1, "start_cost": 0.0}
    wanted, found, harmless = plain.generate(["Where would you"], max_tokens=8)[0].tokens, 0, 0
    for name in ("config.json", "calibration.json", "adapter.safetensors"):
        path = copy / "adapter" / name
        whole = path.read_bytes()
        for at in range(0, len(whole), len(whole) // 60):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            try:
                drafting = plain.with_drafter("kangaroo", adapter=copy / "adapter", **settings)
            except KangarooError:
                found += 1
                continue
            assert name != "adapter.safetensors", f"a flip in byte {at} was not found"
            harmless += 1
            assert drafting.generate(["Where would you"], max_tokens=8)[0].tokens == wanted
        path.write_bytes(whole)
    assert found > 100
    assert harmless > 5


def output_weight(adapter: Adapter) -> torch.Tensor:
    return adapter.layers[0].attention.o_proj.weight


def test_a_save_cut_short_at_any_step_leaves_the_old_weights_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = target("llama")
    old, new = make_adapter(model), make_adapter(model, scale=0.5)
    steps = 0
    for broken in range(1, 20):
        with monkeypatch.context() as patch:
            old.save(tmp_path, {})
            count, move = 0, os.replace

            def killed(source: Any, there: Any, move: Any = move) -> None:
                nonlocal count, steps
                count += 1
                if count == broken:  # noqa: B023 (called before the next turn)
                    raise KeyboardInterrupt
                move(source, there)

            patch.setattr(os, "replace", killed)
            try:
                new.save(tmp_path, {})
            except KeyboardInterrupt:
                steps += 1
        found = output_weight(Adapter.load(tmp_path, model))
        assert any(torch.allclose(found, output_weight(made)) for made in (old, new))
        if count < broken:
            break
    assert steps == 3  # weights, config, weights into place
    assert torch.allclose(found, output_weight(new))

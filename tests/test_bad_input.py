"""What users get wrong: one clear line, of the right kind, and nothing done by halves."""

import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import kangaroo.cache
import kangaroo.model
from kangaroo.decode import start
from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo.tree import KangarooTree, TreeConfig
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import AdapterError, CapacityError, ConfigError, DataError, KangarooError, ModelError
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from oracle import GREEDY
from runs import PROMPTS
from tiny import EXIT, LAYERS, VOCAB, WIDTH, build, make_adapter, target


def refusal(kind: type[KangarooError], act: Callable[[], object]) -> str:
    """The message of the error that an act must cause: of exactly this kind, on one line."""
    with pytest.raises(KangarooError) as caught:
        act()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message
    assert "\n" not in message
    return message


# --- settings


@pytest.mark.parametrize("exit_layer", [-1, LAYERS, 99])
def test_an_exit_layer_out_of_range(exit_layer: int) -> None:
    model = target("llama")
    for act in (
        lambda: Adapter(model, AdapterConfig(exit_layer=exit_layer)),
        lambda: Kangaroo(model, None, exit_layer, ChainConfig()),
        lambda: KangarooTree(model, None, exit_layer, TreeConfig()),
    ):
        assert f"0..{LAYERS - 1}" in refusal(ConfigError, act)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ChainConfig(max_draft=0), "max_draft"),
        (lambda: ChainConfig(threshold=1.1), "threshold"),
        (lambda: ChainConfig(threshold=float("nan")), "threshold"),
        (lambda: TreeConfig(top_k=0), "top_k"),
        (lambda: TreeConfig(top_k=10, max_draft=7), "63"),
        (lambda: TreeConfig(threshold=-0.1), "threshold"),
        (lambda: AdapterConfig(exit_layer=1, variant="two-layers"), "two-layers"),  # type: ignore[arg-type]
        (lambda: Sampling(temperature=-1), "temperature"),
        (lambda: Sampling(temperature=float("nan")), "temperature"),
    ],
)
def test_settings_out_of_range_are_named(make: Callable[[], object], named: str) -> None:
    assert named in refusal(ConfigError, make)


def test_an_unknown_rule() -> None:
    message = refusal(ConfigError, lambda: start(target("llama"), NoDrafter(), [Request([1], GREEDY, 1)], rule="hope"))
    assert "match" in message
    assert "hope" in message


# --- requests


@pytest.mark.parametrize(
    ("request_", "kind", "named"),
    [
        (Request([], GREEDY, 4), DataError, "empty"),
        (Request([1] * 128, GREEDY, 4), DataError, "128"),
        (Request([1] * 500, GREEDY, 4), DataError, "context"),
        (Request([1, VOCAB], GREEDY, 4), DataError, "vocabulary"),
        (Request([-1], GREEDY, 4), DataError, "vocabulary"),
        (Request([1], GREEDY, 0), ConfigError, "max_tokens"),
        (Request([1], GREEDY, -3), ConfigError, "max_tokens"),
        (Request([1], Sampling(logit_bias={VOCAB: 1.0}), 4), ConfigError, "logit_bias"),
    ],
)
def test_one_bad_request_refuses_the_batch_by_name(request_: Request, kind: type[KangarooError], named: str) -> None:
    good = [Request(prompt, GREEDY, 4) for prompt in PROMPTS]
    assert named in refusal(kind, lambda: start(target("llama"), NoDrafter(), [*good, request_]))


def test_no_requests_at_all() -> None:
    assert "no prompts" in refusal(DataError, lambda: start(target("llama"), NoDrafter(), []))


def test_a_batch_that_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with the sizes, before any of it is allocated."""
    monkeypatch.setattr(kangaroo.cache, "available_bytes", lambda device: 40_000)
    allocated: list[object] = []
    monkeypatch.setattr(kangaroo.model, "KVCache", lambda *args: allocated.append(args))
    message = refusal(CapacityError, lambda: start(target("llama"), NoDrafter(), [Request([1] * 20, GREEDY, 50)] * 9))
    assert "9 rows of 71 tokens" in message
    assert "40 kB" in message
    assert not allocated


def test_a_newcomer_that_does_not_fit_its_row() -> None:
    state = start(target("llama"), NoDrafter(), [Request([1] * 5, GREEDY, 5)])
    assert "10" in refusal(CapacityError, lambda: state.assign(0, Request([1] * 6, GREEDY, 5)))
    state.assign(0, Request([1] * 6, GREEDY, 4))


# --- targets


def damaged(value: float, where: Callable[[PreTrainedModel], torch.Tensor]) -> PreTrainedModel:
    model = build("mixtral")
    where(model)[:] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "where",
    [
        lambda m: m.model.embed_tokens.weight[90, :1],
        lambda m: m.model.layers[1].self_attn.q_proj.weight[0],
        lambda m: m.model.layers[4].mlp.experts.down_proj[3, 0, :1],  # seldom used, so no trial run finds it
        lambda m: m.model.norm.weight[:1],
        lambda m: m.lm_head.weight[5],
    ],
    ids=["embedding", "attention", "expert", "norm", "head"],
)
def test_weights_that_are_not_finite(where: Callable[[PreTrainedModel], torch.Tensor], value: float) -> None:
    assert "values that are not finite" in refusal(ModelError, lambda: Target(damaged(value, where)))


def test_an_attention_implementation_that_ignores_masks() -> None:
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "sdpa" in refusal(ModelError, lambda: Target(model))


# --- adapters


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(target("llama")).save(folder, {"recipe": "none"})
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    for file in pristine.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    Adapter.load(tmp_path, target("llama"))
    return tmp_path


def load(folder: Path, model: Target | None = None) -> Adapter:
    return Adapter.load(folder, model or target("llama"))


def test_an_adapter_of_another_target(folder: Path) -> None:
    """Other weights, even in one layer only; other widths and vocabularies by their numbers."""
    other = build("llama")
    other.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    assert "another target" in refusal(AdapterError, lambda: load(folder, Target(other)))
    assert "another target" in refusal(AdapterError, lambda: load(folder, target("mistral")))
    wide = Target(build("llama", hidden_size=2 * WIDTH))
    assert f"width {WIDTH}, but the target has {2 * WIDTH}" in refusal(AdapterError, lambda: load(folder, wide))
    more = Target(build("llama", vocab_size=VOCAB + 3))
    assert f"vocab_size {VOCAB}, but the target has {VOCAB + 3}" in refusal(AdapterError, lambda: load(folder, more))


def test_the_same_target_in_another_precision_is_the_same(folder: Path) -> None:
    assert load(folder, Target(build("llama").float())).config == AdapterConfig(exit_layer=EXIT)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter.safetensors").unlink()
    assert "no weights at" in refusal(AdapterError, lambda: load(folder))
    assert "no adapter in" in refusal(AdapterError, lambda: load(tmp_path / "nowhere"))


def test_pickles_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    for name in ("adapter_model.bin", "adapter.pt"):
        other = tmp_path / name.replace(".", "-")
        other.mkdir()
        (other / name).write_bytes(pickle.dumps(Trap()))
        assert f"{name} is a pickle" in refusal(AdapterError, lambda other=other: load(other))
    (folder / "adapter.safetensors").write_bytes(pickle.dumps(Trap()))
    assert "damaged" in refusal(AdapterError, lambda: load(folder))
    assert not (tmp_path / "sprung").exists()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_weights_with_any_bit_flipped_or_cut_anywhere(folder: Path, pristine: Path, share: float, bit: int) -> None:
    whole = (pristine / "adapter.safetensors").read_bytes()
    at = int(share * len(whole))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << bit
    for content in (bytes(flipped), whole[:at], whole + b"\0"):
        (folder / "adapter.safetensors").write_bytes(content)
        assert "damaged" in refusal(AdapterError, lambda: load(folder))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_config_with_a_bit_flipped_never_ends_in_another_kind_of_error(
    folder: Path, pristine: Path, share: float, bit: int
) -> None:
    content = bytearray((pristine / "config.json").read_bytes())
    content[int(share * len(content))] ^= 1 << bit
    (folder / "config.json").write_bytes(content)
    with contextlib.suppress(AdapterError, ConfigError):
        load(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"exit_layer": "2"}, "exit_layer"),
        ({"exit_layer": True}, "exit_layer"),
        ({"width": None}, "width"),
        ({"target_fingerprint": 5}, "target_fingerprint"),
        ({"weights_sha256": "0" * 64}, "damaged"),
        ({"variant": "full-layer"}, "does not fit its config"),
    ],
)
def test_a_config_that_was_tampered_with(folder: Path, change: dict[str, Any], named: str) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | change))
    assert named in refusal(AdapterError, lambda: load(folder))
    (folder / "config.json").write_text("[]")
    assert "damaged" in refusal(AdapterError, lambda: load(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapter_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    adapter = make_adapter(target("llama"))
    adapter.norm_out.weight[3] = value
    adapter.save(tmp_path, {})
    assert "'norm_out.weight' holds values that are not finite" in refusal(AdapterError, lambda: load(tmp_path))


def test_an_adapter_that_lacks_a_tensor_or_has_one_too_many(folder: Path) -> None:
    for change in (lambda t: t.pop("layers.0.norm_in.weight"), lambda t: t.update(extra=torch.zeros(1))):
        tensors = load_file(folder / "adapter.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter.safetensors")
        refusal(AdapterError, lambda: load(folder))


def test_a_save_that_fails_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of writing: what was there is still there and still loads."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kangaroo.weights.save_file", full)
    adapter = make_adapter(target("llama"), scale=0.5)
    with pytest.raises(CapacityError, match="No space left"):
        adapter.save(folder, {})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    load(folder)

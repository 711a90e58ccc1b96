"""What others trained, made usable here: files in the originals' layout come out as what this library drafts with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign import DRAFTED, QUESTIONS, eagle3, official, speculators, write
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kangaroo
from chat_model import save_chat_model
from command import invoke
from kangaroo.documents import prompts, read_documents
from kangaroo.drafters.chain import top_probability
from kangaroo.drafters.eagle3.head import Eagle3Head
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.calibration import calibrate
from kangaroo.drafters.kangaroo.exit_calibration import ExitCalibration
from kangaroo.errors import AdapterError, ConfigError
from kangaroo.exchange import fitting

TEXT = [
    "Where would you like to eat tonight? I need 3 tickets to Oakland.",
    "The answer is 42, naïve café. Where would you like to eat?",
    "I need 3 tickets to Oakland. The answer is 42.",
]
LITTLE = ("--prompts", "4", "--max-tokens", "12", "--temperature", "0", "--batch", "4", "--dtype", "float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_chat_model(tmp_path_factory.mktemp("import"))
    rows = [json.dumps({"text": text}) for text in TEXT]
    (folder / "text.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(autouse=True)
def _little_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kangaroo.bench.check.MINIMUM_TOKENS", 40)


def run_import(place: Path, folder: Path, output: Path, *more: str) -> int:
    return invoke("import", str(folder), "--target", str(place / "target"), "--output", str(output), *more)


def same_text(decoder: kangaroo.Decoder) -> int:
    """How many drafts are accepted, in a text that is the model's own."""
    answers = decoder.generate(QUESTIONS, max_tokens=24)
    assert [a.tokens for a in answers] == [a.tokens for a in decoder.plain().generate(QUESTIONS, max_tokens=24)]
    return answers[0].stats.accepted + answers[1].stats.accepted


# --- adapters of the Kangaroo release


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_an_adapter_of_the_release(place: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "release", *official(place), file)
    assert run_import(place, folder, tmp_path / "made", "--exit-layer", "1") == 0
    told = capsys.readouterr()
    assert f"--adapter {tmp_path / 'made'}" in told.out
    assert "texts of up to 512 tokens" in told.err
    assert "not calibrated" in told.err
    got, want = (load_file(path / "adapter.safetensors") for path in (tmp_path / "made", place / "adapter"))
    assert got.keys() == want.keys()
    assert all(torch.equal(value, want[name].half()) for name, value in got.items())
    facts = json.loads((tmp_path / "made" / "config.json").read_text())
    assert facts["provenance"]["imported_from"] == "release"
    options = ("--model", str(place / "target"), *LITTLE)
    assert invoke("check", *options, "--adapter", str(tmp_path / "made"), "--set", "threshold=0") == 0
    decoder = kangaroo.load(place / "target", adapter=tmp_path / "made", threshold=0.0)
    assert decoder.make_drafter().model.exit_layer == 1  # type: ignore[attr-defined]
    assert same_text(decoder) > 0


def test_text_calibrates_an_adapter(place: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "release", *official(place), "pytorch_model.bin")
    options = ("--exit-layer", "1", "--data", str(place / "text.jsonl"))
    assert run_import(place, folder, tmp_path / "made", *options) == 0
    decoder = kangaroo.load(
        place / "target", adapter=tmp_path / "made", stop="auto", draft_cost=0.1, node_cost=0.0, start_cost=0.0
    )
    same_text(decoder)
    adapter = Adapter.load(tmp_path / "made", decoder.target)
    assert adapter.config.exit_layer == 1
    assert (tmp_path / "made" / "calibration.json").is_file()


# --- models for early exit


def test_a_model_gets_a_calibration_of_early_exit(place: Path, tmp_path: Path) -> None:
    made, data = tmp_path / "made", str(place / "text.jsonl")
    assert invoke("import", str(place / "target"), "--exit-layer", "2", "--data", data, "--output", str(made)) == 0
    plain = kangaroo.load(place / "target", drafter="none")
    found = ExitCalibration.load(made, plain.target)
    assert found.exit_layer == 2
    costs = {"draft_cost": 0.1, "node_cost": 0.0, "start_cost": 0.0}
    decoder = plain.with_drafter("early-exit", calibration=made, stop="auto", **costs)
    assert decoder.make_drafter().model.exit_layer == 2  # type: ignore[attr-defined]
    assert decoder.make_drafter().nodes == 11
    same_text(decoder)
    with pytest.raises(ConfigError, match="is of exit layer 2, not 1"):
        plain.with_drafter("early-exit", calibration=made, exit_layer=1)
    with pytest.raises(ConfigError, match="needs calibrated confidences"):
        plain.with_drafter("early-exit", exit_layer=1, stop="auto")
    assert plain.with_drafter("early-exit", calibration=made, exit_layer=2, threshold=0.5).make_drafter().nodes == 7


@torch.inference_mode()
def test_the_calibration_is_what_the_models_own_text_says(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers' generation and hidden states."""
    monkeypatch.setattr(fitting, "TOKENS", 10)
    monkeypatch.setattr(fitting, "BATCH", 2)
    decoder = kangaroo.load(place / "target", drafter="none", dtype="float64", exact=False)
    documents = list(read_documents(place / "text.jsonl"))
    got = fitting.fit_calibration(decoder, documents, exit_layer=1)
    model = AutoModelForCausalLM.from_pretrained(place / "target", dtype=torch.float64)
    confidence, right = list[float](), list[bool]()
    for prompt in prompts(documents, decoder.tokenizer.wrapped, seed=0):
        text = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)
        states = model(text, output_hidden_states=True).hidden_states[1]
        logits = model.lm_head(model.model.norm(states))[0, len(prompt) - 1 : -1]
        right += (logits.argmax(-1) == text[0, len(prompt) :]).tolist()
        confidence += top_probability(logits[None])[0].tolist()
    want = calibrate(confidence, right)
    assert got.confidence == pytest.approx(want.confidence)
    assert (got.right, got.after_right) == (pytest.approx(want.right), pytest.approx(want.after_right))
    assert 0 < sum(right) < len(right)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"exit_layer": 9}, "exit layer must be in"),
        ({"exit_layer": "two"}, "exit_layer must be a whole number"),
        ({"target_fingerprint": None}, "'target_fingerprint' should be"),
        ({"target_fingerprint": "a-b-c"}, "another target"),
    ],
)
def test_a_calibration_that_was_tampered_with(
    place: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    plain = kangaroo.load(place / "target", drafter="none")
    ExitCalibration(1, calibrate([0.5], [True])).save(tmp_path, plain.target, {})
    path = tmp_path / "early_exit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=named) as caught:
        plain.with_drafter("early-exit", calibration=tmp_path, stop="auto")
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(AdapterError, match="no calibration of early exit in"):
        plain.with_drafter("early-exit", calibration=tmp_path)


def test_a_calibration_of_a_relative_does_if_it_is_told_to(place: Path, tmp_path: Path) -> None:
    plain = kangaroo.load(place / "target", drafter="none")
    ExitCalibration(1, calibrate([0.5], [True])).save(tmp_path, plain.target, {})
    path = tmp_path / "early_exit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_fingerprint": "a-b-c"}))
    same_text(plain.with_drafter("early-exit", calibration=tmp_path, allow_other_target=True))


# --- EAGLE-3 heads


@pytest.mark.parametrize("layout", ["release", "speculators"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_head_in_either_layout(place: Path, tmp_path: Path, layout: str, file: str) -> None:
    config, tensors = eagle3(place)
    written = speculators(config, tensors) if layout == "speculators" else (config, tensors)
    assert run_import(place, write(tmp_path / "theirs", *written, file), tmp_path / "made") == 0
    decoder = kangaroo.load(place / "target", dtype="float32", drafter="eagle3", eagle3=tmp_path / "made")
    head = Eagle3Head.load(tmp_path / "made", decoder.target)
    assert head.config.taps == (2, 2, 1)
    assert head.vocabulary is not None
    assert torch.equal(head.vocabulary.tokens, tensors["d2t"] + torch.arange(DRAFTED))
    for name, theirs in (("fc", "fc"), ("layer.self_attn.q_proj", "midlayer.self_attn.q_proj"), ("norm", "norm")):
        assert torch.equal(head.state_dict()[f"{name}.weight"], tensors[f"{theirs}.weight"])
    assert same_text(decoder) > 0
    assert same_text(decoder.with_drafter("eagle3-tree", top_k=4, max_draft=3, nodes=20)) > 0


def test_a_head_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    assert run_import(place, write(tmp_path / "theirs", *eagle3(place), "pytorch_model.bin"), made) == 0
    assert f"--drafter eagle3 --eagle3 {made}" in capsys.readouterr().out
    options = ("--model", str(place / "target"), "--eagle3", str(made))
    for drafter in ("eagle3", "eagle3-tree"):
        assert invoke("check", *options, *LITTLE, "--drafter", drafter) == 0
    capsys.readouterr()
    assert invoke("info", *options, "--drafter", "eagle3", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["features_after_layers"] == [2, 2, 1]
    assert facts["draft_vocabulary"] == DRAFTED
    assert facts["head_parameters"] > 0


def test_precisions_are_kept(place: Path, tmp_path: Path) -> None:
    config, tensors = eagle3(place)
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    assert run_import(place, write(tmp_path / "theirs", config, half, "pytorch_model.bin"), tmp_path / "made") == 0
    kinds = {name: value.dtype for name, value in load_file(tmp_path / "made" / "eagle3.safetensors").items()}
    assert kinds.pop("vocabulary.tokens") == torch.int64
    assert set(kinds.values()) == {torch.float16}


@pytest.mark.parametrize(
    ("said", "options", "taps"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [2, 2, 1]}, (), [2, 2, 1]),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 1, 0]}}, (), [2, 2, 1]),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, ("--taps", "1,2,4"), [1, 2, 4]),
        ({}, ("--taps", "0,2,3"), [0, 2, 3]),
    ],
)
def test_which_states_a_head_reads(
    place: Path, tmp_path: Path, said: dict[str, object], options: tuple[str, ...], taps: list[int]
) -> None:
    config, tensors = eagle3(place)
    folder = write(tmp_path / "theirs", config | said, tensors, "model.safetensors")
    assert run_import(place, folder, tmp_path / "made", *options) == 0
    facts = json.loads((tmp_path / "made" / "config.json").read_text())
    assert [facts["low"], facts["middle"], facts["high"]] == taps


def test_speculators_counts_layers(place: Path, tmp_path: Path) -> None:
    config, tensors = speculators(*eagle3(place))
    config["eagle_aux_hidden_state_layer_ids"] = [0, 1, 3]
    assert run_import(place, write(tmp_path / "theirs", config, tensors, "model.safetensors"), tmp_path / "made") == 0
    facts = json.loads((tmp_path / "made" / "config.json").read_text())
    assert [facts["low"], facts["middle"], facts["high"]] == [0, 1, 3]


def test_a_folder_appears_whole_or_not_at_all(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the last of its files cannot be written."""
    folder = write(tmp_path / "release", *official(place), "pytorch_model.bin")

    def fail(*_: object, **__: object) -> None:
        assert list((tmp_path / "deep").iterdir()), "something has been written by now"
        raise ConfigError("no more")

    monkeypatch.setattr("kangaroo.exchange.importing.fit_calibration", fail)
    options = ("--exit-layer", "1", "--data", str(place / "text.jsonl"))
    assert run_import(place, folder, tmp_path / "deep" / "made", *options) == 2
    assert not list((tmp_path / "deep").iterdir())
    shutil.rmtree(tmp_path / "deep")

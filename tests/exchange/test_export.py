"""`kangaroo export`: folders that other engines load, and the lines that start them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat_model import save_chat_model
from command import invoke
from kangaroo.decoder import load
from kangaroo.exchange.export import export
from kangaroo.exchange.launch import ENGINES, Drafting, launch
from little_model import ADAPTER, TARGET

PROMPTS = ["Where would you like", "I need a table for four people at"]
LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def run_example(text: str) -> dict[str, Any]:
    """Run the Python that a README shows."""
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found
    names: dict[str, Any] = {}
    exec(found[1], names)
    return names


def test_a_readme_for_transformers_says_what_works(folder: Path, tmp_path: Path, capsys: Any) -> None:
    export(folder / "adapter", "transformers", tmp_path / "draft", model=str(folder / "target"))
    names = run_example((tmp_path / "draft" / "README.md").read_text())
    drafts = names["assistant"].generation_config
    assert (drafts.num_assistant_tokens, drafts.num_assistant_tokens_schedule) == (6, "constant")
    assert drafts.assistant_confidence_threshold == 0.6
    assert capsys.readouterr().out


def test_transformers_runs_the_hub_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    export(folder / "adapter", "hub", tmp_path / "hub", model=str(folder / "target"))
    names = run_example((tmp_path / "hub" / "README.md").read_text())
    model, inputs, again = names["model"], names["inputs"], {"trust_remote_code": True, "max_new_tokens": 24}
    plain = model.generate(**inputs, max_new_tokens=24)
    assert torch.equal(names["output"][:, : plain.shape[1]], plain)
    for drafter in ("kangaroo", "kangaroo-tree"):
        again |= {"custom_generate": str(tmp_path / "hub"), "drafter": drafter, "settings": {"max_draft": 2}}
        assert torch.equal(model.generate(**inputs, **again), plain)
    both = torch.cat([inputs["input_ids"]] * 2)
    assert torch.equal(model.generate(both, **again), torch.cat([plain] * 2))
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**inputs, **again | {"trust_remote_code": False})
    assert (tmp_path / "hub/custom_generate/requirements.txt").read_text().startswith("kangaroo-decoding>=")


class Counted:
    """How often a model has run."""

    def __init__(self, model: Any):
        self.runs = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.runs += 1


def test_assisted_generation_with_the_draft_writes_the_targets_text_and_accepts_as_much_as_ours(tmp_path: Path) -> None:
    export(ADAPTER, "transformers", tmp_path / "draft", model=str(TARGET))
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    assistant = AutoModelForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float32)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.assistant_confidence_threshold = 0.0
    tokenizer, counted = AutoTokenizer.from_pretrained(TARGET), Counted(target)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH}
    prompts = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    texts = [target.generate(**prompt, **options, assistant_model=assistant)[0] for prompt in prompts]
    theirs = LENGTH * len(PROMPTS) / counted.runs
    decoder = load(TARGET, adapter=ADAPTER, dtype=torch.float32, max_draft=3, threshold=0.0, exact=False)
    tokens = [prompt["input_ids"][0].tolist() for prompt in prompts]
    answers = [decoder.generate([one], max_tokens=LENGTH, min_tokens=LENGTH)[0] for one in tokens]
    # The prompt's pass gives an answer's first token here, and a whole round there.
    ours = sum(len(answer.tokens) - 1 for answer in answers) / sum(answer.stats.rounds for answer in answers)
    for prompt, text in zip(prompts, texts, strict=True):
        assert torch.equal(target.generate(**prompt, **options)[0], text)
    assert theirs > 1.5
    assert theirs == pytest.approx(ours, rel=0.05), (theirs, ours)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_launch_line_names_target_and_draft_and_the_flags_that_matter(engine: str) -> None:
    draft = Drafting(target="my target", folder=Path("d"), dtype="bfloat16", max_draft=6, threshold=0.55)
    how = launch(engine, draft)
    assert "'my target'" in how.text
    assert how.notes
    needed = {
        "vllm": ['"num_speculative_tokens": 3', '"method": "draft_model"', "VLLM_USE_V2_MODEL_RUNNER=0"],
        "sglang": ["STANDALONE", "--speculative-num-draft-tokens 4", "--speculative-eagle-topk 1"],
        "llama.cpp": ["--spec-type draft-simple", "--spec-draft-p-min 0.55", "-md d/draft.gguf"],
        "mlx": ["--draft-model d", "--num-draft-tokens 3"],
        "transformers": ["assistant_model=assistant"],
        "hub": ["trust_remote_code=True", "custom_generate='d'"],
    }
    joined = how.text.replace(" \\\n    ", " ")
    assert all(part in joined for part in needed[engine])


def test_the_command_line_shows_the_line_to_type(folder: Path, tmp_path: Path, capsys: Any) -> None:
    options = ("export", str(folder / "adapter"), "--model", str(folder / "target"))
    assert invoke(*options, "--for", "vllm", "--output", str(tmp_path / "a")) == 0
    shown = capsys.readouterr().out
    assert "vllm serve" in shown
    assert "bit for bit" in shown
    assert invoke(*options, "--for", "sglang", "--output", str(tmp_path / "b"), "--dtype", "bfloat16", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["proof"]["largest"] == 0
    assert facts["dtype"] == "bfloat16"
    assert facts["layers"] == 2
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--for": "vlllm"}, "--for must be one of"),
        ({"--output": "full"}, "not an empty folder"),
        ({"--output": "full/file"}, "not an empty folder"),
        ({"--dtype": "int3"}, "dtype must be one of"),
        ({"--for": "llama.cpp", "--dtype": "float64"}, "a GGUF file holds"),
        ({"--model": "nowhere/at/all"}, "no such folder"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    changes: dict[str, str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    options = {"--for": "vllm", "--output": "new", "--model": str(folder / "target")} | changes
    assert invoke("export", str(folder / "adapter"), *[word for pair in options.items() for word in pair]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


def test_an_adapter_of_another_target_is_refused_unless_asked_for(folder: Path, tmp_path: Path, capsys: Any) -> None:
    other = save_chat_model(tmp_path, seed=1) / "target"
    options = (
        "export",
        str(folder / "adapter"),
        "--for",
        "mlx",
        "--model",
        str(other),
        "--output",
        str(tmp_path / "d"),
    )
    assert invoke(*options) == 2
    assert "another target" in capsys.readouterr().err
    assert invoke(*options, "--allow-other-target") == 0
    assert (tmp_path / "d" / "model.safetensors").is_file()

"""The command line, run as a user runs it."""

import json
from pathlib import Path

import pytest

from chat_model import save_chat_model
from command import invoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def test_generate_streams_plain_text_when_not_on_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder / "target")
    assert (
        invoke(
            "generate",
            "--model",
            model,
            "--drafter",
            "early-exit",
            "--set",
            "exit_layer=1",
            "--prompt",
            "eat",
        )
        == 0
    )
    assert "\x1b[" not in capsys.readouterr().out


def test_a_file_of_prompts_is_answered_as_a_batch(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Where?\n\nThe answer\n")
    options = ("--model", str(folder / "target"), "--adapter", str(folder / "adapter"), "--max-tokens", "8", "--json")
    assert invoke("generate", *options, "--prompts", str(prompts)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [answer["prompt"] for answer in found["answers"]] == ["Where?", "The answer"]
    assert found["stats"]["emitted"] == sum(len(answer["tokens"]) for answer in found["answers"])
    assert invoke("generate", *options, "--prompt", "Where?") == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["answers"][0]["tokens"] == found["answers"][0]["tokens"]


def test_several_answers_of_a_least_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("generate", "--model", str(folder / "target"), "--drafter", "none", "--prompt", "eat", "--json")
    options = (*options, "--samples", "3", "--temperature", "1.5", "--max-tokens", "9", "--min-tokens", "9")
    assert invoke(*options) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert len({tuple(answer["tokens"]) for answer in answers}) == 3
    assert {(len(a["tokens"]), a["finish_reason"], a["stopped_by"]) for a in answers} == {(9, "length", None)}
    assert invoke(*options, "--ignore-eos") == 0
    assert invoke(*options, "--min-tokens", "10") == 2
    assert "min_tokens" in capsys.readouterr().err


def test_check_passes_on_a_lossless_drafter_and_fails_below_the_least_that_means_anything(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("check", "--model", str(folder / "target"), "--drafter", "early-exit", "--set", "exit_layer=1", "--json")
    options = (*options, "--set", "threshold=0.02", "--temperature", "0", "--batch", "4")
    assert invoke(*options, "--prompts", "50", "--max-tokens", "42", "--dtype", "float64") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lossless"]
    report = found["drafters"]["early-exit"]
    assert report["tokens"] >= 2000
    assert report["rounds"]["none"] > 0
    assert report["rounds"]["all"] + report["rounds"]["some"] > 0
    assert invoke(*options, "--prompts", "2", "--max-tokens", "4") == 1
    found = json.loads(capsys.readouterr().out)
    assert "tokens were compared" in found["drafters"]["early-exit"]["problem"]


def test_check_of_all_drafters_says_which_it_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("check", "--drafter", "all", "--model", str(folder / "target"), "--draft-model", str(folder / "target"))
    options = (*options, "--temperature", "0", "--batch", "2", "--prompts", "2", "--max-tokens", "6")
    assert invoke(*options, "--json", "--dtype", "float64") == 1  # too few tokens to mean anything
    found = json.loads(capsys.readouterr().out)
    assert {"draft-model", "prompt-lookup", "llma", "early-exit"} <= found["drafters"].keys()
    assert found["left_out"]["kangaroo"] == "needs --adapter"
    assert not any(report["differences"] for report in found["drafters"].values())
    assert invoke(*options, "--set", "max_draft=2") == 2
    assert "--set belongs to one drafter" in capsys.readouterr().err


def test_info_says_what_drafting_costs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("info", "--model", str(folder / "target"), "--adapter", str(folder / "adapter"), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["exit_layer"] == 1
    assert facts["adapter_parameters"] == 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32
    assert facts["draft_step_share"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x", "--model", "/nothing/here"], "cannot load"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature must be"),
        (["generate", "--prompt", "x", "--temperature", "nan"], "temperature must be"),
        (["generate", "--prompt", "x", "--drafter", "early-exit", "--set", "exit_layer=99"], "exit layer must be"),
        (["generate", "--prompt", "", "--drafter", "none"], "empty"),
        (["generate", "--prompt", "x", "--drafter", "none", "--max-tokens", "0"], "max_tokens must be"),
        (["generate", "--prompts", "/nothing/here", "--drafter", "none"], "no prompt file"),
        (["generate", "--prompt", "x", "--drafter", "medusa9"], "drafter must be"),
        (["generate", "--prompt", "x", "--dtype", "int3"], "--dtype must be"),
        (["train", "/nothing/here.toml", "--data", "/nothing"], "no recipe"),
    ],
)
def test_user_mistakes_are_one_line_and_exit_code_2(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if arguments[0] == "generate" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(folder / "target")]
    assert invoke(*arguments) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_compare_sets_every_drafter_beside_plain_decoding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", str(folder / "target"), "--adapter", str(folder / "adapter"), "--dtype", "float64")
    options = (*options, "--max-tokens", "12", "--repeats", "1")
    assert invoke("compare", "Where would", *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    lines = {line["method"]: line for line in found["drafters"]}
    assert next(iter(lines)) == "none"
    assert {"kangaroo", "kangaroo-tree", "kangaroo+lookup", "early-exit", "prompt-lookup", "llma"} <= lines.keys()
    assert found["identical"]
    assert all(line["tokens"] == lines["none"]["tokens"] for line in lines.values())
    for line in lines.values():
        assert line["accepted"] == len(line["tokens"]) - line["rounds"] <= line["drafted"]
        assert line["prefill"] + line["draft"] + line["verify"] + line["rest"] == pytest.approx(line["seconds"])
    assert lines["none"]["drafted"] == 0
    assert invoke("compare", "Where would", *options, "--temperature", "0.8") == 0
    shown = capsys.readouterr().out
    assert "identical" in shown
    assert "left out: rest (needs --datastore)" in shown
    assert invoke("compare", *options) == 2


@pytest.mark.parametrize(("verb", "section"), [("bench", "[quick]"), ("train", "[synthesis]")])
def test_help_shows_names_of_sections(verb: str, section: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(verb, "--help") == 0
    assert section in capsys.readouterr().out

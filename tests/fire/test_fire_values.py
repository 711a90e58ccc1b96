"""Settings, samplings and prompts that cannot be: refused where they are given."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Refused

from command import invoke
from kangaroo import load
from kangaroo.decode import decode, start
from kangaroo.decoder import Decoder
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.errors import CapacityError, ConfigError, DataError, KangarooError
from kangaroo.sampling import Sampler, Sampling
from kangaroo.state import Request
from kangaroo.stops import StopString
from oracle import GREEDY
from runs import DRAFTERS
from tiny import EXIT, VOCAB, make_adapter, target

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def decoder(model: str) -> Decoder:
    return load(model, drafter="none")


# --- settings of drafters


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("threshold=abc", "threshold must be a number"),
        ("threshold=nan", "threshold must be a number"),
        ("threshold=true", "threshold must be a number"),
        ("max_draft=2.5", "max_draft must be a whole number"),
        ("max_draft=nan", "max_draft must be a whole number"),
        ("max_draft=99999999999999999999", "max_draft must not be beyond"),
        ("max_draft=" + "9" * 5000, "max_draft must be"),
        ("exit_layer=1.5", "exit_layer must be a whole number"),
        ("exit_layer=x", "exit_layer must be a whole number"),
        ("stop=maybe", "stop must be one of"),
        ("draft_cost=cheap", "draft_cost must be a number"),
    ],
)
def test_settings_of_the_wrong_type(setting: str, named: str, model: str, refused: Refused) -> None:
    given = ("--drafter", "early-exit", "--set", setting)
    assert named in refused("generate", "--model", model, "--prompt", "x", "--max-tokens", "2", *given)


@pytest.mark.parametrize("name", ["kangaroo", "kangaroo-auto", "draft-model", "early-exit", "prompt-lookup"])
def test_a_draft_is_never_longer_than_a_row_has_room_for(name: str) -> None:
    """However long it may be: 100,000 tokens of draft for 6 of answer took gigabytes."""
    model = target("llama")
    plain, drafter = DRAFTERS["none"](model), DRAFTERS.get(name, DRAFTERS["kangaroo"])(model)
    expected = [done.emitted for done in decode(model, plain, start(model, plain, [Request([1, 2, 3], GREEDY, 6)]))]
    drafter.nodes = 100_001  # type: ignore[misc]
    state = start(model, drafter, [Request([1, 2, 3], GREEDY, 6)])
    assert state.cache.slots <= 2 * 65
    got = [done.emitted for done in decode(model, drafter, state)]
    assert [t for r in got for t in r[0]] == [t for r in expected for t in r[0]]


def test_an_absurd_max_draft_drafts_the_same_text() -> None:
    model = target("llama")
    requests = [Request([1, 2, 3], GREEDY, 30), Request([5] * 60, GREEDY, 6)]
    texts = []
    for longest in (29, 2**31 - 1):
        drafter = Kangaroo(model, make_adapter(model), EXIT, ChainConfig(max_draft=longest, threshold=0))
        texts.append([done.emitted for done in decode(model, drafter, start(model, drafter, requests))])
    assert texts[0] == texts[1]


def test_what_does_not_fit_names_the_setting_that_asks_for_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kangaroo.cache.available_bytes", lambda device: 100)
    model = target("llama")
    drafter = Kangaroo(model, None, EXIT, ChainConfig(max_draft=10_000))
    with pytest.raises(CapacityError) as caught:
        start(model, drafter, [Request([1] * 20, GREEDY, 100)])
    assert any("max_draft" in note for note in caught.value.__notes__)


def test_threads_beyond_what_can_be_started(model: str, refused: Refused) -> None:
    given = ("--model", model, "--drafter", "none", "--prompt", "x", "--threads")
    assert "--threads must be in 1..1024" in refused("generate", *given, "100000")


# --- samplings


def draw(sampling: Sampling, logits: torch.Tensor) -> list[int]:
    sampler = Sampler([sampling], logits.shape[-1], CPU)
    prefix: Any = None  # without penalties, nothing looks back
    positions = torch.arange(logits.shape[1])[None]
    return sampler.draw(logits, prefix, positions)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_top_p_that_rounds_to_nothing_keeps_the_best(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 50, 97, dtype=dtype)
    assert draw(Sampling(temperature=1.0, top_p=1e-46), logits) == logits[0].argmax(-1).tolist()
    assert draw(Sampling(temperature=1.0, top_k=1), logits) == logits[0].argmax(-1).tolist()


def test_a_bias_that_forbids_every_token() -> None:
    everything = dict.fromkeys(range(VOCAB), -math.inf)
    with pytest.raises(ConfigError, match="forbids every token"):
        Sampler([Sampling(logit_bias=everything)], VOCAB, CPU)
    del everything[5]
    assert draw(Sampling(logit_bias=everything), torch.randn(1, 3, VOCAB)) == [5, 5, 5]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": math.nan}, "top_k"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": "0"}, "min_p"),
        ({"seed": 0.0}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"index": -1}, "index"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logit_bias": {5: "1"}}, "logit_bias"),
        ({"logit_bias": {5: math.nan}}, "logit_bias"),
        ({"logit_bias": {5: 1e39}}, "logit_bias"),
        ({"logit_bias": {1.5: 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"presence_penalty": 1e39}, "presence_penalty"),
        ({"frequency_penalty": -1e39}, "frequency_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"repetition_penalty": 10**400}, "repetition_penalty"),
    ],
)
def test_samplings_that_cannot_be(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Sampling(**values)


# --- requests


@pytest.mark.parametrize("max_tokens", [None, 1.5, math.nan, "5", True, 2**64])
def test_max_tokens_that_are_no_number_of_tokens(decoder: Decoder, max_tokens: Any) -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        decoder.generate(["x"], max_tokens=max_tokens)


@pytest.mark.parametrize(
    "prompt",
    [
        5,
        None,
        "\ud800",
        [],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": "\udfff"}],
        [{"role": 1, "content": "x"}],
        ["x"],
        {"role": "user"},
        "x" * 10_000_001,
    ],
    ids=lambda prompt: repr(prompt)[:30],
)
def test_prompts_that_are_none(decoder: Decoder, prompt: Any) -> None:
    with pytest.raises(DataError) as caught:
        decoder.generate([prompt], max_tokens=2)
    assert len(str(caught.value)) < 300


TEMPLATES = {
    "syntax": "{% for %}",
    "refusal": "{{ raise_exception('no\nsuch role') }}",
    "undefined": "{{ messages[0].content.nothing.at.all }}",
    "type": "{{ messages + 1 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "division": "{{ 1 // 0 }}",
    "index": "{{ [].pop() }}",
    "range": "{% for i in range(1000000000) %}x{% endfor %}",
    "filter": "{{ messages | nonsense }}",
    "key": "{{ {}['x']['y'] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_that_fail(decoder: Decoder, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder.tokenizer.wrapped, "chat_template", TEMPLATES[name])
    with pytest.raises(DataError, match="chat template refuses") as caught:
        decoder.generate([[{"role": "user", "content": "x"}]], max_tokens=2)
    assert "\n" not in str(caught.value)


# --- stop strings


def test_stop_strings_are_found_in_linear_time() -> None:
    """Steps are counted, as a clock depends on who else is running."""

    class Counted(str):
        compared = 0

        def __getitem__(self, place: Any) -> str:
            Counted.compared += 1
            return str.__getitem__(self, place)

    stop = StopString("a" * 20_000 + "b")
    stop.stop = Counted(stop.stop)
    for _ in range(200):
        assert stop.read("a" * 99 + "c") is None
    assert Counted.compared <= 3 * 200 * 100
    assert stop.read("a" * 30_000 + "b!") == 30_001


# --- command lines


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "--prompt", "x", "--prompts", "y"], "--prompt or --prompts, not both"),
        (["generate", "--json"], "a chat has none"),
        (["generate", "--nonsense"], "No such option"),
        (["generate", "--max-tokens", "x"], "--max-tokens"),
        (["nonsense"], "No such command"),
        (["generate", "--prompt", "x", "--set", "allow_other_target=7"], "allow_other_target must be true or false"),
        (["check", "--prompts", "-1"], "--prompts"),
        (["demo", "--prompts", "0"], "--prompts"),
        (["loadtest", "http://\udcff"], "is no address of a server"),
        (["loadtest", "http://127.0.0.1:99999999"], "there is no port 99999999"),
        (["import", "x", "--output", "y", "--taps", "1,2," + "9" * 5000], "--taps takes three numbers"),
        (["train"], "name a recipe"),
        (["report", "--nonsense"], "No such option"),
        (["--", "nonsense"], "No such command"),
        (["datastore", "build"], "Missing argument"),
        (["generate", "--samples", "2"], "a chat has one"),
        (["generate", "--prompt", "x", "--model", "/nonexistent"], "no such folder"),
        (["generate", "--prompt", "x", "--model", "a/b/c"], "no such folder"),
        (["generate", "--prompt", "x", "--model", ""], "cannot load"),
        (["generate", "--prompt", "\udcff", "--drafter", "none"], "surrogate"),
    ],
)
def test_command_lines_that_cannot_be(arguments: list[str], named: str, model: str, refused: Refused) -> None:
    if arguments[0] == "generate" and "--model" not in arguments:
        arguments = [*arguments, "--model", model]
    assert named in refused(*arguments)


def test_errors_say_nothing_twice_and_end_on_their_line(model: str, refused: Refused, tmp_path: Path) -> None:
    line = refused("generate", "--model", model, "--prompt", "x", "--drafter", "rest", "--datastore", "a\nb")
    assert "\n" not in line
    assert issubclass(CapacityError, KangarooError)


def test_a_chat_that_overruns_the_context_goes_on_without_what_was_too_much(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter(["Where?", "word " * 2000, "Why?", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert invoke("generate", "--model", model, "--drafter", "none", "--max-tokens", "3") == 0
    shown = capsys.readouterr().err
    assert "the context holds" in " ".join(shown.split())
    assert "left out" in shown
    assert shown.count("per round") == 2


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("--version") == 0
    assert capsys.readouterr().out.startswith("kangaroo ")

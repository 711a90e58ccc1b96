"""Structured output: with every drafter the text of plain constrained decoding, and what the grammar describes."""

import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor

from chat_model import SENTENCES, save_chat_model
from command import invoke
from kangaroo.decoder import Decoder
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import ConfigError, ModelError
from kangaroo.forced import forcing
from kangaroo.grammar import (
    FAR,
    Grammar,
    grammar_from_response_format,
    grammar_from_structured_outputs,
)
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.text import Tokenizer
from kangaroo.training.target import train_tokenizer
from oracle import GREEDY, Rule, oracle
from runs import DRAFTERS, generate
from scripted import ScriptedDrafter
from tiny import build

llguidance = pytest.importorskip("llguidance", reason="needs the grammar extra")
from_tokenizer = pytest.importorskip("llguidance.hf").from_tokenizer

HALF = "\ud800"
BEYOND = 305
"""Entries of the model: a few more than the tokenizer has tokens."""
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "toast"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
TWICE: dict[str, Any] = {"type": "array", "items": {"const": "three tickets"}, "minItems": 3, "maxItems": 3}
"""Repeats itself, for drafters that copy."""
CHOICES = ("Oakland", "Oak", "naïve café", 'a "quoted" one')
HOT = Sampling(temperature=1.3, top_k=200, top_p=0.98, seed=5)
SAMPLINGS = pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
TOKENS = 90
PROMPT = [70, 71, 72, 73, 80, 81, 75]
CHOSEN = ["none", "kangaroo-fixed", "kangaroo", "kangaroo-tree", "early-exit-tree", "kangaroo+lookup"]
CHOSEN += ["prompt-lookup", "draft-model"]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(SENTENCES, vocab_size=300, context=1024))


@cache
def target() -> Target:
    return Target(build("llama", vocab_size=BEYOND))


@cache
def grammar(kind: str) -> Grammar:
    rules: dict[str, dict[str, Any]] = {
        "person": {"json_schema": PERSON},
        "twice": {"json_schema": json.dumps(TWICE)},
        "regex": {"regex": r"[a-d]{3}(-\d{2}){1,4}!"},
        "choice": {"choice": CHOICES},
        "lark": {"lark": 'start: "(" start ")" | "e"'},
    }
    return Grammar(tokenizer(), ends(), **rules[kind])


def ends() -> tuple[int, ...]:
    return (tokenizer().wrapped.eos_token_id,)


@cache
def retold(kind: str) -> Rule:
    """The same rules without memory: a matcher that reads the whole output anew for every token."""
    schema = {"person": PERSON, "twice": TWICE}.get(kind)
    matcher = llguidance.LLMatcher
    if schema is not None:
        own = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        rules = matcher.grammar_from_json_schema(json.dumps(schema), overrides=own)
    elif kind == "regex":
        rules = matcher.grammar_from_regex(r"[a-d]{3}(-\d{2}){1,4}!")
    elif kind == "choice":
        rules = matcher.grammar_from_regex("|".join(map(re.escape, CHOICES)))
    else:
        rules = matcher.grammar_from_lark('start: "(" start ")" | "e"')
    vocabulary = from_tokenizer(tokenizer().wrapped, eos_token=list(ends()))

    def rule(prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
        fresh = matcher(vocabulary, rules)
        assert fresh.consume_tokens(list(output))
        allowed = torch.frombuffer(bytearray(fresh.compute_logit_bias()), dtype=torch.uint8) > 0
        known = torch.zeros(len(scores), dtype=torch.bool)
        known[: len(allowed)] = allowed
        return scores.masked_fill(~known, -torch.inf)

    return rule


def expected(kind: str, sampling: Sampling, tokens: int = TOKENS, prompt: Sequence[int] = PROMPT) -> list[int]:
    rule = retold(kind)
    # Without an end the reference would be asked what follows one.
    text: list[int] = []
    while len(text) < tokens and not (text and text[-1] in ends()):
        text = oracle(target().model, prompt, sampling, len(text) + 1, ends(), rule)
    return text


def text_of(tokens: Sequence[int]) -> str:
    return tokenizer().decode(tokens)


def check(kind: str, text: str) -> None:
    """Raise if a finished text is not what its grammar describes."""
    if kind in ("person", "twice"):
        jsonschema.validate(json.loads(text), PERSON if kind == "person" else TWICE)
    elif kind == "choice":
        assert text in CHOICES
    else:
        assert re.fullmatch(r"[a-d]{3}(-\d{2}){1,4}!" if kind == "regex" else r"\(*e\)*", text)
        assert text.count("(") == text.count(")")


@SAMPLINGS
@pytest.mark.parametrize("drafter", CHOSEN)
def test_a_batch_under_different_grammars_is_plain_constrained_decoding(drafter: str, sampling: Sampling) -> None:
    kinds = ("person", "choice", "regex", "twice", "person")
    prompts = (PROMPT, PROMPT, [9, 8], [70, 71], PROMPT[:3])
    work = [Request(p, sampling, TOKENS, processor=grammar(k)) for p, k in zip(prompts, kinds, strict=True)]
    work.append(Request(PROMPT, sampling, 20))
    run = generate(target(), DRAFTERS[drafter](target()), work, ends())
    for kind, prompt, text in zip(kinds, prompts, run.texts, strict=False):
        assert text == expected(kind, sampling, prompt=prompt)
        if text[-1] in ends():
            check(kind, text_of(text))
    assert sum(text[-1] in ends() for text in run.texts[:5]) >= 4, "most should finish"
    assert run.texts[5] == oracle(target().model, PROMPT, sampling, 20, ends())
    if drafter != "none":
        assert sum(run.accepted) > 0


@pytest.mark.parametrize("branches", [1, 3], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", ["person", "lark"])
def test_drafts_right_and_wrong_are_judged_by_the_grammar(kind: str, branches: int) -> None:
    want = expected(kind, HOT, 40)
    drafter = ScriptedDrafter([[*PROMPT, *want]], (3, 0, 4, 1), 4, 300, branches)
    run = generate(target(), drafter, [Request(PROMPT, HOT, 40, processor=grammar(kind))], ends())
    assert run.texts == [want]
    assert {0, 3} <= set(run.accepted) or len(want) < 8


def test_each_alone_through_the_decoder_and_what_it_reports() -> None:
    decoder = Decoder(target(), NoDrafter, tokenizer(), ends())
    found = decoder.generate(["I need"], n=6, sampling=HOT, max_tokens=TOKENS, processor=grammar("person"))
    finished = [answer for answer in found if answer.finish_reason == "stop"]
    assert len(finished) >= 3
    assert len({answer.text for answer in finished}) > 1
    for answer in finished:
        check("person", answer.text)
        assert answer.stopped_by in ends()


def test_whatever_a_choice_allows_ends_as_one_of_the_choices_and_all_can_be_reached() -> None:
    rules, found, random = grammar("choice"), set[str](), torch.Generator().manual_seed(0)
    for _ in range(60):
        walk: list[int] = []
        while not (walk and walk[-1] in ends()):
            allowed = (rules([], walk, torch.zeros(BEYOND)) > -1).nonzero()[:, 0]
            walk.append(int(allowed[torch.randint(len(allowed), (1,), generator=random)]))
        found.add(text_of(walk))
    assert found == set(CHOICES)


def test_an_output_is_followed_from_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read over a long text, drafts and refusals included, is a few times its length, not its square."""
    rules, read = Grammar(tokenizer(), ends(), regex="[a-z]{400}"), list[int]()
    import kangaroo.grammar as module

    honest = module._Followed.go_to

    def counted(self: Any, output: tuple[int, ...], vocab_size: int) -> None:
        read.append(len(output) - self.shared(output))
        honest(self, output, vocab_size)

    monkeypatch.setattr(module._Followed, "go_to", counted)
    texts = [[[69, 70, 71][(i * (row + 1)) % 3] for i in range(300)] for row in range(3)]
    scores = torch.zeros(BEYOND)
    for length in range(0, 300, 3):
        for text in texts:  # rows that share a grammar, each with a draft of five and a wrong branch
            for ahead in range(5):
                rules([], text[: length + ahead], scores.clone())
                rules([], [*text[:length], 72, *text[length : length + ahead]], scores.clone())
    assert sum(read) < 60 * 3 * 300 / 3 + 6 * FAR * FAR


def test_ends_come_where_the_grammar_permits_and_are_forced_where_nothing_else_is() -> None:
    rules, word = grammar("choice"), tokenizer().wrapped("Oak")["input_ids"]

    def allowed(output: Sequence[int]) -> set[int]:
        return set((rules([], output, torch.zeros(BEYOND)) > -1).nonzero()[:, 0].tolist())

    end, land = ends()[0], tokenizer().wrapped("land")["input_ids"]
    assert end not in allowed([])
    assert end in allowed(word)
    assert len(allowed(word)) > 1
    assert allowed([*word, *land]) == {end}
    assert allowed([*word, end]) == {end}, "for who writes on past an end"
    assert allowed([*word, BEYOND - 1]) == allowed([3, 3]) == set(range(BEYOND)), "nodes that will be refused"
    assert allowed([]) <= set(range(300)), "entries beyond the tokenizer's are no text"


def test_forced_tokens_are_what_the_grammar_leaves_no_choice_about() -> None:
    rules = grammar("person")

    def tokens(text: str) -> list[int]:
        return list(tokenizer().wrapped(text)["input_ids"])

    assert text_of(rules.go_on([])) == '{"name": "'
    assert text_of(rules.go_on([], tokens('{"na'))) == '{"name": "'
    assert text_of(rules.go_on([], [*tokens('{"name": "ab'), 3, *tokens("c")])) == '{"name": "ab'
    assert text_of(rules.go_on(tokens('{"name": "a", "'), [])) == 'age": '
    assert text_of(rules.go_on(tokens('{"name": "a", "'), tokens("old"))) == 'age": '
    last = tokens('{"name": "a", "age": 1, "likes": ["tea"')
    assert rules.go_on(last, [*tokens("]}"), *ends(), 70]) == [*tokens("]}"), *ends()]
    assert rules.go_on(last, [*ends(), 70]) == []
    assert rules.go_on(last, tokens("]")) == [*tokens("]}"), *ends()], "where it is complete it has to end"
    assert rules.go_on([3, 3], [70]) == rules.go_on([*last, *tokens("]}"), *ends()], [70]) == []


@SAMPLINGS
@pytest.mark.parametrize("drafter", CHOSEN)
def test_forced_tokens_save_rounds_and_change_nothing(drafter: str, sampling: Sampling) -> None:
    kinds = ("person", "twice", None, "regex")
    work = [Request(PROMPT, sampling, TOKENS if k else 9, processor=k and grammar(k)) for k in kinds]
    made = DRAFTERS[drafter]
    plain = generate(target(), made(target()), work, ends())
    helped = generate(target(), forcing(lambda: made(target()), target())(), work, ends())
    assert helped.texts == plain.texts
    alone = [generate(target(), forcing(lambda: made(target()), target())(), [request], ends()) for request in work]
    assert [run.rounds[0] for run in alone] == helped.rounds, "a row depends on itself alone"
    if drafter == "none":
        assert helped.rounds == plain.rounds, "plain decoding stays plain"
    elif "tree" not in drafter:
        assert sum(map(len, helped.rounds)) < sum(map(len, plain.rounds))
        assert helped.rounds[2] == plain.rounds[2]
    if drafter == "prompt-lookup":
        assert len(helped.rounds[1]) <= 3, "nearly all of it is forced"


def test_min_tokens_and_a_complete_grammar_leave_nothing() -> None:
    work = [Request(PROMPT, GREEDY, 40, min_tokens=30, processor=grammar("choice"))]
    with pytest.raises(ConfigError, match="forbids every token"):
        generate(target(), NoDrafter(), work, ends())


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({}, "got none"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice"),
        ({"json_schema": {"type": "foo"}}, "Invalid type: foo"),
        ({"json_schema": {"not": {}}}, "Unimplemented keys"),
        ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 3}}, "Unsatisfiable"),
        ({"json_schema": {"$ref": "http://127.0.0.1:9/none"}}, "not present in a registry"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": {"const": {1, 2}}}, "not JSON"),
        ({"json_schema": {"const": float("nan")}}, "not JSON"),
        ({"json_schema": [1]}, "must be an object"),
        ({"json_schema": '{"items":' * 5000 + "{}" + "}" * 5000}, "json_schema"),
        ({"json_schema": {"const": 10**400}}, "out of range"),
        ({"json_schema": '{"items":' * 200 + "{}" + "}" * 200}, "json_schema cannot be compiled"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"regex": "["}, "unclosed"),
        ({"regex": r"[^\s\S]"}, "no text at all"),
        ({"regex": 3}, "is a text"),
        ({"choice": []}, "list of texts"),
        ({"choice": "yes"}, "list of texts"),
        ({"choice": ["a", 1]}, "list of texts"),
        ({"lark": "start: foo"}, "unknown name"),
        *((rules, "surrogate") for rules in ({"regex": HALF}, {"choice": [HALF]}, {"lark": HALF})),
        ({"json_schema": {"const": HALF}}, "json_schema cannot be compiled"),
    ],
)
def test_grammars_that_cannot_be(rules: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)) as caught:
        Grammar(tokenizer(), ends(), **rules)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_tokenizers_that_cannot_be_and_models_without_an_end() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    words = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    with pytest.raises(ModelError, match="tokenizer"):
        Grammar(Tokenizer(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b")), [1], regex="a")
    with pytest.raises(ConfigError, match="ends the text"):
        Grammar(tokenizer(), [], regex="a")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="grammar extra"):
        Grammar(tokenizer(), ends(), regex="a")


def test_a_grammar_that_turns_out_too_complex_ends_its_own_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(target(), lambda: DRAFTERS["kangaroo-fixed"](target()), tokenizer(), ends())
    rules, honest = Grammar(tokenizer(), ends(), json_schema=PERSON), Grammar._follow

    def limited(self: Grammar, output: tuple[int, ...]) -> Any:
        if self is rules and len(output) > 5:
            raise ConfigError("too complex to be followed further")
        return honest(self, output)

    monkeypatch.setattr(Grammar, "_follow", limited)
    with decoder.engine(rows=3) as engine:
        kept = engine.submit([9, 8], max_tokens=TOKENS, processor=grammar("regex"))
        failed = engine.submit(PROMPT, max_tokens=TOKENS, processor=rules)
        with pytest.raises(ConfigError, match="too complex"):
            list(failed)
        assert [piece.token for piece in kept] == expected("regex", GREEDY, prompt=[9, 8])


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, schema = save_chat_model(tmp_path), tmp_path / "schema.json"
    schema.write_text(json.dumps(PERSON))
    options = ["generate", "--model", str(folder / "target"), "--adapter", str(folder / "adapter"), "--json"]

    def answer(*given: str) -> str:
        assert invoke(*options, "--prompt", "Where?", "--max-tokens", "90", *given) == 0
        return str(json.loads(capsys.readouterr().out)["answers"][0]["text"])

    jsonschema.validate(json.loads(answer("--json-schema", str(schema))), PERSON)
    assert re.fullmatch("[ab]{3}", answer("--regex", "[ab]{3}"))
    assert answer("--choice", "tea", "--choice", "toast") in ("tea", "toast")
    for wrong, named in (
        (("--regex", "a", "--choice", "b"), "--regex and --choice"),
        (("--regex", "("), "unclosed"),
        (("--json-schema", str(tmp_path / "none.json")), "none.json"),
    ):
        assert invoke(*options, "--prompt", "Where?", *wrong) == 2
        said = capsys.readouterr().err
        assert named in said
        assert said.count("\n") == 1


# --- as requests to a server ask for it


def test_response_formats() -> None:
    def made(asked: Any) -> Any:
        return grammar_from_response_format(asked, tokenizer(), ends())

    assert made({"type": "text"}) is None
    strict = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    assert text_of(made(strict).go_on([])) == '{"name": "'
    object_only = made({"type": "json_object"})
    assert (object_only([], [], torch.zeros(BEYOND)) > -1).sum() < 10
    for wrong, named in (
        ({}, "response_format.type"),
        ({"type": "xml"}, "'xml'"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}, "Invalid type"),
        ("json_object", "must be an object"),
    ):
        with pytest.raises(ConfigError, match=re.escape(named)):
            made(wrong)


def test_structured_outputs() -> None:
    def made(asked: Any) -> Grammar:
        return grammar_from_structured_outputs(asked, tokenizer(), ends())

    assert [made({name: value}).kind for name, value in (("json", PERSON), ("regex", "a"), ("choice", ["a"]))] == [
        "json_schema",
        "regex",
        "choice",
    ]
    assert made({"grammar": 'start: "a"', "regex": None}).kind == "lark"
    assert made({"json_object": True}).kind == "json_schema"
    for wrong in ({}, {"regex": "a", "choice": ["b"]}, {"structural_tag": "x"}, {"json_object": False}):
        with pytest.raises(ConfigError, match="structured_outputs"):
            made(wrong)

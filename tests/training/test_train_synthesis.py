"""Text that the target writes itself, both sides of it, so that a run needs no data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lesson
import pytest
from lesson import Lesson, dotted
from tokenizers import AddedToken

from command import invoke
from kangaroo.documents import read_documents
from kangaroo.drafters.medusa.heads import MedusaHeads
from kangaroo.errors import ConfigError, DataError
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.training.report import Update
from kangaroo.training.run import load_target, train
from kangaroo.training.synthesis import ANSWERED, SAMPLED, SYNTHESISED, Frame, Synthesis, cut
from oracle import oracle

MakeLesson = Callable[..., Lesson]

SMALL = {
    "synthesis__documents": 12,
    "synthesis__prompt_tokens": 14,
    "synthesis__max_tokens": 18,
    "synthesis__batch": 5,
}
# Like the templates of models with a standing instruction.
PREAMBLE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '<|system|>Be kind.' + eos_token }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# A template that marks turns with ordinary text.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


class Killed(BaseException):
    """Nothing catches it."""


def killed_at(stage: str, done: int) -> Callable[[Any], None]:
    def report(event: Any) -> None:
        if isinstance(event, Update) and (event.stage, event.done) == (stage, done):
            raise Killed

    return report


def synthesis(
    run: Lesson, report: Callable[[Any], None] = lambda _: None, tokenizer: Any = None, **overrides: Any
) -> Synthesis:
    """That of a run with SMALL settings, in float64, by a tokenizer of another template if one is given."""
    recipe = run.settings(**{**SMALL, **overrides})
    target, own = load_target(recipe)
    return Synthesis(Target(target.model.double()), tokenizer or own, recipe, report)


def with_template(template: str | None) -> Any:
    tokenizer = lesson.make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def alone(run: Lesson, *, resume: bool = False, report: Callable[[Any], None] = lambda _: None, **changes: Any) -> Path:
    """Train without data."""
    return train(run.recipe, overrides=dotted({**SMALL, **changes}), resume=resume, report=report)


def text_of(files: list[Path]) -> str:
    (path,) = files
    return path.read_text(encoding="utf-8")


# What is written


@pytest.mark.parametrize(("template", "answer_temperature"), [(None, 0.7), (PREAMBLE, 0.0)])
def test_turns_and_answers_are_the_targets_own(
    make_lesson: MakeLesson, template: str | None, answer_temperature: float
) -> None:
    tokenizer = with_template(template or lesson.make_tokenizer().chat_template)
    settings = {"synthesis__temperature": 0.9, "synthesis__answer_temperature": answer_temperature, "seed": 5}
    made = synthesis(make_lesson(), tokenizer=tokenizer, **settings)
    (path,) = made.files()
    model, specials = made.target.model, range(5)
    before = "<|begin|><|system|>Be kind.<|end|><|user|>" if template else "<|begin|><|user|>"
    first = tokenizer(before, add_special_tokens=False)["input_ids"]
    turns, whole = list[str](), list[bool]()
    for i in range(12):
        tokens = oracle(model, first, Sampling(temperature=0.9, seed=5, index=i), 14, eos=specials)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        whole.append(tokens[-1] in specials)
        turns.append(text.strip() if whole[-1] else cut(text))
    assert 0 < sum(whole) < 12, "some turns end by themselves and some are cut"
    expected = []
    for i, turn in enumerate(turn for turn in turns if turn):
        asked = [{"role": "user", "content": turn}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        sampling = Sampling(temperature=answer_temperature, seed=5, index=12 + i)
        answer = tokenizer.decode(oracle(model, prompt, sampling, 18, eos=[1]), skip_special_tokens=True).strip()
        if answer:
            expected.append([*asked, {"role": "assistant", "content": answer}])
    assert [document.messages for document in read_documents(path)] == expected
    assert len(expected) > 8


def test_text_does_not_depend_on_the_batch_but_on_the_seed(make_lesson: MakeLesson) -> None:
    hot = {"synthesis__answer_temperature": 1.0}
    texts = [text_of(synthesis(make_lesson(), synthesis__batch=batch, **hot).files()) for batch in (5, 32)]
    assert texts[0] == texts[1]
    other = text_of(synthesis(make_lesson(), seed=1, **hot).files())
    assert not {*other.splitlines()} & {*texts[0].splitlines()}


@pytest.mark.parametrize(("stage", "done", "torn"), [("ask", 5, SAMPLED), ("ask", 12, SAMPLED), ("reply", 5, ANSWERED)])
def test_killed_and_gone_on(make_lesson: MakeLesson, stage: str, done: int, torn: str) -> None:
    whole, run = text_of(synthesis(make_lesson()).files()), make_lesson()
    with pytest.raises(Killed):
        synthesis(run, killed_at(stage, done)).files()
    assert not (run.output / SYNTHESISED).exists()
    with (run.output / torn).open("a") as file:
        file.write("[12, 5")
    events: list[Update] = []
    assert text_of(synthesis(run, events.append).files()) == whole
    assert all(event.done > done for event in events if event.stage == stage), "what was there is not written again"
    assert [path.name for path in run.output.iterdir()] == [SYNTHESISED]


def test_what_is_there_is_taken_as_it_is(make_lesson: MakeLesson) -> None:
    run, events = make_lesson(), list[Update]()
    first = text_of(synthesis(run).files())
    assert text_of(synthesis(run, events.append, synthesis__batch=3).files()) == first
    assert not events
    for change in ({"seed": 2}, {"synthesis__max_tokens": 17}, {"synthesis__temperature": 0.8}):
        assert text_of(synthesis(run, events.append, **change).files()) != first
    tokenizer = with_template(PREAMBLE)
    assert synthesis(run, tokenizer=tokenizer).digest != synthesis(run).digest
    assert {event.stage for event in events} == {"ask", "reply"}


@pytest.mark.parametrize("begin", ["bos", "eos"])
def test_without_a_template_it_is_plain_text(make_lesson: MakeLesson, begin: str) -> None:
    tokenizer = with_template(None)
    if begin == "eos":
        tokenizer.bos_token = None
    overrides = {key: value for key, value in SMALL.items() if "prompt_tokens" not in key}
    recipe = make_lesson().settings(**overrides)
    target = Target(load_target(recipe)[0].model.double())
    (path,) = Synthesis(target, tokenizer, recipe, lambda _: None).files()
    first = {"bos": [0], "eos": [1]}[begin]
    written = [oracle(target.model, first, Sampling(temperature=1.0, index=i), 18, eos=range(5)) for i in range(12)]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in written]
    assert [d.text for d in read_documents(path)] == [text for text in dict.fromkeys(texts) if text]


# Where turns begin and end


@pytest.mark.parametrize(
    ("template", "before", "after", "stop"),
    [
        (lesson.make_tokenizer().chat_template, "<|begin|><|user|>", "<|end|><|assistant|>", ""),
        (PREAMBLE, "<|begin|><|system|>Be kind.<|end|><|user|>", "<|end|><|assistant|>", ""),
        (BRACKETS, "<|begin|>[INST] ", " [/INST]", "[/INST]"),
        (
            "{{ '### Ask:\n' + messages[0]['content'] + '\n\n### Say:\n' }}{{ eos_token }}",
            "### Ask:\n",
            "\n\n### Say:\n<|end|>",
            "### Say:",
        ),
        ("{{ 'Q: ' + messages[0]['content'] + '\nA: <|end|>' }}", "Q: ", "\nA: <|end|>", "A:"),
    ],
)
def test_parts_of_templates(template: str, before: str, after: str, stop: str) -> None:
    assert Frame.of(with_template(template)) == Frame(before, after, stop)


def test_space_before_the_turn_is_left_to_its_first_word(make_lesson: MakeLesson) -> None:
    made = synthesis(make_lesson(), tokenizer=with_template(BRACKETS))
    assert made.tokenizer.wrapped.decode(made.first) == "<|begin|>[INST]"


def test_ordinary_added_tokens_end_no_turn() -> None:
    tokenizer = with_template(BRACKETS)
    tokenizer.add_tokens([AddedToken("[/INST]", special=False)])
    assert Frame.of(tokenizer).stop == "[/INST]"
    tokenizer.add_special_tokens({"pad_token": AddedToken("[/INST]", special=True)})
    assert Frame.of(tokenizer).stop == ""


@pytest.mark.parametrize(
    ("text", "ended", "turn"),
    [
        (" What is it? And why ", True, "What is it? And why"),
        (" What is it? And wh", False, "What is it?"),
        ("Say it. [/INST] So be it. Or", False, "Say it."),
        ("Say [/INST] So be it.", False, "Say"),
        ("[/INST]", True, ""),
    ],
)
def test_turns_end_where_the_template_says(text: str, ended: bool, turn: str) -> None:
    assert Frame.of(with_template(BRACKETS)).turn(text, ended=ended) == turn


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two? Thr", "One. Two?"),
        ('He said "no." Then', 'He said "no."'),
        ("It costs 3.50 and mor", "It costs 3.50 and"),
        ("a list of wor", "a list of"),
        ("word", "word"),
        ("你好。再", "你好。"),
        (" \n", ""),
    ],
)
def test_what_breaks_off_is_cut(text: str, kept: str) -> None:
    assert cut(text) == kept


# The run


def test_trains_without_data_and_says_from_what(make_lesson: MakeLesson) -> None:
    run, events = make_lesson(), list[Any]()
    best = alone(run, report=events.append)
    stages = list(dict.fromkeys(event.stage for event in events if isinstance(event, Update)))
    assert stages == ["ask", "reply", "answer", "train", "evaluate"]
    provenance = json.loads((best / "config.json").read_text())["provenance"]
    assert provenance["sha256"]["data"] == synthesis(run).digest
    assert provenance["recipe"]["synthesis"]["documents"] == 12
    # The same documents, given as data, make the same adapter.
    given = make_lesson()
    again = train(given.recipe, [run.output / SYNTHESISED])
    assert given.rows() == run.rows()
    assert (again / "adapter.safetensors").read_bytes() == (best / "adapter.safetensors").read_bytes()


def test_killed_runs_resume_bit_for_bit(make_lesson: MakeLesson) -> None:
    whole, run = make_lesson(), make_lesson()
    alone(whole)
    with pytest.raises(Killed):
        alone(run, report=killed_at("reply", 5))
    with pytest.raises(Killed):
        alone(run, report=killed_at("train", 5))
    with pytest.raises(ConfigError, match=r"cannot resume: synthesis\.documents was 12 .* now it is 13"):
        alone(run, resume=True, synthesis__documents=13)
    events: list[Any] = []
    alone(run, resume=True, synthesis__batch=2, report=events.append)
    assert not {"ask", "reply"} & {event.stage for event in events if isinstance(event, Update)}
    assert run.rows() == whole.rows()


def test_target_without_a_template_learns_from_all_of_its_text(
    make_lesson: MakeLesson, target_folder: Path, tmp_path: Path
) -> None:
    plain, run = tmp_path / "plain", make_lesson()
    shutil.copytree(target_folder, plain)
    (plain / "chat_template.jinja").unlink()
    alone(run, target=str(plain), synthesis__prompt_tokens=64)
    (first, *_) = list(read_documents(run.output / SYNTHESISED))
    assert first.messages is None
    assert run.rows()[-1]["held_out/simulated_cr"] >= 1


def test_heads_train_on_it_too(make_lesson: MakeLesson) -> None:
    run = make_lesson(lesson.MEDUSA)
    best = alone(run, schedule__steps=2)
    target = load_target(make_lesson().settings())[0]
    assert MedusaHeads.load(best, target).config.heads == 3
    assert (run.output / SYNTHESISED).is_file()


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regenerate__prompts": 3}, "drop the regenerate section"),
        ({"data__sources": ["meals"]}, r"drop data\.sources"),
        ({"synthesis__documents": 6}, r"synthesis\.documents is 6, which leaves none to train on"),
        ({"synthesis__temperature": 0}, r"synthesis\.temperature: .*greater than 0, got 0"),
        ({"synthesis__prompt_token": 9}, r"unknown key 'synthesis\.prompt_token'; did you mean 'prompt_tokens'"),
        (
            {"synthesis__max_tokens": 60},
            r"documents of 78 tokens \(prompt_tokens \+ max_tokens \+ 4 of .* of 64; lower",
        ),
    ],
)
def test_recipes_that_cannot_be(make_lesson: MakeLesson, changes: dict[str, Any], message: str) -> None:
    run = make_lesson()
    with pytest.raises(ConfigError, match=message):
        alone(run, **changes)
    assert not run.output.exists()


def test_data_or_synthesis_and_not_both(make_lesson: MakeLesson) -> None:
    run = make_lesson()
    with pytest.raises(ConfigError, match=r"drop the data files \(--data\), or drop the section"):
        run.train(**SMALL)
    with pytest.raises(DataError, match="no data: name at least one file"):
        train(run.recipe)
    with pytest.raises(ConfigError, match="unknown key 'synthesis'"):
        alone(make_lesson(lesson.TARGET))
    assert not run.output.exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "shows what a user says 2 times instead of once"),
        ("{{ messages[0]['content'] | upper }}", "shows what a user says 0 times"),
        ("{{ raise_exception('no') }}", r"\[synthesis\]: the chat template refuses this conversation: no"),
    ],
)
def test_templates_with_no_place_for_a_turn(make_lesson: MakeLesson, template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        synthesis(make_lesson(), tokenizer=with_template(template))


def test_settings_of_conversations_need_a_template(make_lesson: MakeLesson) -> None:
    tokenizer = with_template(None)
    with pytest.raises(ConfigError, match=r"synthesis\.prompt_tokens is for conversations, .* has no chat template"):
        synthesis(make_lesson(), tokenizer=tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a chat template nor a token that begins or ends texts"):
        synthesis(make_lesson(), tokenizer=tokenizer)


def test_repeated_turns_count_once(make_lesson: MakeLesson) -> None:
    """Almost greedy, all turns are one and the same."""
    run = make_lesson()
    with pytest.raises(
        DataError, match=r"of the 12 documents .*, 1 are left .* too few to hold out 6 \(data\.held_out\)"
    ):
        synthesis(run, synthesis__temperature=1e-3).files()
    assert not (run.output / SYNTHESISED).exists()


def test_one_more_than_is_held_out_is_enough(make_lesson: MakeLesson) -> None:
    few = {"synthesis__temperature": 0.3, "evaluation__prompts": 1}
    left = len(text_of(synthesis(make_lesson(), data__held_out=1, **few).files()).splitlines())
    assert 2 < left < 12, "some are repeated"
    assert synthesis(make_lesson(), data__held_out=left - 1, **few).files()
    with pytest.raises(DataError, match=f"{left} are left .* too few to hold out {left}"):
        synthesis(make_lesson(), data__held_out=left, **few).files()


def test_on_the_command_line(make_lesson: MakeLesson, capfd: pytest.CaptureFixture[str]) -> None:
    run, own = (
        make_lesson(),
        make_lesson(lesson.ADAPTER + "\n[synthesis]\ndocuments = 12\nmax_tokens = 20\nprompt_tokens = 9\n"),
    )
    assert invoke("train", str(own.recipe), "--max-steps", "2") == 0
    assert "best weights" in capfd.readouterr().out
    for recipe, arguments, message in [
        (own.recipe, ("--data", str(own.data)), "error: the recipe's [synthesis] section makes the text itself: drop"),
        (run.recipe, (), "error: no data: name at least one file"),
    ]:
        assert invoke("train", str(recipe), *arguments) == 2
        assert message in capfd.readouterr().err

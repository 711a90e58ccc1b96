"""Training without a recipe: a model, text, and how long it may take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lesson import Lesson, build, write_rows

from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.errors import ConfigError, DataError, ModelError
from kangaroo.files import claim
from kangaroo.training.estimate import Plan
from kangaroo.training.floors import EarlyExit, Trigram, measure_floors
from kangaroo.training.quick import RECIPE, Fit, StepCosts, choose_recipe, fit_into, to_toml, train_quickly
from kangaroo.training.recipe import AdapterRecipe, read_recipe
from kangaroo.training.run import load_target, train

MakeLesson = Callable[..., Lesson]
SMALL: dict[str, Any] = {
    "data.held_out": 6,
    "evaluation": {"prompts": 4, "max_tokens": 12},
    "schedule": {"batch_sequences": 2, "sequence_length": 64},
    "run": {"mixed_precision": "off", "dtype": "float32"},
}


def test_a_run_from_a_model_and_text(
    make_lesson: MakeLesson, target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not measured: on a busy machine there might be no time for the fewest steps.
    monkeypatch.setattr(StepCosts, "measure", lambda *_: StepCosts(first=4.0, again=4.0, evaluation=1.0))
    lesson, news = make_lesson(), list[Any]()
    best = train_quickly(
        str(target_folder), [lesson.data], news.append, minutes=4, output=lesson.output, settings=SMALL
    )
    recipe = read_recipe(lesson.output / RECIPE)
    assert isinstance(recipe, AdapterRecipe)
    adapter = Adapter.load(best, load_target(recipe)[0])
    assert adapter.config.exit_layer == 1
    assert adapter.config.layers == 2
    (plan,) = [item for item in news if isinstance(item, Plan)]
    assert plan.steps == recipe.schedule.steps >= 20
    assert plan.documents == recipe.data.limit
    assert 1 <= plan.floors.early_exit.rate <= 7
    assert 1 <= plan.floors.trigram.rate <= 7
    # The recipe it came to is a recipe like any other: the run is over, and knows it.
    with pytest.raises(ConfigError, match="holds a run"):
        train(lesson.output / RECIPE, [lesson.data])
    assert train(lesson.output / RECIPE, [lesson.data], resume=True) == best
    with pytest.raises(ConfigError, match="holds a run"):
        train_quickly(str(target_folder), [lesson.data], news.append, minutes=1, output=lesson.output, settings=SMALL)


def test_too_short_or_nothing_to_go_by(make_lesson: MakeLesson, target_folder: Path, tmp_path: Path) -> None:
    lesson = make_lesson()

    def run(model: str = str(target_folder), data: Path = lesson.data, minutes: float = 1.0, **settings: Any) -> None:
        changed = {**SMALL, **settings}
        train_quickly(model, [data], lambda _: None, minutes=minutes, output=lesson.output, settings=changed)

    with pytest.raises(ConfigError, match=r"--minutes is too short: 20 steps .* minutes"):
        run(minutes=1e-6)
    for minutes in (0.0, -1.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(ConfigError, match="--minutes must be a number > 0"):
            run(minutes=minutes)
    with pytest.raises(ModelError, match="cannot load a causal LM"):
        run(model=str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no data file"):
        run(data=tmp_path / "nothing.jsonl")
    asked = [{"messages": [{"role": "user", "content": f"What does Ada eat on day {day}?"}]} for day in range(20)]
    with pytest.raises(DataError, match=r"token to learn from .* what the assistant answers"):
        run(data=write_rows(tmp_path / "asked.jsonl", asked))
    with pytest.raises(ConfigError, match=r"did you mean 'exit_layer'"):
        run(**{"adapter.exit_layers": 2})
    with claim(lesson.output), pytest.raises(ConfigError, match="another process is writing"):
        run()


def test_what_suits_a_model(tmp_path: Path, target_folder: Path) -> None:
    from transformers import LlamaConfig

    for layers, width, vocabulary, wanted in (
        (30, 576, 49152, (1, 8192, 3e-3)),
        (32, 4096, 32000, (2, 8192, 3e-3 * 576 / 4096)),
        (8, 256, 4096, (1, 0, 3e-3)),
    ):
        folder = tmp_path / str(width)
        LlamaConfig(num_hidden_layers=layers, hidden_size=width, vocab_size=vocabulary).save_pretrained(folder)
        recipe = choose_recipe(str(folder), tmp_path / "out", {})
        found = recipe.adapter.exit_layer, recipe.adapter.draft_vocabulary, recipe.optimizer.learning_rate
        assert found == pytest.approx(wanted)


def test_states_get_their_share_and_steps_the_rest(make_lesson: MakeLesson) -> None:
    objective, packed = build(make_lesson())
    recipe = objective.recipe
    rows, all_rows = recipe.schedule.batch_sequences, len(packed.rows(64))
    cheap = fit_into(100.0, StepCosts(first=0.1, again=0.1, evaluation=1.0), packed, recipe)
    assert cheap == Fit(len(packed.corpus), 900, 10)
    # States cost ten times a step: at most 0.4 of the time goes to them, or as much as the fewest batches need.
    fit = fit_into(100.0, StepCosts(first=1.1, again=0.1, evaluation=1.0), packed, recipe)
    chosen = min(all_rows, max(5, int(0.4 * 90 / 1.0)) * rows)
    assert fit.documents == 1 + max(i for row in packed.rows(64)[:chosen] for i in row)
    assert fit.steps == int((90 - 1.0 * chosen / rows) / 0.1)
    # Evaluations take a fifth of the time, or as much as the fewest of them need.
    assert fit_into(100.0, StepCosts(first=0.1, again=0.1, evaluation=4.0), packed, recipe).evaluations == 5
    assert fit_into(100.0, StepCosts(first=0.1, again=0.1, evaluation=40.0), packed, recipe).evaluations == 2
    with pytest.raises(ConfigError, match="--minutes is too short"):
        fit_into(100.0, StepCosts(first=20.0, again=0.1, evaluation=1.0), packed, recipe)


def test_floors_are_what_they_say(make_lesson: MakeLesson) -> None:
    objective, packed = build(make_lesson())
    floors = measure_floors(objective, packed.corpus)
    held_out = objective.held_out
    batch = held_out.written.lay_out(held_out.written.rows(held_out.written_length), held_out.written_length)
    judged = EarlyExit(objective).judge(batch)
    target = objective.target
    at = 0
    with torch.no_grad():  # document by document, by the first layers' own states
        for index in (i for row in held_out.written.rows(held_out.written_length) for i in row):
            tokens, marks = held_out.written.corpus.document(index)
            states = target.model(torch.tensor([tokens.tolist()]), output_hidden_states=True).hidden_states[2]
            best = target.logits(target.norm(states))[0].argmax(-1)
            wanted = [float(best[i - 1] == tokens[i]) for i in marks.nonzero()[0]]
            assert [right for right, _ in judged[at : at + len(wanted)]] == wanted
            at += len(wanted)
    assert at == len(judged)
    assert floors.early_exit.agreement == pytest.approx(sum(j[0] for j in judged) / at)
    counted = Trigram(objective, packed.corpus)
    tokens, marks = packed.corpus.document(0)
    first = int(marks.nonzero()[0][0])
    followers = [
        int(ids[i])
        for ids, marked in map(packed.corpus.document, range(len(packed.corpus)))
        for i in marked.nonzero()[0]
        if i >= 2 and ids[i - 2 : i].tolist() == tokens[first - 2 : first].tolist()
    ]
    token, chance = counted._best[tuple(tokens[first - 2 : first].tolist())]
    assert followers.count(token) == max(map(followers.count, followers))
    assert chance == followers.count(token) / len(followers)


def test_a_recipe_as_a_file_reads_back(make_lesson: MakeLesson, tmp_path: Path) -> None:
    recipe = make_lesson().settings(data__sources=["a", "b"], adapter__draft_vocabulary=40, states="kept states")
    (tmp_path / "recipe.toml").write_text(to_toml(recipe.model_dump(mode="json", exclude_none=True)))
    assert read_recipe(tmp_path / "recipe.toml") == recipe

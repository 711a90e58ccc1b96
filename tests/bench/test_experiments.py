"""Experiments: methods trained before they are measured, sweeps, prompts of one length, and what users get wrong."""

import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from little_experiments import EXPERIMENT, TRAINED, Lab, make_lab
from little_runs import EARLY, MakeRecipe, by_method, timeless
from transformers import AutoTokenizer

from command import invoke
from kangaroo import demo
from kangaroo.bench import run
from kangaroo.bench.formats import read_questions
from kangaroo.bench.provenance import digest
from kangaroo.bench.questions import Question
from kangaroo.bench.recipe import BenchRecipe, read_bench_recipe
from kangaroo.bench.records import BASELINE, RECORDS, read_records
from kangaroo.bench.report.results import read_run
from kangaroo.bench.run import BenchReport, read_sweep, run_bench, run_sweep
from kangaroo.bench.shorten import bring_to, material_for
from kangaroo.bench.trained import Training, train_methods
from kangaroo.errors import ConfigError, DataError
from kangaroo.text import Tokenizer
from kangaroo.toml import read_table
from kangaroo.training.recipe import read_recipe
from kangaroo.training.report import Update
from kangaroo.training.run import train_beside
from little_model import TARGET

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that it has forked")


@pytest.fixture
def lab(tmp_path: Path, model: Path, questions: Path, untimed: None) -> Lab:
    return make_lab(tmp_path, model / "target", questions)


def train(training: Training, report: Callable[[Any], None] = lambda _: None) -> Path:
    return train_beside(training.recipe, training.data, training.beside, overrides=training.changes, report=report)


@contextmanager
def unwatched(name: str) -> Iterator[BenchReport]:
    yield lambda done, total: None


# Methods that are trained.


def test_methods_are_trained_once_for_equal_settings_and_then_measured(lab: Lab) -> None:
    recipe = read_bench_recipe(lab.write(TRAINED))
    calls = list[Training]()

    def counted(training: Training) -> Path:
        calls.append(training)
        return train(training)

    trained = train_methods(recipe, lab.recipe.parent, counted)
    assert [call.folder.name for call in calls] == ["one", "two", "heads"]
    assert trained["same"] == trained["one"] == lab.output / "trained" / "one" / "best"
    records = run_bench(recipe, trained=trained, limit=2)
    methods = by_method(records)
    assert list(methods) == [BASELINE, "one", "same", "two", "heads"]
    for mine in methods.values():
        texts = [[turn.tokens for turn in record.turns] for record in mine]
        assert texts == [[turn.tokens for turn in record.turns] for record in methods[BASELINE]]
    facts = read_run(lab.output, "x").provenance
    assert facts["files"]["one"] == facts["files"]["same"] == digest(trained["one"]) != facts["files"]["two"]
    assert facts["parameters"]["one"] == facts["parameters"]["two"] > 0
    assert facts["parameters"]["heads"] > facts["parameters"]["one"]
    assert facts["recipe"]["methods"][2]["train"]["set"] == {"adapter.exit_layer": 2}

    calls.clear()
    assert train_methods(recipe, lab.recipe.parent, counted) == trained
    assert not calls, "what is finished is taken as it is"
    assert run_bench(recipe, trained=trained, limit=2) == records


def test_what_the_target_wrote_for_one_training_serves_the_next(lab: Lab) -> None:
    stages = list[tuple[str, str]]()

    def watched(training: Training) -> Path:
        name = training.folder.name

        def note(news: Any) -> None:
            if isinstance(news, Update):
                stages.append((name, news.stage))

        return train(training, note)

    train_methods(read_bench_recipe(lab.write(TRAINED)), lab.recipe.parent, watched)
    assert {name for name, stage in stages if stage == "train"} == {"one", "two", "heads"}
    assert {name for name, stage in stages if stage == "answer"} == {"one"}
    texts = [(lab.output / "trained" / name / "written.jsonl").read_bytes() for name in ("one", "two", "heads")]
    assert texts[0] == texts[1] == texts[2]


@FORK
def test_a_training_that_was_killed_goes_on(lab: Lab, tmp_path: Path) -> None:
    recipe = read_bench_recipe(lab.write(TRAINED))

    def die(news: Any) -> None:
        if isinstance(news, Update) and (news.stage, news.done) == ("train", 5):
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(training: Training) -> Path:
        return train(training, die)

    child = multiprocessing.get_context("fork").Process(target=train_methods, args=(recipe, lab.recipe.parent, dying))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    steps = list[int]()

    def noting(training: Training) -> Path:
        def note(news: Any) -> None:
            if isinstance(news, Update) and news.stage == "train":
                steps.append(news.done)

        return train(training, note)

    killed = train_methods(recipe, lab.recipe.parent, noting)
    assert steps[:2] == [5, 6], "the checkpoint after step 4 was gone on from"
    whole = recipe.model_copy(update={"output": tmp_path / "whole"})
    for name, folder in train_methods(whole, lab.recipe.parent, train).items():
        file = "heads.safetensors" if name == "heads" else "adapter.safetensors"
        assert (killed[name] / file).read_bytes() == (folder / file).read_bytes()


def test_another_training_in_the_same_folder_is_refused(lab: Lab) -> None:
    only = TRAINED[: TRAINED.index('[[methods]]\nname = "same"')]
    train_methods(read_bench_recipe(lab.write(only)), lab.recipe.parent, train)
    changed = only.replace("train = {}", 'train = { set = { "schedule.steps" = 7 } }')
    with pytest.raises(ConfigError, match="holds a training by another recipe or data"):
        train_methods(read_bench_recipe(lab.write(changed)), lab.recipe.parent, train)
    data = lab.recipe.parent / "meals.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("eat", "sit"), encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a training by another recipe or data"):
        train_methods(read_bench_recipe(lab.write(only)), lab.recipe.parent, train)


def test_settings_of_all_trainings_give_way_to_those_of_one(lab: Lab) -> None:
    common = TRAINED.replace(
        'data = ["meals.jsonl"]', 'data = ["meals.jsonl"]\nset = { "schedule.steps" = 2, seed = 3 }'
    )
    own = common.replace("train = {}", 'train = { set = { "schedule.steps" = 4 } }', 1)
    recipe = read_bench_recipe(lab.write(own, '[quick]\n"training.set" = { "schedule.steps" = 1 }\n'), quick=True)
    changes = [method.train.joined(recipe.training) for method in recipe.methods[:2] if method.train]
    assert changes == [{"schedule": {"steps": 4}, "seed": 3}, {"schedule": {"steps": 1}, "seed": 3}]


def test_one_adapter_goes_on_from_another(lab: Lab) -> None:
    first = TRAINED[: TRAINED.index('[[methods]]\nname = "same"')]
    common, method = first[: first.index("[[methods]]")], first[first.index("[[methods]]") :]
    further = '\n[[methods]]\nname = "further"\ndrafter = "kangaroo"\ntrain = { after = "one" }\n'
    recipe = read_bench_recipe(lab.write(first, further))
    begins = list[str]()

    def noted(training: Training) -> Path:
        begins.append(read_recipe(training.recipe, training.changes).model_dump()["adapter"]["init"])
        return train(training)

    best = train_methods(recipe, lab.recipe.parent, noted)
    assert begins == ["target", str(best["one"])]
    assert digest(best["one"]) != digest(best["further"])
    train_methods(recipe, lab.recipe.parent, noted)
    assert len(begins) == 2, "both are finished"
    for mistaken in (first.replace("train = {}", 'train = { after = "one" }'), common + further + method):
        with pytest.raises(ConfigError, match=r"train.after is 'one'; name a method trained before it"):
            read_bench_recipe(lab.write(mistaken))


def test_files_take_the_place_of_what_the_target_would_write(lab: Lab) -> None:
    path = lab.recipe.parent / "adapter.toml"
    path.write_text(
        path.read_text(encoding="utf-8") + "\n[synthesis]\ndocuments = 9\nmax_tokens = 8\n", encoding="utf-8"
    )
    seen = list[Training]()

    def noted(training: Training) -> Path:
        seen.append(training)
        return training.folder / "best"

    only = TRAINED[: TRAINED.index('[[methods]]\nname = "same"')]
    train_methods(read_bench_recipe(lab.write(only)), lab.recipe.parent, noted)
    without = read_bench_recipe(
        lab.write(only.replace('data = ["meals.jsonl"]', "")), {"output": str(lab.output) + "2"}
    )
    train_methods(without, lab.recipe.parent, noted)
    sections = [read_recipe(training.recipe, training.changes).model_dump()["synthesis"] for training in seen]
    assert sections[0] is None
    assert sections[1]["documents"] == 9
    assert [len(training.data) for training in seen] == [1, 0]


# Sweeps.


SHORT = {"key": "max_tokens", "values": [3, 5]}


@pytest.fixture
def sweep(recipe: MakeRecipe) -> BenchRecipe:
    return recipe(vary=SHORT, limit=2)


def test_a_sweep_is_one_run_per_value(sweep: BenchRecipe, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = list[str]()
    real = run.load
    monkeypatch.setattr(run, "load", lambda *args, **settings: (loads.append("x"), real(*args, **settings))[1])
    found = run_sweep(sweep, watch=unwatched)
    assert len(loads) == 1, "models are loaded once"
    assert list(found) == ["3", "5"]
    assert read_sweep(sweep.output) == ("max_tokens", [3, 5])
    for value in (3, 5):
        folder = sweep.output / str(value)
        assert read_records(folder) == found[str(value)]
        assert max(len(turn.tokens) for record in found[str(value)] for turn in record.turns) == value
        facts = read_run(folder, "x").provenance["recipe"]
        assert (facts["max_tokens"], facts["vary"]) == (value, None)
    alone = run_bench(recipe(max_tokens=3, limit=2, output=str(sweep.output / "alone")))
    assert timeless(alone) == timeless(found["3"])
    more = recipe(vary=SHORT | {"values": [3, 5, 4]}, limit=2)
    again = run_sweep(more, watch=unwatched)
    assert list(again) == ["3", "5", "4"], "a value may be added"
    assert {value: again[value] for value in found} == found
    with pytest.raises(ConfigError, match="holds a sweep over max_tokens, not over seed"):
        run_sweep(recipe(vary={"key": "seed", "values": [1]}), watch=unwatched)


@FORK
def test_a_sweep_that_was_killed_goes_on(sweep: BenchRecipe, recipe: MakeRecipe) -> None:
    @contextmanager
    def deadly(name: str) -> Iterator[BenchReport]:
        def report(done: int, total: int) -> None:
            if name == "max_tokens = 5" and done == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        yield report

    child = multiprocessing.get_context("fork").Process(target=run_sweep, args=(sweep,), kwargs={"watch": deadly})
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    first = (sweep.output / "3" / RECORDS).read_bytes()
    assert len(read_records(sweep.output / "5")) == 2
    found = run_sweep(sweep, watch=unwatched)
    assert (sweep.output / "3" / RECORDS).read_bytes() == first
    whole = run_sweep(recipe(vary=SHORT, limit=2, output=str(sweep.output / "x")), watch=unwatched)
    assert {value: timeless(records) for value, records in found.items()} == {
        value: timeless(records) for value, records in whole.items()
    }


def test_by_rejection_texts_are_their_own_and_are_not_compared(recipe: MakeRecipe) -> None:
    reject = EARLY | {"name": "reject", "rule": "reject"}
    settings = recipe(methods=[EARLY, reject], sampling={"temperature": 1.0}, end="barred")
    methods = by_method(run_bench(settings))
    texts = {name: [turn.tokens for record in found for turn in record.turns] for name, found in methods.items()}
    assert texts["early"] == texts[BASELINE] != texts["reject"]
    assert all(turn.difference is None for record in methods["reject"] for turn in record.turns)


# Prompts of one length.


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(AutoTokenizer.from_pretrained(TARGET))


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return read_questions(demo.PROMPTS.read_bytes(), "demo")


@pytest.mark.parametrize("length", [40, 64, 65, 200, 896])
def test_prompts_have_exactly_the_length(tokenizer: Tokenizer, asked: list[Question], length: int) -> None:
    for question in asked[::5]:
        messages = question.conversation([])
        whole = tokenizer.encode(messages)
        fitted = bring_to(length, messages, tokenizer, material_for(question, asked))
        assert len(fitted.tokens) == length
        if len(whole) <= length:
            assert fitted.dropped == 0
            text = tokenizer.wrapped.decode(fitted.tokens)
            assert question.turns[0].strip() in text
            before = tokenizer.wrapped.decode(whole).partition(question.turns[0].strip())[0]
            assert text.startswith(before), "what is put before it is in the user's own turn"
        else:
            assert fitted.dropped >= len(whole) - length


def test_what_stands_before_a_question_is_the_others_in_a_fixed_order(tokenizer: Tokenizer) -> None:
    three = [Question(number, "t", "t", (f"Number {number}?",)) for number in (1, 2, 3)]
    assert material_for(three[1], three) == "Number 3?\n\nNumber 1?\n\n"
    assert material_for(three[0], three[:1]) == "Number 1?\n\n", "one that is alone is repeated"
    fitted = bring_to(300, three[1].conversation([]), tokenizer, material_for(three[1], three))
    text = tokenizer.wrapped.decode(fitted.tokens)
    assert "Number 3?\n\nNumber 1?\n\nNumber 3?\n\nNumber 1?\n\nNumber 2?" in text


def test_a_run_with_prompts_of_one_length(recipe: MakeRecipe) -> None:
    for record in run_bench(recipe(prompt_tokens=90)):
        assert all(turn.prompt_tokens == 90 for turn in record.turns)
    with pytest.raises(ConfigError, match="prompt_tokens is 1020, but only 1014 leave room for max_tokens"):
        run_bench(recipe(prompt_tokens=1020, output=str(recipe().output / "long")))


# What users get wrong.


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ('[vary]\nkey = "sampling.temprature"\nvalues = [0.5]', "unknown key 'sampling.temprature'; did you mean"),
        ('[vary]\nkey = "batch"\nvalues = [0]', "vary, 0: batch: .*greater than 0"),
        ('[vary]\nkey = "batch"\nvalues = []', "vary.values: .*at least 1 item"),
        ('[vary]\nkey = "batch"\nvalues = [1, 1]', "a value is given twice"),
        ('[vary]\nkey = "split"\nvalues = ["../x"]', "a value names a folder"),
        ('[vary]\nkey = "model"\nvalues = ["a"]', "'model' cannot vary"),
        ('[[methods]]\nname = "a"\ndrafter = "llma"\nat = 1', r"at and series are places in an \[experiment\]"),
        ('[[methods]]\nname = "a"\ndrafter = "llma"\nrule = "maybe"', "rule must be one of match, reject, got 'maybe'"),
        ('[[methods]]\nname = "a"\ndrafter = "llma"\ntrain = {}', "a: llma is not trained; leave train out"),
        ('[[methods]]\nname = "a"\ndrafter = "kangaroo"\ntrain = {}', "nothing says what to train it by"),
        (
            '[[methods]]\nname = "a"\ndrafter = "kangaroo"\nadapter = "x"\ntrain = { recipe = "adapter.toml" }',
            "train says where adapter comes from",
        ),
        ('[training]\nrecipe = "adapter.toml"', "no method has a train"),
        (
            EXPERIMENT + '[vary]\nkey = "batch"\nvalues = [1]\n[[methods]]\nname = "a"\ndrafter = "llma"\nat = 1',
            r"\[vary\] gives every method its place; leave at out",
        ),
    ],
)
def test_mistakes_in_recipes_are_named(lab: Lab, parts: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_bench_recipe(lab.write(parts))


def test_quick_needs_its_section_and_takes_values_under_dotted_keys(lab: Lab) -> None:
    with pytest.raises(ConfigError, match=r"has no \[quick\] section"):
        read_bench_recipe(lab.write(), quick=True)
    text = '[quick]\nlimit = 2\n"sampling.temperature" = 0.5\nsampling.top_p = 0.9\n'
    quick = read_bench_recipe(lab.write("[sampling]\ntop_k = 3\n", text), {"max_tokens": 4}, quick=True)
    assert (quick.limit, quick.max_tokens) == (2, 4)
    assert (quick.sampling.temperature, quick.sampling.top_p, quick.sampling.top_k) == (0.5, 0.9, 3)
    assert read_bench_recipe(lab.recipe).sampling.temperature == 0
    with pytest.raises(ConfigError, match="unknown key 'max_token'"):
        read_bench_recipe(lab.write("[quick]\nmax_token = 4\n"), quick=True)


def test_data_that_is_not_there(lab: Lab) -> None:
    recipe = read_bench_recipe(lab.write(TRAINED), {"training.data": ["absent.jsonl"]})
    with pytest.raises(DataError, match=r"no data file \(training.data, or --data\) at .*absent.jsonl"):
        train_methods(recipe, lab.recipe.parent, train)


def test_a_mistake_in_the_last_training_is_found_before_the_first(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = TRAINED.replace('"adapter.exit_layer" = 2', '"adapter.exit_layers" = 2')
    assert invoke("bench", str(lab.write(wrong))) == 2
    assert "unknown key 'adapter.exit_layers'; did you mean 'exit_layer'?" in capsys.readouterr().err
    assert not lab.output.exists()


def test_after_ctrl_c_the_same_command_goes_on(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = importlib.import_module("kangaroo.cli.bench")
    real = verb.train_beside

    def pressed(*args: Any, report: Callable[[Any], None], **keys: Any) -> Path:
        def note(news: Any) -> None:
            report(news)
            if isinstance(news, Update) and (news.stage, news.done) == ("train", 3):
                signal.raise_signal(signal.SIGINT)

        return real(*args, report=note, **keys)

    only = TRAINED[: TRAINED.index('[[methods]]\nname = "same"')]
    monkeypatch.setenv("COLUMNS", "200")
    with monkeypatch.context() as patch:
        patch.setattr(verb, "train_beside", pressed)
        assert invoke("bench", str(lab.write(only)), "--limit", "1") == 130
    assert "stopped after step 3" in capsys.readouterr().err
    assert invoke("bench", str(lab.recipe), "--limit", "1") == 0
    assert len(read_records(lab.output)) == 2


# What ships.

ROOT = Path(__file__).parents[2] / "recipes" / "little" / "experiments"
SHIPPED = sorted(path for path in ROOT.glob("*.toml") if "kind" not in read_table(path))


def test_there_is_a_recipe_for_each_experiment() -> None:
    names = {path.stem for path in SHIPPED}
    assert names >= {
        "exit-layer",
        "threshold",
        "ablation",
        "training",
        "domains",
        "context",
        "temperature",
        "batch",
        "scale",
    }


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_are_valid(path: Path, quick: bool, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}", encoding="utf-8")
    needs_data = "data" in read_table(path).get("training", {})
    changes = {"training.data": [str(tmp_path / "chats.jsonl")]} if needs_data else {}
    recipe = read_bench_recipe(path, {"output": str(tmp_path / "run"), **changes}, quick=quick)
    assert (recipe.model, recipe.questions) == ("tests/little/target", "demo")
    assert (recipe.dtype, recipe.threads) == ("float32", 1)
    assert recipe.experiment is not None
    whole = read_bench_recipe(path)
    assert (recipe.limit, recipe.max_tokens) != (whole.limit, whole.max_tokens) or not quick
    steps = list[int]()

    def parsed(training: Training) -> Path:
        settings = read_recipe(training.recipe, training.changes)
        assert settings.model_dump()["target"] == "tests/little/target"
        assert (settings.model_dump()["synthesis"] is None) == needs_data
        steps.append(settings.schedule.steps)
        (training.folder / "best").mkdir(parents=True)
        (training.folder / "best" / "x").write_text(training.folder.name, encoding="utf-8")
        return training.folder / "best"

    train_methods(recipe, path.parent, parsed)
    assert all(count <= 20 for count in steps) or not quick
    for run_ in recipe.by_value().values() or [recipe]:
        assert run_.batch <= (run_.limit or 72)

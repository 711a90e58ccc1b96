"""Benchmark runs on a tiny chat model: the same texts, honest records, and nothing lost or counted twice."""

import json
import multiprocessing
import random
import shutil
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from little_runs import EARLY, QUESTIONS, TOKENS, MakeRecipe, by_method, timeless

import kangaroo
from chat_model import save_chat_model
from command import invoke
from kangaroo import drafters
from kangaroo.bench import run
from kangaroo.bench.answers import write_answers
from kangaroo.bench.cost import method_costs
from kangaroo.bench.records import BASELINE, RECORDS, read_records
from kangaroo.bench.report.counting import read_answers
from kangaroo.bench.report.results import read_run
from kangaroo.bench.run import run_bench
from kangaroo.drafters import Entry
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import CapacityError, ConfigError, DataError
from kangaroo.files import claim
from kangaroo.kernels import COMPILERS
from kangaroo.state import State
from kangaroo.tree import Draft


def test_every_method_answers_every_question_as_plain_decoding_does(recipe: MakeRecipe, model: Path) -> None:
    kangaroo_ = {"name": "kangaroo", "drafter": "kangaroo", "adapter": str(model / "adapter"), "threshold": 0.05}
    settings = recipe(repeats=2, methods=[kangaroo_, EARLY])
    records = run_bench(settings)
    assert read_records(settings.output) == records
    assert len(records) == 4 * 3 * 2
    methods = by_method(records)
    assert list(methods) == [BASELINE, "kangaroo", "early"]
    for name in ("kangaroo", "early"):
        for mine, plain in zip(methods[name], methods[BASELINE], strict=True):
            assert (mine.question, mine.repeat) == (plain.question, plain.repeat)
            assert [turn.tokens for turn in mine.turns] == [turn.tokens for turn in plain.turns]
            assert all(turn.difference is None for turn in mine.turns)
        assert sum(sum(turn.drafted) for record in methods[name] for turn in record.turns) > 0
        assert any(max(turn.emitted) > 1 for record in methods[name] for turn in record.turns)
    assert all(turn.seconds > turn.verify > 0 for record in records for turn in record.turns)
    tasks = {1: "mt_bench", 2: "mt_bench", 3: "qa", 4: "qa"}
    assert {record.question: record.task for record in records} == tasks


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_all_methods_by_compiled_kernels(recipe: MakeRecipe) -> None:
    settings = recipe(compile=True, dtype="float32", methods=[EARLY])
    loaded = run.load_methods(settings)
    assert loaded.plain.target.kernels is not None
    assert loaded.drafting["early"].target is loaded.plain.target
    assert all(turn.difference is None for record in run.measure(settings, loaded) for turn in record.turns)
    with pytest.raises(ConfigError, match="recipe's compile was true, now it is false"):
        run_bench(recipe(dtype="float32", methods=[EARLY]))


def test_the_second_turn_follows_the_first_answer(recipe: MakeRecipe, model: Path) -> None:
    records = run_bench(recipe(), limit=1)
    decoder = kangaroo.load(model / "target", drafter="none", dtype=torch.float64)
    first, second = records[0].turns
    ask, then = QUESTIONS[0]["turns"]  # type: ignore[misc]
    talk = [{"role": "user", "content": ask}, {"role": "assistant", "content": decoder.tokenizer.decode(first.tokens)}]
    (answer,) = decoder.generate([[*talk, {"role": "user", "content": then}]], max_tokens=TOKENS)
    assert answer.tokens == second.tokens
    assert answer.finish_reason == second.finish_reason
    assert second.prompt_tokens > first.prompt_tokens + len(first.tokens) - 2


def test_long_prompts_are_cut_and_the_cut_is_counted(recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "eat tonight " * 300 + "Where?"}) + "\n", encoding="utf-8")
    for record in run_bench(recipe(questions=str(path))):
        (turn,) = record.turns
        assert 1024 - TOKENS - 5 < turn.prompt_tokens <= 1024 - TOKENS
        assert turn.dropped_tokens > 0
        assert len(turn.tokens) == TOKENS or turn.finish_reason == "stop"


def test_what_drafting_costs_is_part_of_the_provenance(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "method_costs", method_costs)
    settings = recipe()
    run_bench(settings, limit=1)
    costs = read_run(settings.output, "x").costs
    assert list(costs) == ["early"]
    assert 0 < (costs["early"].draft_share or 0) < 1
    assert costs["early"].measured is not None


def test_batches_sampling_and_barred_ends_change_no_text_either(recipe: MakeRecipe) -> None:
    sampled = {"sampling": {"temperature": 0.9, "top_p": 0.95}, "seed": 3, "end": "barred", "repeats": 2}
    records = run_bench(recipe(batch=2, **sampled))
    methods = by_method(records)
    for name, found in methods.items():
        assert all(len(turn.tokens) == TOKENS for record in found for turn in record.turns), name
        assert timeless(found)[0]["turns"][0]["tokens"] == timeless(methods[BASELINE])[0]["turns"][0]["tokens"]
        for mine, plain in zip(found, methods[BASELINE], strict=True):
            assert [turn.tokens for turn in mine.turns] == [turn.tokens for turn in plain.turns]
    first, second = (r for r in methods[BASELINE] if r.question == 3)
    assert first.turns[0].tokens != second.turns[0].tokens, "repeats are different samples"


def test_a_larger_limit_adds_to_the_records_of_a_smaller_one(recipe: MakeRecipe) -> None:
    settings, calls = recipe(), list[tuple[int, int]]()
    few = run_bench(settings, limit=2)
    assert len(few) == 2 * 2
    assert {record.task for record in few} == {"mt_bench", "qa"}
    everything = run_bench(settings, report=lambda done, total: calls.append((done, total)))
    assert everything[:4] == few
    assert len(everything) == 4 * 2
    assert calls == [(2, 4), (3, 4), (4, 4)]
    before = (settings.output / RECORDS).read_bytes()
    assert run_bench(settings) == everything
    assert (settings.output / RECORDS).read_bytes() == before
    with pytest.raises(ConfigError, match="--limit must be at least 1"):
        run_bench(settings, limit=0)


FORK = pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use its parent's GPU")


@FORK
def test_killed_at_any_moment_it_goes_on_as_if_it_had_not_been(recipe: MakeRecipe, tmp_path: Path) -> None:
    expected = timeless(run_bench(recipe(repeats=3), limit=2))
    settings = recipe(repeats=3, output=str(tmp_path / "killed"))
    path, moment = settings.output / RECORDS, random.Random(1)
    fork, ended, kills = multiprocessing.get_context("fork"), None, 0
    while ended != 0:
        size = path.stat().st_size if path.exists() else 0
        process = fork.Process(target=run_bench, args=(settings,), kwargs={"limit": 2})
        process.start()
        while process.is_alive() and (not path.exists() or path.stat().st_size <= size):
            time.sleep(0.002)
        process.join(moment.uniform(0, 0.1))
        process.kill()
        process.join()
        ended = process.exitcode
        kills += ended == -9
        if ended == -9 and kills == 2:  # as if the last write had been torn
            path.write_bytes(path.read_bytes()[:-100])
    assert kills > 1
    assert timeless(read_records(settings.output)) == expected
    # A run that was killed after its last answer has nothing left to go on with.
    assert len(read_run(settings.output, "killed").provenance["resumed"]) in (kills - 1, kills)


def test_a_run_that_ended_before_its_first_answer_starts_again(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "method_costs", lambda decoder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_bench(recipe(), limit=1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_bench(recipe(), limit=1)
    assert len(run_bench(recipe(), limit=1)) == 2


def test_torn_lines_and_unfinished_questions_are_measured_again(recipe: MakeRecipe) -> None:
    settings = recipe()
    expected = timeless(run_bench(settings, limit=2))
    assert len(expected) == 4
    path = settings.output / RECORDS
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (b"".join(lines[:-1]), b"".join(lines)[:-1], b"".join(lines[:2]) + lines[2][:9], b""):
        path.write_bytes(damage)
        assert timeless(run_bench(settings, limit=2)) == expected
    path.write_bytes(b"{}\n" + b"".join(lines))
    with pytest.raises(DataError, match="line 1"):
        run_bench(settings, limit=2)
    path.write_bytes(b"".join([*lines, lines[0]]))
    with pytest.raises(DataError, match="occurs twice"):
        run_bench(settings, limit=2)


class Failing(NoDrafter):
    """Drafts for a while."""

    left = 40
    error: Exception = RuntimeError("the drafter broke")

    def draft(self, state: State) -> Draft:
        Failing.left -= 1
        if Failing.left < 0:
            raise Failing.error
        return super().draft(state)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setitem(drafters.DRAFTERS, "failing", Entry(lambda *_: Failing))
    monkeypatch.setattr(Failing, "left", 4 * TOKENS + 5)
    return {"name": "broken", "drafter": "failing"}


def test_a_drafter_that_raises_ends_the_run_and_what_was_recorded_stays(
    recipe: MakeRecipe, failing: dict[str, str]
) -> None:
    settings = recipe(methods=[failing], end="barred")
    with pytest.raises(RuntimeError, match="the drafter broke") as caught:
        run_bench(settings)
    assert caught.value.__notes__ == ["while broken was answering question 3"]
    kept = read_records(settings.output)
    assert [(record.question, record.method) for record in kept] == [(1, "none"), (1, "broken")]
    Failing.left = 10**9
    assert run_bench(settings)[:2] == kept


@FORK
def test_the_process_of_a_drafter_that_raises_fails(recipe: MakeRecipe, failing: dict[str, str]) -> None:
    process = multiprocessing.get_context("fork").Process(target=run_bench, args=(recipe(methods=[failing]),))
    process.start()
    process.join()
    assert process.exitcode == 1


def test_folders_of_another_run_are_refused(recipe: MakeRecipe, questions: Path, tmp_path: Path) -> None:
    run_bench(recipe(), limit=1)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(questions.read_bytes())
    run_bench(recipe(questions=str(moved)), limit=1)
    other_questions = tmp_path / "other.jsonl"
    other_questions.write_text(json.dumps(QUESTIONS[0]) + "\n", encoding="utf-8")
    other_model = save_chat_model(tmp_path / "chat", seed=1)
    for changes, message in (
        ({"max_tokens": 25}, r"recipe's max_tokens was 10, now it is 25; restore it to go on, or give a new --output"),
        ({"methods": []}, "recipe's methods was"),
        ({"questions": str(other_questions)}, "its questions was"),
        ({"model": str(other_model / "target")}, "its fingerprint was"),
        ({"dtype": "float32"}, "recipe's dtype was"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_bench(recipe(**changes), limit=1)
    (tmp_path / "run" / "provenance.json").unlink()
    with pytest.raises(ConfigError, match=r"holds records but no provenance.json"):
        run_bench(recipe(), limit=1)


def test_another_adapter_in_the_same_place_is_another_run(model: Path, recipe: MakeRecipe, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (model / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    settings = recipe(methods=[{"name": "kangaroo", "drafter": "kangaroo", "adapter": str(adapter)}])
    run_bench(settings, limit=1)
    (adapter / "README.md").write_text("changed")
    with pytest.raises(ConfigError, match="its files was"):
        run_bench(settings, limit=1)


def test_one_process_at_a_time(recipe: MakeRecipe) -> None:
    settings = recipe()

    def again(done: int, total: int) -> None:
        with pytest.raises(ConfigError, match="another process is writing"):
            run_bench(settings, limit=1)

    run_bench(settings, limit=1, report=again)


@FORK
def test_processes_keep_one_another_out(tmp_path: Path) -> None:
    """Until the one that holds the folder ends, even if it is killed."""
    fork = multiprocessing.get_context("fork")
    holds = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, holds))
    process.start()
    try:
        assert holds.wait(60)
        with pytest.raises(ConfigError, match="another process is writing"), claim(tmp_path):
            pass
    finally:
        process.kill()
        process.join()
    with claim(tmp_path):
        pass


def hold(folder: Path, holds: Event) -> None:
    with claim(folder):
        holds.set()
        time.sleep(600)


def test_no_room_for_a_prompt(recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match="max_tokens is 1024, which leaves no room for a prompt"):
        run_bench(recipe(max_tokens=1024))


def test_answer_files_are_spec_benchs_and_a_function_of_the_records(
    recipe: MakeRecipe, model: Path, tmp_path: Path
) -> None:
    settings = recipe(repeats=2)
    records = run_bench(settings)
    decoder = kangaroo.load(model / "target", drafter="none", dtype=torch.float64)
    for method, found in by_method(records).items():
        path = settings.output / "answers" / f"{method}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [row["question_id"] for row in rows] == [1, 2, 3, 4]
        assert set(rows[0]) == {"question_id", "category", "answer_id", "model_id", "choices", "tstamp"}
        assert len({row["answer_id"] for row in rows}) == 4
        for row in rows:
            assert row["model_id"] == method
            repeats = [record for record in found if record.question == row["question_id"]]
            for choice, record in zip(row["choices"], repeats, strict=True):
                assert choice["index"] == record.repeat
                assert choice["new_tokens"] == [len(turn.tokens) for turn in record.turns]
                assert choice["turns"] == [decoder.tokenizer.decode(turn.tokens) for turn in record.turns]
                assert choice["wall_time"] == [turn.seconds for turn in record.turns]
                assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"])
                assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"])
                assert method != BASELINE or set(choice["accept_lengths"]) == {1}
        assert [row.question_id for row in read_answers(path)] == [1, 2, 3, 4]
        before = path.read_bytes()
        write_answers(tmp_path, records, decoder.tokenizer, read_run(settings.output, "x").provenance["started"])
        assert (tmp_path / "answers" / f"{method}.jsonl").read_bytes() == before


def test_differences_are_recorded_once_and_with_their_gap(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(NoDrafter):
        def draft(self, state: State) -> Draft:
            if state.rounds == 5:
                state.tokens.scatter_(1, state.lengths[:, None], (state.pending + 1) % 50)
            return super().draft(state)

    monkeypatch.setitem(drafters.DRAFTERS, "wrong", Entry(lambda *_: Wrong))
    records = run_bench(recipe(methods=[{"name": "wrong", "drafter": "wrong"}], end="barred"), limit=1)
    first, second = records[1].turns
    assert first.difference is not None
    assert first.difference.position >= 4
    assert first.difference.gap > 0
    assert not first.difference.tie
    assert second.difference is None, "its prompt was another already"


def test_questions_stay_out_of_the_folder(recipe: MakeRecipe) -> None:
    settings = recipe()
    run_bench(settings)
    written = b"".join(path.read_bytes() for path in settings.output.iterdir() if path.is_file())
    assert b"Oakland" not in written


@pytest.fixture
def toml(model: Path, questions: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'model = "{model / "target"}"\nquestions = "absent"\noutput = "{tmp_path / "unused"}"\nmax_tokens = 8\n'
        'dtype = "float64"\n[[methods]]\nname = "early"\ndrafter = "early-exit"\nexit_layer = 1\n'
    )
    return path


def test_the_command_line(toml: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--questions", str(questions), "--limit", "2", "--output", str(tmp_path / "cli")]
    assert invoke("bench", str(toml), *options) == 0
    assert "4 answers, all of them those of plain decoding, token for token" in capsys.readouterr().out
    assert len(read_records(tmp_path / "cli")) == 4


def test_a_users_error_names_the_method_and_the_question(
    toml: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: dict[str, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Failing, "error", CapacityError("too much"))
    monkeypatch.setattr(Failing, "left", 0)
    toml.write_text(toml.read_text().replace('drafter = "early-exit"\nexit_layer = 1', 'drafter = "failing"'))
    assert invoke("bench", str(toml), "--questions", str(questions)) == 2
    assert "error: too much; while early was answering question 1" in capfd.readouterr().err

"""A run that was killed, interrupted or out of disk goes on to the same end as one that was not."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lesson
import pytest
from lesson import Lesson

from kangaroo.errors import CapacityError, ConfigError, DataError
from kangaroo.training import checkpoint
from kangaroo.training.adapter import AdapterObjective, Comparison
from kangaroo.training.checkpoint import STATE, facts_checksum, read_progress
from kangaroo.training.loop import Interrupted
from kangaroo.training.report import Update

MakeLesson = Callable[..., Lesson]


def in_child(work: Callable[[], object]) -> int | None:
    """Run in a forked process, so that it can be killed in earnest; returns its exit code."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def best_bytes(run: Lesson) -> bytes:
    return (run.output / "best" / "adapter.safetensors").read_bytes()


def die_at(stage: str, step: int) -> Callable[[Any], None]:
    def report(event: Any) -> None:
        if isinstance(event, Update) and event.stage == stage and event.done == step:
            die()

    return report


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, target_folder: Path) -> Lesson:
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = folder / "recipe.toml"
    recipe.write_text(lesson.ADAPTER.format(target=target_folder, output=folder / "run"))
    run = Lesson(recipe, lesson.write_rows(folder / "meals.jsonl", lesson.conversations()), folder / "run")
    run.train()
    return run


# Checkpoints are written after steps 0, 3, 6 and 8, evaluations after 2, 4, 6 and 8.
@pytest.mark.parametrize(("stage", "step"), [("train", 1), ("evaluate", 4), ("train", 6), ("train", 8)])
def test_killed_run_resumes_bit_for_bit(make_lesson: MakeLesson, uninterrupted: Lesson, stage: str, step: int) -> None:
    run = make_lesson()
    assert in_child(lambda: run.train(report=die_at(stage, step))) == -signal.SIGKILL
    run.train(resume=True)
    assert run.rows() == uninterrupted.rows()
    assert best_bytes(run) == best_bytes(uninterrupted)


@pytest.mark.parametrize(("stage", "step"), [("train", 5), ("evaluate", 6)])
def test_killed_medusa_run_resumes_bit_for_bit(make_lesson: MakeLesson, stage: str, step: int) -> None:
    whole, run = make_lesson(lesson.MEDUSA), make_lesson(lesson.MEDUSA)
    whole.train()
    assert in_child(lambda: run.train(report=die_at(stage, step))) == -signal.SIGKILL
    run.train(resume=True)
    assert run.rows() == whole.rows()
    files = [(folder.output / "best" / "heads.safetensors").read_bytes() for folder in (run, whole)]
    assert files[0] == files[1]


@pytest.mark.parametrize("lost", [False, True])
def test_killed_run_that_keeps_states(make_lesson: MakeLesson, tmp_path: Path, lost: bool) -> None:
    """With the states that the killed run left, and with none of them."""
    whole, run = make_lesson(), make_lesson()
    whole.train(states=str(tmp_path / "whole"))
    states = str(tmp_path / "killed")
    assert in_child(lambda: run.train(states=states, report=die_at("train", 5))) == -signal.SIGKILL
    if lost:
        shutil.rmtree(states)
    run.train(states=states, resume=True)
    assert run.rows() == whole.rows()
    assert best_bytes(run) == best_bytes(whole)


def test_killed_while_saving(make_lesson: MakeLesson, uninterrupted: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = make_lesson(), checkpoint.save_file

    def torn(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        real(tensors, path, metadata=metadata)
        if json.loads(metadata["step"]) == 6:
            os.truncate(path, path.stat().st_size // 2)
            die()

    monkeypatch.setattr(checkpoint, "save_file", torn)
    assert in_child(run.train) == -signal.SIGKILL
    monkeypatch.undo()
    assert read_progress(run.output / STATE).step == 3
    run.train(resume=True)
    assert run.rows() == uninterrupted.rows()


def test_killed_again_and_again(make_lesson: MakeLesson, uninterrupted: Lesson) -> None:
    run = make_lesson()
    for step in (2, 4, 5):
        resume = (run.output / STATE).is_file()
        assert in_child(lambda r=resume, s=step: run.train(resume=r, report=die_at("train", s))) == -signal.SIGKILL
    run.train(resume=True)
    assert run.rows() == uninterrupted.rows()
    steps = [row["step"] for row in run.rows() if "loss" in row]
    assert steps == list(range(1, 9))


@pytest.mark.slow
def test_killed_at_random_moments(make_lesson: MakeLesson, uninterrupted: Lesson) -> None:
    run = make_lesson()
    for delay in (0.05, 0.2, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5):
        resume = (run.output / STATE).is_file()
        child = multiprocessing.get_context("fork").Process(target=lambda r=resume: run.train(resume=r))
        child.start()
        time.sleep(delay)
        child.kill()
        child.join()
    run.train(resume=(run.output / STATE).is_file())
    assert run.rows() == uninterrupted.rows()
    assert best_bytes(run) == best_bytes(uninterrupted)


def test_best_score_survives(make_lesson: MakeLesson, uninterrupted: Lesson) -> None:
    """A run resumed from a checkpoint with an unbeatable score must not save anything as its best."""
    run = make_lesson()
    run.train(schedule__steps=3)
    path = run.output / STATE
    progress = read_progress(path)
    scores = [row["held_out/score"] for row in run.rows() if "held_out/score" in row]
    assert progress.best == max(scores)
    before = best_bytes(run)
    rewrite_progress(path, best=1e9)
    run.train(resume=True, schedule__steps=6)
    assert best_bytes(run) == before
    assert read_progress(path).best == 1e9


def rewrite_progress(path: Path, **changes: Any) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    changed = {key: json.dumps(value) for key, value in changes.items()}
    metadata = {**metadata, **changed}
    save_file(load_file(path), path, metadata={**metadata, "facts": facts_checksum(metadata)})


def test_state_from_before_recipes_were_recorded(make_lesson: MakeLesson) -> None:
    """The first format held parameters, moments and the step, nothing else."""
    from safetensors.torch import load_file, save_file

    whole, half = make_lesson(lesson.TARGET), make_lesson(lesson.TARGET)
    whole.train()
    half.train(schedule__steps=4)
    path = half.output / STATE
    save_file(load_file(path), path, metadata={"step": "4"})
    half.train(resume=True)
    losses = [[row["loss"] for row in run.rows() if "loss" in row] for run in (whole, half)]
    assert losses[0] == losses[1]


def test_interrupted_run_saves_and_says_how_to_go_on(make_lesson: MakeLesson, uninterrupted: Lesson) -> None:
    run = make_lesson()

    def interrupt(event: Any) -> None:
        if isinstance(event, Update) and event.stage == "train" and event.done == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"after step 5.*--resume") as caught:
        run.train(report=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert read_progress(run.output / STATE).step == caught.value.step == 5
    run.train(resume=True)
    assert run.rows() == uninterrupted.rows()


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A full disk, as a process without a disk of its own can have it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_the_last_checkpoint(make_lesson: MakeLesson, uninterrupted: Lesson) -> None:
    run = make_lesson()
    run.train(schedule__steps=3)
    saved = (run.output / STATE).read_bytes()
    with files_no_larger_than(len(saved) // 2), pytest.raises(CapacityError, match="make room and resume"):
        run.train(resume=True)
    assert (run.output / STATE).read_bytes() == saved
    assert not list(run.output.glob(".*.part"))


def test_finished_run_has_nothing_left_to_do(make_lesson: MakeLesson) -> None:
    run = make_lesson()
    best = run.train(schedule__steps=2)
    rows = run.rows()
    assert run.train(resume=True, schedule__steps=2) == best
    assert run.rows() == rows


def test_a_run_decays_when_its_time_has_come(make_lesson: MakeLesson) -> None:
    run = make_lesson()
    run.train(schedule__steps=4)
    run.train(resume=True, schedule__steps=8, schedule__decay_steps=4)
    rates = [row["learning_rate"] for row in run.rows() if "learning_rate" in row]
    assert rates[2:] == pytest.approx([5e-3] * 3 + [5e-3 * left for left in (0.75, 0.5, 0.25)])


def test_refuses_what_is_not_the_same_run(make_lesson: MakeLesson) -> None:
    run = make_lesson()
    with pytest.raises(ConfigError, match="nothing to resume"):
        run.train(resume=True)
    run.train(schedule__steps=2)
    with pytest.raises(ConfigError, match="holds a run that stopped after step 2"):
        run.train(schedule__steps=2)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate was 0\.005 .* now it is 0\.1"):
        run.train(resume=True, optimizer__learning_rate=0.1)
    with pytest.raises(ConfigError, match=r"schedule\.decay was 'linear' .* now it is 'cosine'"):
        run.train(resume=True, schedule__decay="cosine")
    with pytest.raises(ConfigError, match=r"2 steps are done, more than schedule\.steps = 1"):
        run.train(resume=True, schedule__steps=1)
    lesson.write_rows(run.data, lesson.conversations(41))
    with pytest.raises(ConfigError, match="the data is not the one"):
        run.train(resume=True)


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty"])
def test_damaged_state_is_named(make_lesson: MakeLesson, harm: str) -> None:
    run = make_lesson()
    run.train(schedule__steps=2)
    path = run.output / STATE
    content = bytearray(path.read_bytes())
    if harm == "truncated":
        content = content[: len(content) // 2]
    elif harm == "flipped":
        content[-100] ^= 4
    else:
        content = bytearray()
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot resume from"):
        run.train(resume=True)


def test_diverged_run_saves_nothing(make_lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_lesson()
    run.train(schedule__steps=2)
    saved, rows = (run.output / STATE).read_bytes(), run.rows()
    real = AdapterObjective.compare

    def diverge(self: AdapterObjective, *states: Any) -> Comparison:
        compared = real(self, *states)
        return replace(compared, loss=compared.loss * float("nan"))

    monkeypatch.setattr(AdapterObjective, "compare", diverge)
    with pytest.raises(ConfigError, match="step 3: the loss is nan"):
        run.train(resume=True)
    assert (run.output / STATE).read_bytes() == saved
    assert run.rows() == rows

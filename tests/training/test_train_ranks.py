"""Several processes train as one would: same losses, one set of files, and nobody waits for a dead one."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lesson
import pytest
import torch
from lesson import Lesson
from torch import Tensor, nn

from kangaroo.errors import ConfigError, KangarooError
from kangaroo.training import loop, ranks
from kangaroo.training.batches import Batch
from kangaroo.training.checkpoint import Progress
from kangaroo.training.loop import Interrupted, Trainer
from kangaroo.training.objective import Loss
from kangaroo.training.quick import RECIPE, train_quickly
from kangaroo.training.recipe import Recipe, ScheduleSection, read_recipe
from kangaroo.training.report import Update

MakeLesson = Callable[..., Lesson]
FORK = multiprocessing.get_context("fork")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_ranks(count: int, work: Callable[[int], object]) -> tuple[list[Any], Any]:
    """Processes as torchrun would start them, and where each puts (its number, result or error)."""
    port, results = free_port(), FORK.SimpleQueue()

    def run(number: int) -> None:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_RANK": str(number)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            results.put((number, work(number)))
        except (KangarooError, Interrupted) as error:
            results.put((number, error.args[0]))
            os._exit(2)

    processes = [FORK.Process(target=run, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    return processes, results


def as_ranks(count: int, work: Callable[[int], object]) -> list[Any]:
    """What each of the ranks returns, or says when it fails."""
    processes, results = start_ranks(count, work)
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join(20)
        assert process.exitcode is not None
    return [found[number] for number in range(count)]


def close(rows: list[dict[str, float]], others: list[dict[str, float]]) -> None:
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("template", [lesson.ADAPTER, lesson.MEDUSA, lesson.TARGET])
def test_two_ranks_train_as_one_process(make_lesson: MakeLesson, tmp_path: Path, template: str) -> None:
    alone, together = make_lesson(template), make_lesson(template)
    changes: dict[str, Any] = {"schedule__batch_sequences": 3, "schedule__accumulate": 2}
    if template is lesson.ADAPTER:
        changes["states"] = str(tmp_path / "states")
    alone.train(**changes)
    news: list[Any] = []
    best = as_ranks(2, lambda _: (together.train(**changes, report=news.append), len(news)))
    assert [folder for folder, _ in best] == [together.output / "best"] * 2
    assert best[0][1] > 0
    assert best[1][1] == 0
    close(together.rows(), alone.rows())


def test_ranks_may_be_another_number_when_resumed(make_lesson: MakeLesson) -> None:
    alone, together = make_lesson(), make_lesson()
    alone.train(schedule__batch_sequences=3)
    steps = {"schedule__batch_sequences": 3, "schedule__steps": 4}
    as_ranks(3, lambda _: together.train(**steps))
    assert [row["step"] for row in together.rows() if "loss" in row] == [1, 2, 3, 4]
    as_ranks(2, lambda _: together.train(resume=True, **(steps | {"schedule__steps": 6})))
    together.train(resume=True, schedule__batch_sequences=3)
    # The rate of the steps does not depend on where the run was stopped: nothing decays here.
    wanted = {row["step"]: row for row in alone.rows() if "loss" in row}
    close([row for row in together.rows() if "loss" in row], list(wanted.values()))


def test_what_ranks_must_have_in_common(make_lesson: MakeLesson, tmp_path: Path) -> None:
    run = make_lesson()
    found = as_ranks(2, lambda number: run.train(optimizer__learning_rate=(1e-3, 2e-3)[number]))
    assert found[0] == found[1]
    assert "optimizer.learning_rate is 0.001 on the first and 0.002 on rank 1" in found[0]
    found = as_ranks(2, lambda number: run.train(resume=number == 1))
    assert "--resume is False on the first and True on rank 1" in found[0]
    other = Lesson(run.recipe, lesson.write_rows(tmp_path / "other.jsonl", lesson.conversations(39)), run.output)
    found = as_ranks(2, lambda number: (run, other)[number].train())
    assert found[0] == found[1]
    assert "the ranks differ: data is" in found[0]
    found = as_ranks(3, lambda _: run.train())
    assert all("3 ranks cannot share micro-batches of 2 sequences" in text for text in found)
    assert not (run.output / "state.safetensors").exists()


def test_a_refusal_of_the_first_reaches_the_others(make_lesson: MakeLesson) -> None:
    run = make_lesson()
    run.train()
    first, second = as_ranks(2, lambda _: run.train())
    assert "holds a run that stopped after step 8" in first
    assert "rank 1 has lost the others" in second


def test_ranks_that_do_not_see_the_same_checkpoint(make_lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_lesson()
    run.train(schedule__steps=4)

    def work(number: int) -> object:
        if number == 1:
            monkeypatch.setattr(loop, "is_file", lambda path: False)
        return run.train(resume=True)

    assert all("the ranks differ: the checksum of the weights" in text for text in as_ranks(2, work))


def test_a_killed_rank_does_not_leave_the_others_waiting(make_lesson: MakeLesson) -> None:
    run = make_lesson()

    def die(news: Any) -> None:
        if isinstance(news, Update) and news.stage == "train" and news.done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    processes, results = start_ranks(2, lambda _: run.train(report=die))
    began = time.monotonic()
    number, text = results.get()
    assert number == 1
    assert "has lost the others" in text
    for process in processes:
        process.join(20)
    assert time.monotonic() - began < 20
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 2]
    as_ranks(2, lambda _: run.train(resume=True))
    assert [row["step"] for row in run.rows() if "loss" in row] == list(range(1, 9))


def test_all_stop_when_one_is_interrupted(make_lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_lesson()

    def work(number: int) -> object:
        step = Trainer.train_step

        def interrupted(trainer: Trainer) -> dict[str, float]:
            if number == 1 and trainer.step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return step(trainer)

        monkeypatch.setattr(Trainer, "train_step", interrupted)
        return run.train()

    assert all("stopped after step 5" in text for text in as_ranks(2, work))


class Line(nn.Module):
    """Least squares in float64: whatever ranks do differently shows at 1e-12."""

    device, frozen_bytes, evaluation_tokens = torch.device("cpu"), 0, 1

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float64))

    def parameters(self) -> dict[str, nn.Parameter]:  # type: ignore[override]
        return {"weight": self.weight}

    def loss(self, batch: Batch) -> Loss:
        x = (batch.tokens[batch.trained] + 1).double()
        rows = torch.stack([x.sin(), x.cos(), (2 * x).sin(), (3 * x).cos()], 1) @ self.weight.T
        return Loss((rows - x.sqrt()[:, None]).square().sum(), len(x), {"mean": float(rows.detach().sum())})

    def evaluate(self) -> dict[str, float]:
        return {"score": float(-self.weight.detach().square().sum())}

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)

    def activation_bytes(self, rows: int, length: int) -> int:
        return 0


class Uneven:
    """Rows of which some have nothing to learn from."""

    def batch(self, number: int, rows: int, length: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        tokens = torch.randint(50, (rows, length), generator=generator)
        trained = torch.rand(rows, length, generator=generator) < torch.arange(rows)[:, None] / rows
        return Batch(tokens, trained)


def test_the_arithmetic_of_a_step(tmp_path: Path) -> None:
    def fit(count: int) -> list[Any]:
        def work(number: int) -> tuple[list[dict[str, float]], Tensor]:
            schedule = ScheduleSection(steps=6, batch_sequences=4, sequence_length=9, accumulate=2)
            recipe = Recipe(kind="line", output=tmp_path / f"run-{count}", schedule=schedule)
            with ranks.joined():
                trainer = Trainer(Line(), Uneven(), recipe, Progress(0))  # type: ignore[arg-type]
                rows = [trainer.train_step() for _ in range(6)]
            for row in rows:
                del row["tokens_per_second"]
            return rows, trainer.objective.parameters()["weight"].detach().numpy()

        return as_ranks(count, work)

    ((alone, weights),) = fit(1)
    for count in (2, 4):
        for rows, found in fit(count):
            assert found == pytest.approx(weights, rel=1e-12)
            for row, other in zip(rows, alone, strict=True):
                assert row == pytest.approx(other, rel=1e-12)


def test_no_other_to_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="cannot meet the other ranks"), ranks.joined():
        pass


@pytest.mark.slow
def test_without_a_recipe(make_lesson: MakeLesson, target_folder: Path) -> None:
    run, news = make_lesson(), list[Any]()
    small: dict[str, Any] = {
        "data.held_out": 6,
        "evaluation": {"prompts": 4, "max_tokens": 12},
        "schedule": {"batch_sequences": 2, "sequence_length": 64},
        "run": {"mixed_precision": "off", "dtype": "float32"},
    }

    def work(_: int) -> tuple[Path, int]:
        best = train_quickly(
            str(target_folder), [run.data], news.append, minutes=0.3, output=run.output, settings=small
        )
        return best, len(news)

    first, second = as_ranks(2, work)
    assert first[0] == second[0] == run.output / "best"
    assert first[1] > second[1] == 0
    recipe = read_recipe(run.output / RECIPE)
    assert len([row for row in run.rows() if "loss" in row]) == recipe.schedule.steps >= 20


@pytest.mark.slow
def test_from_the_command_line(make_lesson: MakeLesson) -> None:
    alone, together = make_lesson(), make_lesson()
    alone.train()
    kangaroo = "import sys; from kangaroo.cli import main; sys.argv[0] = 'kangaroo'; main()"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    verb = [sys.executable, "-c", kangaroo, "train", str(together.recipe), "--data", str(together.data)]
    done = subprocess.run([*torchrun, *verb], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best weights:") == 1
    assert done.stderr.count("trained parameters;") == 1
    close(together.rows(), alone.rows())

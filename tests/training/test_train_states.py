"""StateCache of the target that are kept: the same training, and the deep layers run once for each row of text."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lesson
import pytest
import torch
from lesson import Lesson, build

from kangaroo.errors import CapacityError, DataError
from kangaroo.model import Target
from kangaroo.training.adapter import AdapterObjective
from kangaroo.training.batches import learnt_positions
from kangaroo.training.state_cache import Final

MakeLesson = Callable[..., Lesson]
Layers = list[tuple[int, int]]


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> Layers:
    """(rows, layers) of every pass through the target."""
    passes: Layers = []
    run = Target.run

    def counted(self: Target, x: torch.Tensor, *rest: Any, stop: int | None = None, **options: Any) -> Any:
        passes.append((len(x), self.num_layers if stop is None else stop))
        return run(self, x, *rest, stop=stop, **options)

    monkeypatch.setattr(Target, "run", counted)
    return passes


def gradients(objective: AdapterObjective, batch: Any) -> list[torch.Tensor]:
    objective.loss(batch).total.backward()  # type: ignore[no-untyped-call]
    found = [p.grad.clone() for p in objective.parameters().values() if p.grad is not None]
    objective.adapter.zero_grad()
    return found


def test_the_same_loss_without_the_deep_layers(make_lesson: MakeLesson, tmp_path: Path, layers_run: Layers) -> None:
    lesson = make_lesson()
    online, batches = build(lesson)
    kept, _ = build(lesson, states=str(tmp_path / "states"))
    rows, length = online.recipe.schedule.shape(0)
    batch = batches.batch(0, rows, length, 0)
    wanted = gradients(online, batch)
    layers_run.clear()
    first = gradients(kept, batch)
    depth, exit_layer = kept.target.num_layers, kept.adapter.config.exit_layer
    assert layers_run == [(rows, exit_layer), *[(1, depth)] * rows]
    layers_run.clear()
    again = gradients(kept, batch)
    assert layers_run == [(rows, exit_layer)]
    for a, b, c in zip(wanted, first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert torch.equal(b, c)


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 1000])
def test_counting_is_over_all_logits_and_takes_the_first_of_equals(vocabulary: int) -> None:
    states = torch.randint(-3, 3, (300, vocabulary)).float()
    as_they_are: Any = SimpleNamespace(norm=lambda x: x, logits=lambda x: x.clone())
    final = Final(states).counted(as_they_are)
    assert final.best is not None
    assert final.normaliser is not None
    torch.testing.assert_close(final.normaliser, states.logsumexp(-1))
    first = (states == states.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(final.best, first)


def test_a_row_has_its_states_wherever_it_stands(make_lesson: MakeLesson, tmp_path: Path, layers_run: Layers) -> None:
    kept, batches = build(make_lesson(), states=str(tmp_path / "states"))
    assert kept.kept is not None
    rows, length = kept.recipe.schedule.shape(0)
    batch = batches.batch(0, rows, length, 0)
    mask = learnt_positions(batch)
    together = kept.kept.at(batch, mask).states
    layers_run.clear()
    turned = kept.kept.at(batch[slice(1, None)], mask[1:]).states
    assert torch.equal(turned, together[int(mask[0].sum()) :])
    assert not layers_run
    # Another text, or the same text with other positions learnt from, has states of its own.
    kept.kept.at(batch[slice(0, 1)], torch.ones_like(mask[:1]))
    assert layers_run == [(1, kept.target.num_layers)]


def test_runs_share_them_but_targets_do_not(make_lesson: MakeLesson, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    shared = {"states": str(folder), "schedule__steps": 2}
    make_lesson().train(**shared)
    files = {path.name for path in folder.rglob("*.safetensors")}
    make_lesson().train(**shared, adapter__exit_layer=1)
    assert {path.name for path in folder.rglob("*.safetensors")} == files
    make_lesson().train(**shared, run__dtype="bfloat16")
    assert {path.name for path in folder.rglob("*.safetensors")} > files


def test_a_folder_that_is_full_takes_no_more(make_lesson: MakeLesson, tmp_path: Path, layers_run: Layers) -> None:
    folder, lesson = tmp_path / "states", make_lesson()
    free, batches = build(lesson, states=str(folder))
    rows, length = free.recipe.schedule.shape(0)
    batch = batches.batch(0, rows, length, 0)
    wanted = gradients(free, batch)
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == rows >= 2
    files[0].unlink()
    size = sum(path.stat().st_size for path in files[1:])
    bound, _ = build(lesson, states=str(folder), states_gigabytes=(size + 100) / 1e9)
    layers_run.clear()
    for _ in range(2):
        for a, b in zip(wanted, gradients(bound, batch), strict=True):
            assert torch.equal(a, b)
    assert [run for run in layers_run if run[1] == bound.target.num_layers] == [(1, bound.target.num_layers)] * 2
    assert len(list(folder.rglob("*.safetensors"))) == rows - 1


def test_heads_learn_the_same(make_lesson: MakeLesson, tmp_path: Path) -> None:
    online, kept = make_lesson(lesson.MEDUSA), make_lesson(lesson.MEDUSA)
    online.train()
    kept.train(states=str(tmp_path))
    for a, b in zip(online.rows(), kept.rows(), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)


def test_what_goes_wrong_with_files_is_named(
    make_lesson: MakeLesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "states"
    kept, batches = build(make_lesson(), states=str(folder))
    batch = batches.batch(0, 1, kept.recipe.schedule.sequence_length, 0)
    kept.loss(batch)
    (file,) = folder.rglob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:40], whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=file.name):
            kept.loss(batch)
    file.unlink()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kangaroo.training.state_cache.save_file", full)
    with pytest.raises(CapacityError, match="No space left"):
        kept.loss(batch)
    assert not list(folder.rglob("*.part"))

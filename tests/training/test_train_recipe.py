"""Recipes say what they mean, and their errors say what to change."""

from collections.abc import Callable
from pathlib import Path

import lesson
import pytest
import torch
from lesson import Lesson
from transformers import get_cosine_schedule_with_warmup

from kangaroo.errors import ConfigError
from kangaroo.training.recipe import ScheduleSection, read_recipe

ROOT = Path(__file__).parents[2]
MakeLesson = Callable[..., Lesson]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("little/target", "target"),
        ("little/draft-model", "target"),
        ("little/adapter", "adapter"),
        ("little/medusa", "medusa"),
        ("smollm2-adapter", "adapter"),
        ("smollm2-adapter-paper", "adapter"),
        ("smollm2-medusa", "medusa"),
        ("smollm2-draft-model", "target"),
        ("experiments/adapter", "adapter"),
    ],
)
def test_shipped_recipes_are_valid(name: str, kind: str) -> None:
    assert read_recipe(ROOT / "recipes" / f"{name}.toml").kind == kind


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule__stps", 3, "unknown key 'schedule.stps'; did you mean 'steps'"),
        ("adpter__exit_layer", 3, "unknown key 'adpter'; did you mean 'adapter'"),
        ("regenerate__promts", 3, "unknown key 'regenerate.promts'; did you mean 'prompts'"),
        ("schedule__steps", 0, "schedule.steps: .*greater than 0, got 0"),
        ("adapter__variant", "mlp", "adapter.variant: .*'mlp-only'.*got 'mlp'"),
        ("schedule__lengthen_at", 5, "schedule: lengthen_at and long_sequence_length go together"),
        ("loss__soft_cross_entropy", 0, "loss: soft_cross_entropy and acceptance must not both be 0"),
        ("run__compile", True, "run.compile is for targets"),
        ("evaluation__prompts", 99, "evaluation.prompts is 99, more than data.held_out"),
        ("kind", "adaptor", "kind must be one of target, adapter, medusa, got 'adaptor'"),
        ("schedule__decay", "step", "schedule.decay: .*'linear' or 'cosine', got 'step'"),
        ("target__name", "x", "'target' is not a section"),
        ("loss__acceptance", float("nan"), "loss.acceptance: .*finite"),
    ],
)
def test_mistakes_are_named(make_lesson: MakeLesson, key: str, value: object, message: str) -> None:
    overrides = {key: value}
    if key.startswith("regenerate"):
        overrides["regenerate__prompts"] = 2
    with pytest.raises(ConfigError, match=message):
        make_lesson().settings(**overrides)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe at"):
        read_recipe(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("kind = \n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_recipe(tmp_path / "bad.toml")
    (tmp_path / "short.toml").write_text('kind = "target"\n')
    with pytest.raises(ConfigError, match="'output' is missing"):
        read_recipe(tmp_path / "short.toml")


def test_schedule() -> None:
    schedule = ScheduleSection(
        steps=10, warmup_steps=2, decay_steps=4, batch_sequences=8, lengthen_at=5, long_sequence_length=1024
    )
    factors = [schedule.learning_rate_factor(step) for step in range(10)]
    assert factors == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [schedule.shape(4), schedule.shape(5)] == [(8, 256), (2, 1024)]


def test_cosine_decay() -> None:
    """From the peak to zero over the last steps, as transformers' schedule with the same warm-up."""
    schedule = ScheduleSection(steps=20, warmup_steps=4, decay_steps=16, decay="cosine")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, 4, 20)
    for step in range(20):
        # Theirs starts the warm-up at zero, one step earlier.
        wanted = (step + 1) / 4 if step < 4 else theirs.get_last_lr()[0]
        assert schedule.learning_rate_factor(step) == pytest.approx(wanted)
        optimizer.step()
        theirs.step()
    late = ScheduleSection(steps=10, decay_steps=4, decay="cosine")
    assert [late.learning_rate_factor(step) for step in (0, 6, 8)] == pytest.approx([1, 1, 0.5])


@pytest.mark.parametrize("change", [{"model.tokenizer": "demo"}, {"model.vocab_size": None}])
def test_a_target_has_one_vocabulary(make_lesson: MakeLesson, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="model: give vocab_size to train a tokenizer, or tokenizer to take"):
        read_recipe(make_lesson(lesson.TARGET).recipe, change)

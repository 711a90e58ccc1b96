import itertools
from collections.abc import Callable
from pathlib import Path

import lesson
import pytest
from lesson import Lesson


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    lesson.make_target(folder)
    return folder


@pytest.fixture
def make_lesson(tmp_path: Path, target_folder: Path) -> Callable[[str], Lesson]:
    """Lessons with separate output folders and recipes, on the same data."""
    numbers = itertools.count()

    def make(template: str = lesson.ADAPTER) -> Lesson:
        number = next(numbers)
        recipe, output = tmp_path / f"recipe-{number}.toml", tmp_path / f"run-{number}"
        recipe.write_text(template.format(target=target_folder, output=output))
        return Lesson(recipe, lesson.write_rows(tmp_path / "meals.jsonl", lesson.conversations()), output)

    return make

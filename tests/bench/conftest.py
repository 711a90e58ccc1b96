"""A tiny chat model, a few questions for it, and recipes for runs on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from little_runs import EARLY, QUESTIONS, TOKENS

from chat_model import save_chat_model
from kangaroo.bench import run
from kangaroo.bench.recipe import BenchRecipe
from kangaroo.toml import parse_table


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return path


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What drafting costs is timed in one test only."""
    monkeypatch.setattr(run, "method_costs", lambda decoder: None)


@pytest.fixture
def recipe(model: Path, questions: Path, tmp_path: Path, untimed: None) -> Callable[..., BenchRecipe]:
    def make(**changes: Any) -> BenchRecipe:
        table = {
            "model": str(model / "target"),
            "questions": str(questions),
            "output": str(tmp_path / "run"),
            "max_tokens": TOKENS,
            "dtype": "float64",
            "methods": [EARLY],
        }
        return parse_table(BenchRecipe, table | changes, "test")

    return make

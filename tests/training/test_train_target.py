"""Models trained from scratch over a tokenizer that exists already, such as draft models."""

import json
from collections.abc import Callable
from pathlib import Path

import lesson
import pytest
from lesson import Lesson
from transformers import AutoTokenizer

from kangaroo.errors import ConfigError, ModelError
from kangaroo.loading import load_model
from kangaroo.training import run as running
from kangaroo.training.run import take_tokenizer
from kangaroo.training.target import train_tokenizer
from little_model import TARGET

MakeLesson = Callable[..., Lesson]
TAKEN = lesson.TARGET.replace("vocab_size = 300", 'tokenizer = "{target}"')


def test_a_model_over_the_tokenizer_of_another(make_lesson: MakeLesson, target_folder: Path) -> None:
    best = make_lesson(TAKEN).train(schedule__steps=3)
    theirs, own = (AutoTokenizer.from_pretrained(folder) for folder in (target_folder, best))
    assert own.get_vocab() == theirs.get_vocab()
    assert own.chat_template == theirs.chat_template
    model = load_model(best)
    assert model.config.vocab_size == len(theirs)
    assert model.config.eos_token_id == theirs.eos_token_id
    assert json.loads((best / "training.json").read_text())["sha256"].keys() == {"data", "tokenizer"}


def test_a_run_over_another_tokenizer_is_not_the_same_run(
    make_lesson: MakeLesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is where it was, but holds something else."""
    whole, run = make_lesson(TAKEN), make_lesson(TAKEN)
    whole.train(schedule__steps=4)
    run.train(schedule__steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(running, "load_tokenizer", lambda _: train_tokenizer(["a b c"], 300, 64))
        with pytest.raises(ConfigError, match="the tokenizer is not the one"):
            run.train(resume=True, schedule__steps=4)
    run.train(resume=True, schedule__steps=4)
    assert run.rows()[-1] == whole.rows()[-1]


def test_tokenizers_that_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load a tokenizer"):
        take_tokenizer(str(tmp_path))


def test_an_existing_tokenizer() -> None:
    assert len(take_tokenizer(str(TARGET))) == 4096

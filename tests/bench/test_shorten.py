"""Prompts that do not fit lose the middle of their passage, and nothing else."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kangaroo.bench.shorten import KEPT, fit, without_middle
from kangaroo.errors import DataError
from kangaroo.text import Tokenizer
from little_model import TARGET

PASSAGE = "Begin. " + " ".join(f"The {number}th naïve café is open." for number in range(300)) + " How many are open?"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(AutoTokenizer.from_pretrained(TARGET))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_what_fits_is_left_alone(tokenizer: Tokenizer) -> None:
    messages = [user(PASSAGE)]
    tokens = tokenizer.encode(messages)
    for room in (len(tokens), len(tokens) + 1):
        fitted = fit(messages, tokenizer, room)
        assert (fitted.tokens, fitted.dropped) == (tokens, 0)


@pytest.mark.parametrize("missing", [1, 2, 7, 500])
def test_the_middle_goes_and_beginning_and_end_stay(tokenizer: Tokenizer, missing: int) -> None:
    messages = [user("Short."), {"role": "assistant", "content": PASSAGE * 2}, user(PASSAGE), user("Shorter.")]
    whole = tokenizer.encode(messages)
    room = len(whole) - missing
    fitted = fit(messages, tokenizer, room)
    assert len(fitted.tokens) <= room
    assert len(fitted.tokens) >= room - 3, "no more is cut than has to be"
    assert fitted.dropped == len(whole) - len(fitted.tokens)
    text = tokenizer.wrapped.decode(fitted.tokens)
    assert "Begin." in text
    assert "How many are open?" in text
    assert PASSAGE * 2 in text, "only users' messages are cut"
    assert messages[2]["content"] == PASSAGE, "the caller's messages stay as they are"


def test_a_second_passage_is_cut_when_the_first_is_used_up(tokenizer: Tokenizer) -> None:
    messages = [user(PASSAGE), user(PASSAGE)]
    fitted = fit(messages, tokenizer, 4 * KEPT)
    assert len(fitted.tokens) <= 4 * KEPT
    assert tokenizer.wrapped.decode(fitted.tokens).count("How many are open?") == 2


def test_what_cannot_be_cut_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="cannot be cut to the 20 that the context leaves"):
        fit([user(PASSAGE)], tokenizer, 20)


def test_characters_are_not_torn(tokenizer: Tokenizer) -> None:
    text = "🦘" * 100
    for count in range(1, 40):
        cut = without_middle(text, count, tokenizer)
        assert set(cut) == {"🦘"}
        assert len(cut) < len(text)


def test_without_a_chat_template_there_is_one_plain_turn(tmp_path: Path) -> None:
    bare = AutoTokenizer.from_pretrained(TARGET)
    bare.chat_template = None
    tokenizer = Tokenizer(bare)
    assert fit([user("Hello there")], tokenizer, 99).tokens == tokenizer.encode("Hello there")
    with pytest.raises(DataError, match="no chat template"):
        fit([user("a"), user("b")], tokenizer, 99)

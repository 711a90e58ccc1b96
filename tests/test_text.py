"""Text arrives whole: no split characters, no stop strings, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_model import SENTENCES
from kangaroo.errors import ConfigError, DataError
from kangaroo.text import TextStream, Tokenizer
from kangaroo.training.target import train_tokenizer

TOKENIZER = Tokenizer(train_tokenizer(SENTENCES, vocab_size=300, context=256))


def read(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stop)
    pieces = [stream.push(token) for token in tokens]
    return [*pieces, stream.flush()], stream


@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_never_hold_half_a_character(text: str) -> None:
    pieces, _ = read(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_unfinished_bytes_are_flushed_at_the_end() -> None:
    whole = TOKENIZER.encode("日")
    pieces, _ = read(whole[:-1])
    assert "".join(pieces[:-1]) == ""
    assert "\ufffd" in pieces[-1]


@given(st.text("ab ", max_size=20), st.text("ab ", min_size=1, max_size=3))
def test_text_ends_before_a_stop_string_wherever_token_borders_fall(text: str, stop: str) -> None:
    pieces, stream = read(TOKENIZER.encode(text), (stop,))
    assert "".join(pieces) == text.split(stop)[0]
    assert stream.stopped == (stop in text)


def test_special_tokens_are_not_text() -> None:
    tokens = TOKENIZER.encode([{"role": "user", "content": "tickets"}])
    assert "".join(read(tokens)[0]) == "tickets"


def test_conversations_end_where_the_answer_begins() -> None:
    tokens = TOKENIZER.encode([{"role": "user", "content": "eat"}])
    assert TOKENIZER.backend.decode(tokens, skip_special_tokens=False).endswith("<|end|><|assistant|>")
    assert tokens[0] == TOKENIZER.backend.token_to_id("<|begin|>")


@pytest.mark.parametrize("bad", [[], [{"role": "user"}], [{}]])
def test_malformed_conversations_are_refused(bad: list[dict[str, str]]) -> None:
    with pytest.raises(DataError, match="conversation"):
        TOKENIZER.encode(bad)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="stop"):
        TextStream(TOKENIZER, ("",))

"""Text arrives whole: no split characters, no stop strings, nothing lost."""

from typing import Any

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize(
    "given", [[3, 1, 4], (3, 1, 4), torch.tensor([3, 1, 4]), np.array([3, 1, 4]), [np.int64(3), np.int32(1), 4]]
)
def test_token_ids_are_taken_as_they_are(given: Any) -> None:
    ids = TOKENIZER.encode(given)
    assert ids == [3, 1, 4]
    assert all(type(token) is int for token in ids)


@pytest.mark.parametrize(
    "bad",
    [
        [1.0, 2.0],
        [1, True],
        [1, "a"],
        torch.tensor([1.5]),
        torch.tensor([[1, 2]]),
        torch.tensor(3),
        [torch.tensor(1.5)],
        [[1, 2]],
        7,
        None,
        {"a": 1},
        b"x",
    ],
)
def test_what_is_no_prompt_is_refused_on_one_line(bad: Any) -> None:
    with pytest.raises(DataError) as caught:
        TOKENIZER.encode(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [[], [{"role": "user"}], [{}]])
def test_malformed_conversations_are_refused(bad: list[dict[str, str]]) -> None:
    with pytest.raises(DataError, match="conversation"):
        TOKENIZER.encode(bad)


@pytest.mark.parametrize("stop", [("",), "", (3,)])
def test_stop_strings_that_are_none(stop: Any) -> None:
    with pytest.raises(ConfigError, match="stop"):
        TextStream(TOKENIZER, stop)


def test_a_bare_string_is_one_stop_string() -> None:
    stream = TextStream(TOKENIZER, "the")
    text = "".join([stream.push(token) for token in TOKENIZER.encode("eat with the others")] + [stream.flush()])
    assert (text, stream.stopped_by) == ("eat with ", "the")


def test_the_earliest_stop_string_is_named_and_of_two_there_the_one_complete_first() -> None:
    for stop, named in ((("ight", "to"), "to"), (("tonight", "ton"), "ton"), (("ht?", "eat"), "eat")):
        stream = TextStream(TOKENIZER, stop)
        for token in TOKENIZER.encode("like to eat" if named == "to" else "eat tonight?"):
            stream.push(token)
        stream.flush()
        assert stream.stopped_by == named


@given(st.text("ab ", max_size=20), st.text("ab ", min_size=1, max_size=3), st.integers(0, 12))
def test_stop_strings_count_only_if_completed_after_min_tokens(text: str, stop: str, least: int) -> None:
    tokens = TOKENIZER.encode(text)
    stream = TextStream(TOKENIZER, stop, least)
    pieces = [stream.push(token) for token in tokens]
    got = "".join([*pieces, stream.flush()])
    early = len(TOKENIZER.decode(tokens[:least]))
    ends = [at for at in range(len(text)) if text.startswith(stop, at) and at + len(stop) > early]
    assert got == (text[: ends[0]] if ends else text)
    assert stream.stopped == bool(ends)


def test_a_stop_string_that_came_too_early_does_not_count_while_a_longer_one_is_awaited() -> None:
    """ "b" is complete within the first tokens, and held back with them as the beginning of "abq"."""
    first = TOKENIZER.encode("ab")
    stream = TextStream(TOKENIZER, ("b", "abq"), len(first))
    pieces = [stream.push(token) for token in [*first, *TOKENIZER.encode("a")]]
    assert "".join([*pieces, stream.flush()]) == "aba"
    stream = TextStream(TOKENIZER, ("b", "abq"), len(first))
    pieces = [stream.push(token) for token in [*first, *TOKENIZER.encode("q")]]
    assert ("".join(pieces), stream.stopped_by) == ("", "abq")

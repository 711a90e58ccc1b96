"""Prompts that leave room for their answer: what does not fit is cut out of the middle of the longest user message.

That message is the passage to be summarised or searched; its beginning and its end, where the question is, stay.
"""

import itertools
from dataclasses import dataclass

from kangaroo.bench.questions import Messages
from kangaroo.errors import DataError
from kangaroo.text import Prompt, Tokenizer

KEPT = 32
"""Tokens of a message that are never cut out: half of them its first, half its last."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Prompt tokens, and how many were left out."""

    tokens: list[int]
    dropped: int


def fit(messages: Messages, tokenizer: Tokenizer, room: int) -> Fitted:
    """The prompt of a conversation in at most `room` tokens; see `shorten`."""
    return shorten(messages, tokenizer, room)[1]


def shorten(messages: Messages, tokenizer: Tokenizer, room: int) -> tuple[Messages, Fitted]:
    """A conversation whose prompt has at most `room` tokens, and that prompt.

    A tokenizer without a chat template is given the one message there is as plain text. Raises DataError for a longer
    conversation then, and where not even the shortest messages would fit.
    """
    if not tokenizer.has_chat_template and len(messages) > 1:
        raise DataError("this model's tokenizer has no chat template, so it cannot be asked more than one turn")
    messages = [dict(message) for message in messages]
    whole = len(_encode(messages, tokenizer))
    # What is left may take more tokens than expected where the two ends meet, so each try cuts one more than needed.
    for more in itertools.count():
        tokens = _encode(messages, tokenizer)
        excess = len(tokens) - room
        if excess <= 0:
            return messages, Fitted(tokens, whole - len(tokens))
        longest = max((m for m in messages if m["role"] == "user"), key=lambda m: _length(m["content"], tokenizer))
        spare = _length(longest["content"], tokenizer) - KEPT
        if spare <= 0:
            raise DataError(f"a prompt of {whole} tokens cannot be cut to the {room} that the context leaves for it")
        longest["content"] = without_middle(longest["content"], min(excess + more, spare), tokenizer)
    raise AssertionError("unreachable")


def without_middle(text: str, count: int, tokenizer: Tokenizer) -> str:
    """The text less `count` tokens in its middle."""
    offsets = tokenizer.backend.encode(text, add_special_tokens=False).offsets
    first = (len(offsets) - count) // 2
    return text[: offsets[first][0]] + text[offsets[first + count - 1][1] :]


def _encode(messages: Messages, tokenizer: Tokenizer) -> list[int]:
    prompt: Prompt = messages if tokenizer.has_chat_template else messages[0]["content"]
    return tokenizer.encode(prompt)


def _length(text: str, tokenizer: Tokenizer) -> int:
    return len(tokenizer.backend.encode(text, add_special_tokens=False).ids)

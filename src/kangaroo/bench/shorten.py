"""Prompts that fit: shortened in the middle to leave room for an answer, or brought to one length."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kangaroo.bench.questions import Messages, Question
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


BETWEEN = "\n\n"
"""Between questions."""


def bring_to(length: int, messages: Messages, tokenizer: Tokenizer, material: str) -> Fitted:
    """The prompt of a conversation in exactly `length` tokens.

    Of a conversation too long even when shortened, the oldest exchanges are left out. What is missing is the end of
    `material`, over and over if need be, before the last message, in the same turn of the user. It is counted in
    tokens, so it may begin within a word. Raises DataError as `shorten` does, and for a chat template that does not
    show a message as it is.
    """
    messages, fitted = _cut(messages, tokenizer, length)
    missing = length - len(fitted.tokens)
    if missing == 0:
        return fitted
    tokens = tokenizer.backend.encode(material, add_special_tokens=False).ids
    assert tokens, "there is something to put before it"
    filling = (tokens * -(-missing // len(tokens)))[-missing:]
    at = _start(messages, tokenizer)
    return Fitted([*fitted.tokens[:at], *filling, *fitted.tokens[at:]], fitted.dropped)


def material_for(question: Question, questions: Sequence[Question]) -> str:
    """What stands before a question: the first turns of all others, from the one after it around to the one before."""
    at = next((place for place, other in enumerate(questions) if other.id == question.id), 0)
    others = [other.turns[0] for other in (*questions[at + 1 :], *questions[:at]) if other.id != question.id]
    return "".join(f"{turn}{BETWEEN}" for turn in others or question.turns[:1])


def _cut(messages: Messages, tokenizer: Tokenizer, length: int) -> tuple[Messages, Fitted]:
    whole, first = None, 1 if messages[0]["role"] == "system" else 0
    while True:
        try:
            cut, fitted = shorten(messages, tokenizer, length)
        except DataError:
            if len(messages) - first < 3:
                raise
            whole = whole or len(tokenizer.encode(messages))
            messages = [*messages[:first], *messages[first + 2 :]]
        else:
            return cut, fitted if whole is None else Fitted(fitted.tokens, whole - len(fitted.tokens))


def _start(messages: Messages, tokenizer: Tokenizer) -> int:
    """The place of the last message's first token in the prompt of a conversation."""
    content = messages[-1]["content"]
    text, special = content, True
    if tokenizer.has_chat_template:
        text = str(tokenizer.wrapped.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        special = False
    first = text.rfind(content.strip())
    if first < 0:
        raise DataError("this model's chat template changes what a user says, so nothing can be put before it")
    spans = tokenizer.backend.encode(text, add_special_tokens=special).offsets
    return next(place for place, (_, end) in enumerate(spans) if end > first)

"""Prompts of one length: what is longer loses its middle (`shorten.py`), what is shorter follows other questions."""

from collections.abc import Sequence

from kangaroo.bench.questions import Messages, Question
from kangaroo.bench.shorten import Fitted, shorten
from kangaroo.errors import DataError
from kangaroo.text import Tokenizer

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

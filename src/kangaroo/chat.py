"""Conversations: what one looks like, and how a model reads it.

A chat template is a program that came with the model; whatever it does wrong is said of it, on one line.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from kangaroo.checks import shown
from kangaroo.errors import DataError

Messages = list[dict[str, str]]
LONGEST_TEXT = 10_000_000
"""Characters of a prompt or a document: more would be tokenised for minutes, and fit no context."""
_OF_TEMPLATES = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template's own code raises: it is Jinja's, and computes with what the messages hold."""


def are_messages(value: Any) -> bool:
    """Whether this is a list of one or more {"role", "content"} objects, both texts."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value
        )
    )


def need_text(text: Any, where: str) -> str:
    """The text, if it is one that can be tokenised. Raises DataError, which begins with `where`."""
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a text, got {shown(text)}")
    if len(text) > LONGEST_TEXT:
        raise DataError(f"{where}: {len(text):,} characters are more than the {LONGEST_TEXT:,} that are read; split it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the character at place {error.start} is half of a surrogate pair, as invalid bytes are read"
        ) from None
    return text


def render(tokenizer: Any, messages: Any, where: str, *, prompt: bool) -> str:
    """Messages by a tokenizer's chat template; a `prompt` ends where the answer begins.

    Raises DataError, which begins with `where`, for messages that are none or that the template refuses, and for a
    template that fails.
    """
    if not are_messages(messages):
        raise DataError(
            f'{where}: a conversation is a list of {{"role", "content"}} messages, both texts, got {shown(messages)}'
        )
    for message in messages:
        need_text(message["role"] + message["content"], where)
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except _OF_TEMPLATES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: the chat template refuses this conversation: {reason[:300]}") from None
    return need_text(text, where)

"""Between strings and tokens: chat templates, incremental detokenisation, stop strings."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from torch import Tensor

from kangaroo.errors import ConfigError, DataError, ModelError

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int] | Tensor
"""Text, chat messages, or token ids: a list, or a tensor of one dimension."""


def _token_ids(prompt: Any) -> list[int] | None:
    """The ids in a list, a tensor or an array of them; None for anything else."""
    given = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not given:
        return None
    plain = [token.item() if getattr(token, "ndim", None) == 0 else token for token in given]
    return plain if all(type(token) is int for token in plain) else None


def _is_conversation(prompt: Any) -> bool:
    messages = isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)
    return messages and bool(prompt) and all({"role", "content"} <= set(message) for message in prompt)


class Tokenizer:
    """A Hugging Face tokenizer, as decoding needs it.

    Raises ModelError for tokenizers without a fast backend, whose output cannot be detokenised token by token.
    """

    def __init__(self, tokenizer: Any):
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(f"{type(tokenizer).__name__} has no fast backend; save the tokenizer as tokenizer.json")
        self.wrapped, self.backend = tokenizer, tokenizer.backend_tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.wrapped.chat_template)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text as it stands, or of a conversation, rendered by the chat template up to the answer.

        Ids are taken as they are.

        Raises DataError for anything else.
        """
        if isinstance(prompt, str):
            return list(self.wrapped(prompt, verbose=False)["input_ids"])
        ids = _token_ids(prompt)
        if ids is not None:
            return ids
        if not _is_conversation(prompt):
            raise DataError(
                f'a prompt is text, a list of token ids, or a conversation: a list of {{"role", "content"}} messages; '
                f"got {type(prompt).__name__} {str(prompt)[:60]!r}"
            )
        if not self.has_chat_template:
            raise DataError("this model's tokenizer has no chat template: give the prompt as plain text")
        rendered = self.wrapped.apply_chat_template([*prompt], add_generation_prompt=True, tokenize=False)
        return list(self.wrapped(rendered, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self.backend.decode(list(tokens), skip_special_tokens=True))


class TextStream:
    """Turns one row's tokens into text as they arrive, never splitting a character, holding back possible stops.

    A stop string counts only if a token after the first `min_tokens` completes it. Raises ConfigError for stops that
    are not text, or empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), min_tokens: int = 0):
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(s, str) for s in self._stop):
            raise ConfigError(f"stop is a string or a list of them, got {str(stop)[:60]!r}")
        if not all(self._stop):
            raise ConfigError("a stop string must not be empty")
        self._tokenizer, self._min_tokens = tokenizer, min_tokens
        self._stream, self._tokens = DecodeStream(skip_special_tokens=True), list[int]()
        self._decoded, self._held, self._early = 0, "", 0  # held: what is not yet released, early: its first characters
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stopped_by is not None

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character or a stop string may still be under way."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer.backend, token) or ""
        self._decoded += len(piece)
        return self._release(piece)

    def flush(self) -> str:
        """What was held back, at the end of the row."""
        if self.stopped:
            return ""
        rest = self._release(self._tokenizer.decode(self._tokens)[self._decoded :])
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _release(self, piece: str) -> str:
        text = self._held + piece
        if len(self._tokens) <= self._min_tokens:
            self._early = len(text)
        # What ends among the early characters was complete before it counted.
        found = [(text.find(s, max(0, self._early - len(s) + 1)), s) for s in self._stop]
        found = [(at, s) for at, s in found if at >= 0]
        if found:
            at, self.stopped_by = min(found, key=lambda hit: (hit[0], len(hit[1])))
            self._held = ""
            return text[:at]
        keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        self._early = max(0, self._early - (len(text) - keep))
        return text[: len(text) - keep]

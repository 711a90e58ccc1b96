"""Between strings and tokens: chat templates, incremental detokenisation, stop strings."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from torch import Tensor

from kangaroo.chat import are_messages, need_text, render
from kangaroo.checks import shown
from kangaroo.errors import ConfigError, DataError, ModelError
from kangaroo.stops import StopString

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int] | Tensor
"""Text, chat messages, or token ids: a list, or a tensor of one dimension."""


def _token_ids(prompt: Any) -> list[int] | None:
    """The ids in a list, a tensor or an array of them; None for anything else."""
    given = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not given:
        return None
    plain = [token.item() if getattr(token, "ndim", None) == 0 else token for token in given]
    return plain if all(type(token) is int for token in plain) else None


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
            need_text(prompt, "the prompt")
            return list(self.wrapped(prompt, verbose=False)["input_ids"])
        ids = _token_ids(prompt)
        if ids is not None:
            return ids
        if not are_messages(prompt):
            raise DataError(
                'a prompt is text, a list of token ids, or a conversation: a list of {"role", "content"} messages, '
                f"both texts; got {shown(prompt)}"
            )
        if not self.has_chat_template:
            raise DataError("this model's tokenizer has no chat template: give the prompt as plain text")
        rendered = render(self.wrapped, prompt, "the prompt", prompt=True)
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
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, Sequence) or any(not isinstance(s, str) or not s for s in stops):
            raise ConfigError(f"stop is a text or a list of texts, none of them empty, got {shown(stop)}")
        self._stops = [StopString(s) for s in stops]
        self._tokenizer, self._min_tokens = tokenizer, min_tokens
        self._stream, self._tokens = DecodeStream(skip_special_tokens=True), list[int]()
        self._decoded, self._held = 0, ""
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
        early = len(self._tokens) <= self._min_tokens
        ends = [(s.stop, s.read(piece, past_ends=early)) for s in self._stops]
        found = [(len(self._held) + end - len(stop), stop) for stop, end in ends if end is not None]
        if found:
            at, self.stopped_by = min(found, key=lambda hit: (hit[0], len(hit[1])))
            self._held = ""
            return text[:at]
        keep = max((s.matched for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

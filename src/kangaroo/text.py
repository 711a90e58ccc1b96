"""Between strings and tokens: chat templates, incremental detokenisation, stop strings."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from kangaroo.chat import are_messages, need_text, render
from kangaroo.checks import shown
from kangaroo.errors import ConfigError, DataError, ModelError
from kangaroo.stops import StopString

Prompt = str | Sequence[dict[str, str]]


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
        """Token ids of a text as it stands, or of a conversation, rendered by the chat template up to the answer."""
        if isinstance(prompt, str):
            need_text(prompt, "the prompt")
            return list(self.wrapped(prompt, verbose=False)["input_ids"])
        if not are_messages(prompt):
            raise DataError(
                f'a conversation is a list of {{"role", "content"}} messages, both texts, got {shown(prompt)}'
            )
        if not self.has_chat_template:
            raise DataError("this model's tokenizer has no chat template: give the prompt as plain text")
        rendered = render(self.wrapped, prompt, "the prompt", prompt=True)
        return list(self.wrapped(rendered, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self.backend.decode(list(tokens), skip_special_tokens=True))


class TextStream:
    """Turns one row's tokens into text as they arrive, never splitting a character, holding back possible stops."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        stop = (stop,) if isinstance(stop, str) else stop
        if any(not isinstance(s, str) or not s for s in stop):
            raise ConfigError(f"stop strings are texts, none of them empty, got {shown(stop)}")
        self._tokenizer, self._stops = tokenizer, [StopString(s) for s in stop]
        self._stream, self._tokens = DecodeStream(skip_special_tokens=True), list[int]()
        self._decoded, self._held = 0, ""
        self.stopped = False

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
        ends = [(s, s.read(piece)) for s in self._stops]
        found = [len(self._held) + end - len(s.stop) for s, end in ends if end is not None]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((s.matched for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

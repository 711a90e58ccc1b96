"""From pieces of answers to responses, whole or in chunks, in the shape that OpenAI's clients read."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from kangaroo.completion import Piece, Stats
from kangaroo.serve.protocol import Asked, ChatRequest
from kangaroo.text import Tokenizer
from kangaroo.tickets import Ticket

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has not."""


class Reply:
    """One response as it grows: what its chunks share, and how a piece looks in it."""

    def __init__(self, asked: Asked, model: str, fingerprint: str, tokenizer: Tokenizer):
        self.asked, self.chat, self._tokenizer = asked, isinstance(asked, ChatRequest), tokenizer
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        whole, chunk = ("chat.completion", "chat.completion.chunk") if self.chat else ("text_completion",) * 2
        self._head = {
            "id": self.id,
            "object": chunk if asked.stream else whole,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._offsets: dict[int, int] = {}

    def wrap(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response or a chunk with these choices."""
        return {**self._head, "choices": list(choices), **more}

    def opening(self, index: int) -> dict[str, Any]:
        """The choice of a chat's first chunk, which says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """The choice of a chunk for one piece; None if the piece has nothing to say."""
        wants = self.asked.wants.tokens or piece.logprob is not None
        if not piece.text and piece.finish_reason is None and not wants:
            return None
        content = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        return self._choice(index, content, [piece], piece.finish_reason)

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The choice of a whole response."""
        text = "".join(piece.text for piece in pieces)
        message = {"role": "assistant", "content": text, "refusal": None}
        content: dict[str, Any] = {"message": message} if self.chat else {"text": text}
        return self._choice(index, content, pieces, pieces[-1].finish_reason)

    def _choice(
        self, index: int, content: dict[str, Any], pieces: Sequence[Piece], reason: str | None
    ) -> dict[str, Any]:
        found = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        if pieces[0].logprob is not None:
            found["logprobs"] = self._chat_logprobs(pieces) if self.chat else self._text_logprobs(index, pieces)
        if self.asked.wants.tokens:
            found["tokens"] = [{"text": piece.text, "drafted": piece.drafted} for piece in pieces]
        return found

    def _chat_logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = [
            self._candidate(piece.token, piece.logprob)
            | {"top_logprobs": [self._candidate(token, log) for token, log in piece.top_logprobs]}
            for piece in pieces
        ]
        return {"content": content, "refusal": None}

    def _candidate(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        whole = "\ufffd" not in text  # else the token is part of a character, whose bytes the tokenizer keeps to itself
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}

    def _text_logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        texts = [self._text(piece.token) for piece in pieces]
        offset, offsets = self._offsets.get(index, 0), list[int]()
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [_finite(piece.logprob) for piece in pieces],
            "top_logprobs": [{self._text(t): _finite(log) for t, log in piece.top_logprobs} for piece in pieces],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return str(self._tokenizer.backend.decode([token], skip_special_tokens=False))


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def usage(tickets: Sequence[Ticket], prompt_tokens: Sequence[int]) -> dict[str, Any]:
    """Tokens read and written. `prompt_tokens` of every prompt: n answers to one have read it once."""
    read, written = sum(prompt_tokens), sum(ticket.stats.emitted for ticket in tickets)
    each = len(tickets) // len(prompt_tokens)
    cached = sum(ticket.cached_prompt_tokens for ticket in tickets[::each])
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def speculation(tickets: Sequence[Ticket], drafter: str, *, statistics: bool) -> dict[str, Any]:
    """Whether there was drafting, or why not; with `statistics` what it came to over all answers of the request."""
    status = ", ".join(sorted({ticket.speculation for ticket in tickets}))
    if not statistics:
        return {"status": status}
    whole = Stats.total(ticket.stats for ticket in tickets)
    histogram = [whole.lengths.count(length) for length in range(1, max(whole.lengths, default=0) + 1)]
    return {
        "status": status,
        "drafter": drafter,
        "rounds": whole.rounds,
        "emitted": whole.emitted,
        "drafted": whole.drafted,
        "accepted": whole.accepted,
        "mean_acceptance_length": whole.compression_rate,
        "acceptance_rate": whole.accepted / whole.drafted if whole.drafted else 0.0,
        "histogram": histogram,
        "tokens_per_second": whole.tokens_per_second,
        "cached_prompt_tokens": sum(ticket.cached_prompt_tokens for ticket in tickets),
    }

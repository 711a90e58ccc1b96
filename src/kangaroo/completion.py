"""Answers as users see them: pieces while they grow, completions when they are done, and what they cost."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kangaroo.decode import Round
from kangaroo.logprobs import TokenLogprobs
from kangaroo.state import Request
from kangaroo.text import TextStream

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One emitted token, with the text that it has made readable. The texts of an answer's pieces are its text."""

    text: str
    """"" for a token without text, or whose text is still held back."""
    token: int
    index: int
    """The token's place in the answer, from 0."""
    drafted: bool
    """Whether it was drafted and accepted; false for the target's own."""
    logprob: float | None = None
    """Natural logarithm of its probability, if log-probabilities were asked for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the best candidates, as many as were asked for."""
    finish_reason: FinishReason | None = None
    """On an answer's last piece: why it ended."""
    answer: int = 0
    """Which answer of the call it belongs to."""


@dataclass(slots=True)
class Stats:
    """Counts and seconds of one answer, or of several added up. A round counts once for every answer it advanced.

    A batch runs together. Of the seconds of its prefill every answer gets an equal share, of the seconds of each round
    every answer that the round advanced; so the sum over a batch is the batch's.
    """

    rounds: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    """Drafted tokens that were emitted."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)
    """Tokens emitted by each round, in order."""
    drafts: list[int] = field(default_factory=list)
    """Tokens drafted in each round, in order."""

    @classmethod
    def total(cls, parts: Iterable["Stats"]) -> "Stats":
        """Several answers as one: their lists one after another."""
        whole = cls()
        for part in parts:
            for name in ("rounds", "emitted", "drafted", "accepted", "prefill_seconds", "decode_seconds"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
            whole.lengths += part.lengths
            whole.drafts += part.drafts
        return whole

    @property
    def compression_rate(self) -> float:
        """CR: mean tokens per round, the target's own one included."""
        return self.emitted / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over prefill and decoding time."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.emitted / seconds if seconds else 0.0

    def add(self, pieces: Sequence[Piece], drafted: int) -> None:
        """Count a round. What a stop string cut off is not among its pieces."""
        self.rounds += 1
        self.emitted += len(pieces)
        self.drafted += drafted
        self.accepted += sum(piece.drafted for piece in pieces)
        self.lengths.append(len(pieces))
        self.drafts.append(drafted)


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer."""

    text: str
    tokens: list[int]
    """Every emitted token, one that ended the answer included."""
    drafted: list[bool]
    """Which of them were drafted and accepted."""
    finish_reason: FinishReason
    """"stop" (an end-of-sequence token, a token or string to stop at) or "length" (max_tokens or the context)."""
    stopped_by: str | int | None
    """The string or the token id that ended it; None for "length"."""
    prompt_tokens: int
    """Tokens of the prompt."""
    stats: Stats
    logprobs: list[TokenLogprobs] | None = None
    """Of every token, if asked for."""


class Transcript:
    """One answer as it grows: tokens in, pieces out."""

    def __init__(self, request: Request, ends: Iterable[int], text: TextStream, answer: int):
        """`ends` are the tokens that end it; `answer` is its number in the call."""
        self._request, self._ends, self._text, self._answer = request, frozenset(ends), text, answer
        self._pieces: list[Piece] = []
        self._logprobs: list[TokenLogprobs] | None = None if request.logprobs is None else []
        self.stats = Stats()
        self.stopped_by: str | int | None = None
        """The string or the token that has ended it."""
        self.completion: Completion | None = None
        """The whole answer, once it is there."""

    @property
    def ended(self) -> bool:
        """Whether the whole answer is there."""
        return self.completion is not None

    def read(self, done: Round, row: int) -> list[Piece]:
        """What a round has emitted in its row, up to the token that ends the answer; the last is the target's own."""
        emitted, pieces = done.emitted[row], list[Piece]()
        for place, token in enumerate(emitted):
            logprobs = done.logprobs[row][place] if done.logprobs is not None and self._logprobs is not None else None
            pieces.append(self._piece(token, place < len(emitted) - 1, logprobs))
            if pieces[-1].finish_reason is not None:
                break
        self.stats.add(pieces, done.drafted[row])
        if pieces[-1].finish_reason is not None:
            self._complete(pieces[-1].finish_reason)
        return pieces

    def _piece(self, token: int, drafted: bool, logprobs: TokenLogprobs | None) -> Piece:
        index = len(self._pieces)
        text = self._text.push(token)
        ends = token in self._ends
        if ends or index + 1 == self._request.max_tokens:
            text += self._text.flush()
            self.stopped_by = token if ends else None
        reason: FinishReason | None = "length" if index + 1 == self._request.max_tokens else None
        if self._text.stopped:
            self.stopped_by = self._text.stopped_by
        if self.stopped_by is not None:
            reason = "stop"
        log, top = (None, ()) if logprobs is None else (logprobs.logprob, logprobs.top)
        piece = Piece(text, token, index, drafted, log, top, reason, self._answer)
        self._pieces.append(piece)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
        return piece

    def _complete(self, reason: FinishReason) -> None:
        self.completion = Completion(
            "".join(piece.text for piece in self._pieces),
            [piece.token for piece in self._pieces],
            [piece.drafted for piece in self._pieces],
            reason,
            self.stopped_by,
            len(self._request.prompt),
            self.stats,
            self._logprobs,
        )

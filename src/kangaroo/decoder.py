"""Strings in, pieces of text out: a target, a drafter and a tokenizer in one object."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kangaroo import demo
from kangaroo.checks import shown
from kangaroo.decode import Round, decode, start
from kangaroo.drafters import FILES, MakeDrafter, find_drafter
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import DataError
from kangaroo.loading import end_tokens, load_model, load_tokenizer
from kangaroo.machine import synchronise
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request, State
from kangaroo.text import Prompt, TextStream, Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Newly readable text."""

    text: str
    token: int
    drafted: bool
    """Whether its token was drafted and accepted; false for the target's own."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer."""

    text: str
    tokens: list[int]
    """Every emitted token, an end-of-sequence token included."""
    drafted: list[bool]
    """Which of them were drafted and accepted."""
    finish_reason: str
    """"stop" (end of sequence or a stop string) or "length" (max_tokens or the context)."""


@dataclass(slots=True)
class Stats:
    """Counts and seconds of one call. A round counts once for every row it advanced."""

    rounds: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    """Drafted tokens that were emitted."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)
    """Tokens emitted by each row-round, in order."""
    drafts: list[int] = field(default_factory=list)
    """Tokens drafted in each row-round, in order."""

    @property
    def compression_rate(self) -> float:
        """CR: mean tokens per round, the target's own one included."""
        return self.emitted / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over prefill and decoding time, all rows together."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.emitted / seconds if seconds else 0.0

    def add(self, pieces: Sequence[Piece], drafted: int) -> None:
        """Count one row's round. What a stop string cut off is not among its pieces."""
        self.rounds += 1
        self.emitted += len(pieces)
        self.drafted += drafted
        self.accepted += sum(piece.drafted for piece in pieces)
        self.lengths.append(len(pieces))
        self.drafts.append(drafted)


class Decoder:
    """Generates text with one target and one drafter.

    `stats` describes the latest call; while a stream is being read, the call so far.
    """

    def __init__(
        self,
        target: Target,
        make_drafter: MakeDrafter,
        tokenizer: Tokenizer,
        eos: Sequence[int],
        files: Mapping[str, str | Path] | None = None,
    ):
        """`files` are those that came with the model: for drafters whose settings do not name their own."""
        self.target, self.make_drafter, self.tokenizer, self.eos = target, make_drafter, tokenizer, tuple(eos)
        self.files = dict(files or {})
        self.stats = Stats()

    def with_drafter(self, name: str, **settings: Any) -> "Decoder":
        """The same target with another drafter. Raises ConfigError, AdapterError or DataError."""
        entry = find_drafter(name)
        own = {entry.files: self.files[entry.files]} if entry.files in self.files else {}
        given = {key: value for key, value in settings.items() if value is not None}
        make_drafter = entry.build(self.target, self.tokenizer.wrapped, own | given)
        return Decoder(self.target, make_drafter, self.tokenizer, self.eos, self.files)

    def plain(self) -> "Decoder":
        """The same target without drafting: the baseline, on the same weights and kernels."""
        return self.with_drafter("none")

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Text as it becomes readable. Prompts are text taken as it stands, or chat messages.

        Errors in the arguments are raised here, before the first piece is asked for.
        """
        text = TextStream(self.tokenizer, stop)
        state, rounds = self._start([prompt], max_tokens, sampling or Sampling())
        return self._read(state, rounds, text)

    def _read(self, state: State, rounds: Iterator[Round], text: TextStream) -> Iterator[Piece]:
        last = -1
        for done in rounds:
            read = _push(text, done.emitted[0])
            self.stats.add(read, done.drafted[0])
            if text.stopped:
                state.finish(0)
            for piece in read:
                last = piece.token
                if piece.text:
                    yield piece
        if rest := text.flush():
            yield Piece(rest, last, False)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Complete a batch of prompts together; each gets the text it would get alone.

        Raises DataError for prompts that are none, or a single one outside a list.
        """
        if isinstance(prompts, str):
            raise DataError(f"prompts must be a list, got the text {prompts[:40]!r}; write generate([prompt])")
        if not isinstance(prompts, Sequence):
            raise DataError(f"prompts must be a list of texts or conversations, got {shown(prompts)}")
        texts = [TextStream(self.tokenizer, stop) for _ in prompts]
        state, rounds = self._start(prompts, max_tokens, sampling or Sampling())
        pieces: list[list[Piece]] = [[] for _ in prompts]
        for done in rounds:
            for row, emitted in enumerate(done.emitted):
                if emitted:
                    read = _push(texts[row], emitted)
                    pieces[row] += read
                    self.stats.add(read, done.drafted[row])
                    if texts[row].stopped:
                        state.finish(row)
        return [self._completion(text, read) for text, read in zip(texts, pieces, strict=True)]

    def _completion(self, text: TextStream, pieces: list[Piece]) -> Completion:
        rest = text.flush()
        return Completion(
            "".join(piece.text for piece in pieces) + rest,
            [piece.token for piece in pieces],
            [piece.drafted for piece in pieces],
            "stop" if text.stopped or pieces[-1].token in self.eos else "length",
        )

    def _start(self, prompts: Sequence[Prompt], max_tokens: int, sampling: Sampling) -> tuple[State, Iterator[Round]]:
        requests = [Request(self.tokenizer.encode(prompt), sampling, max_tokens) for prompt in prompts]
        drafter, self.stats = self.make_drafter(), Stats()
        began = time.perf_counter()
        state = start(self.target, drafter, requests, eos=self.eos)
        synchronise(self.target.device)
        self.stats.prefill_seconds = time.perf_counter() - began
        return state, self._timed(decode(self.target, drafter, state), self.stats)

    def _timed(self, rounds: Iterator[Round], stats: Stats) -> Iterator[Round]:
        while True:
            began = time.perf_counter()
            done = next(rounds, None)
            if done is None:
                return
            stats.decode_seconds += time.perf_counter() - began
            yield done


def _push(text: TextStream, emitted: list[int]) -> list[Piece]:
    """A round's tokens as pieces, up to the one that completes a stop string. The last token is the target's own."""
    pieces = []
    for place, token in enumerate(emitted, 1):
        pieces.append(Piece(text.push(token), token, place < len(emitted)))
        if text.stopped:
            break
    return pieces


def load(
    model: str | Path | PreTrainedModel,
    *,
    drafter: str = "kangaroo",
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Decoder:
    """A Decoder for a model: "demo" (ships with the project), a folder, a hub name, or a model already loaded.

    `settings` say where drafters' files lie (adapter, heads, draft_model, datastore: the demo model brings them), and
    how this one drafts (max_draft, threshold, exit_layer, ...). `dtype` defaults to the checkpoint's on a
    GPU and to what the CPU runs fastest otherwise. For device maps or quantisation, load the model with transformers
    and pass it in.

    Raises ConfigError, ModelError, AdapterError or DataError.
    """
    find_drafter(drafter)  # a wrong name should not wait for the model to load
    files = {name: settings.pop(name) for name in FILES if settings.get(name) is not None}
    if str(model) == "demo":
        model, files = demo.TARGET, demo.FILES | files
    loaded = model if isinstance(model, PreTrainedModel) else load_model(model, dtype)
    tokenizer = Tokenizer(tokenizer or load_tokenizer(loaded.config._name_or_path))
    plain = Decoder(Target(loaded), NoDrafter, tokenizer, end_tokens(loaded), files)
    return plain.with_drafter(drafter, **settings)

"""Answers as they are written: iterators of pieces that can be closed, each with counts and completions of its own."""

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from kangaroo.completion import Completion, Piece, Stats, Transcript
from kangaroo.decode import decode, start
from kangaroo.drafters.base import Drafter
from kangaroo.machine import synchronise
from kangaroo.model import Target
from kangaroo.state import Request, State
from kangaroo.text import TextStream


class BatchStream:
    """Pieces of several answers, in the order in which they come; `Piece.answer` says to which each belongs.

    It holds the rows' memory until its end or until it is closed, by `close`, by leaving its `with` block, or with the
    last reference to it. Prompts have run when it is made.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        requests: Sequence[Request],
        texts: Sequence[TextStream],
        eos: Sequence[int],
    ):
        """`requests` are checked ones, with a text each. Raises what `start` raises."""
        self._transcripts = [
            Transcript(request, request.ends(eos), text, answer)
            for answer, (request, text) in enumerate(zip(requests, texts, strict=True))
        ]
        began = time.perf_counter()
        state = start(target, drafter, requests, eos=eos)
        synchronise(target.device)
        share = (time.perf_counter() - began) / len(requests)
        for transcript in self._transcripts:
            transcript.stats.prefill_seconds = share
        self._pieces: Iterator[Piece] = _run(target, drafter, state, self._transcripts)

    @property
    def stats(self) -> list[Stats]:
        """Counts and seconds of every answer so far."""
        return [transcript.stats for transcript in self._transcripts]

    @property
    def completions(self) -> list[Completion | None]:
        """Every answer; None for those that are not finished."""
        return [transcript.completion for transcript in self._transcripts]

    def close(self) -> None:
        """Stop and free the rows. What was not finished stays so."""
        self._pieces = iter(())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _run(target: Target, drafter: Drafter, state: State, transcripts: Sequence[Transcript]) -> Iterator[Piece]:
    rounds = decode(target, drafter, state)
    while any(transcript.completion is None for transcript in transcripts):
        began = time.perf_counter()
        done = next(rounds)
        seconds, pieces = time.perf_counter() - began, list[Piece]()
        working = [row for row, emitted in enumerate(done.emitted) if emitted]
        for row in working:
            pieces += transcripts[row].read(done, row)
            transcripts[row].stats.decode_seconds += seconds / len(working)
            if isinstance(transcripts[row].stopped_by, str):  # the other reasons are known to the state
                state.finish(row)
        yield from pieces


class AnswerStream:
    """Pieces of one answer as they come. It can be closed, and is a context manager that does so."""

    def __init__(self, batch: BatchStream):
        self._batch = batch

    @property
    def stats(self) -> Stats:
        """Counts and seconds so far."""
        return self._batch.stats[0]

    @property
    def completion(self) -> Completion | None:
        """The whole answer, once its last piece has been read; else None."""
        return self._batch.completions[0]

    def close(self) -> None:
        """Stop and free the memory."""
        self._batch.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        return next(self._batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

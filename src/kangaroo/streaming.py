"""Answers as they are written: iterators of pieces that can be closed, each with counts and completions of its own."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from kangaroo.completion import Completion, Piece, Stats, Transcript
from kangaroo.drafters.base import Drafter
from kangaroo.model import Target
from kangaroo.scheduler import Limits, Scheduler, Task
from kangaroo.state import Request
from kangaroo.text import TextStream


class _Closable(Iterator[Piece]):
    """An iterator that is closed by leaving its `with` block."""

    @abstractmethod
    def close(self) -> None:
        """Stop and free what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BatchStream(_Closable):
    """Pieces of several answers, in the order in which they come; `Piece.answer` says to which each belongs.

    It holds the rows' memory until its end or until it is closed, by `close`, by leaving its `with` block, or with the
    last reference to it. Prompts have run when it is made.
    """

    def __init__(
        self,
        target: Target,
        make_drafter: Callable[[], Drafter],
        requests: Sequence[Request],
        texts: Sequence[TextStream],
        eos: Sequence[int],
        rows: int | None = None,
    ):
        """`requests` are checked ones, with a text each; `rows` is how many run at once, None: all of them.

        Raises CapacityError if the rows do not fit in memory.
        """
        self._transcripts = [
            Transcript(request, request.ends(eos), text, answer)
            for answer, (request, text) in enumerate(zip(requests, texts, strict=True))
        ]
        scheduler = Scheduler(target, make_drafter, eos, Limits(len(requests) if rows is None else rows))
        for request, transcript in zip(requests, self._transcripts, strict=True):
            scheduler.submit(Task(request, transcript))
        scheduler.read_prompts()
        self._pieces: Iterator[Piece] = _run(scheduler)

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

    def __next__(self) -> Piece:
        return next(self._pieces)


def _run(scheduler: Scheduler) -> Iterator[Piece]:
    while scheduler.busy:
        for _, pieces in scheduler.step().pieces:
            yield from pieces


class AnswerStream(_Closable):
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

    def __next__(self) -> Piece:
        return next(self._batch)

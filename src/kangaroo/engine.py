"""An engine: a scheduler in a thread of its own, for requests that come as they please."""

import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from kangaroo.arguments import Arguments, encode_all
from kangaroo.checks import need_whole, shown
from kangaroo.completion import Completion, Piece, Transcript
from kangaroo.constraints import Processor
from kangaroo.decode import check_request
from kangaroo.drafters.base import Drafter
from kangaroo.errors import CapacityError, ConfigError
from kangaroo.forced import forcing
from kangaroo.logprobs import Logprobs
from kangaroo.machine import available_bytes
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.scheduler import Limits
from kangaroo.schedulers import Schedulers
from kangaroo.text import Prompt, Tokenizer
from kangaroo.tickets import Job, Ticket
from kangaroo.worker import EngineStatus, Worker


class Answering(Protocol):
    """What an engine needs of a Decoder, under the same names."""

    target: Target
    make_drafter: Callable[[], Drafter]
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    drafter_name: str
    drafter: str
    """What is drafted with, in words: its name, and after a comma what is set."""


class Engine:
    """Answers requests as they come, many at once, each with the text it would get alone.

    It has a thread of its own, and is used from any number of others. Leaving its `with` block closes it.
    """

    def __init__(
        self,
        decoder: Answering,
        *,
        rows: int = 16,
        queue: int = 256,
        capacity: int | None = None,
        prefix_tokens: int = 4096,
        also: Sequence[Answering] = (),
    ):
        """`rows` requests run at once, and `queue` more may wait. `capacity` is how many tokens each may have, prompt
        included: by default the context, or what half of the memory that is left holds. Of prompts that have been run,
        `prefix_tokens` tokens are kept for later ones that begin alike.

        Of `also`, decoders with the same target, a request may choose the drafter. All share the rows; each has rounds
        of its own, and keeps prompts by itself once it has been asked for.

        Raises ConfigError, or CapacityError if the rows would not fit in memory.
        """
        for name, value, least in (("rows", rows, 1), ("queue", queue, 0), ("prefix_tokens", prefix_tokens, 0)):
            if need_whole(name, value) < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        self.decoder, self._encoding = decoder, threading.Lock()
        target, makers = decoder.target, dict[str, Callable[[], Drafter]]()
        self.drafters: dict[str, str] = {}
        """Those that a request may choose, the one it gets if it chooses none first: by name, in words."""
        for one in (decoder, *also):
            name = one.drafter_name
            if one.target is not target:
                raise ConfigError(f"the decoder with {one.drafter} has another target: make it with with_drafter")
            if name in makers:
                raise ConfigError(f"there are two drafters called {name}: leave one of them out")
            makers[name], self.drafters[name] = forcing(one.make_drafter, target), one.drafter
        self.capacity = _capacity(target, [make() for make in makers.values()], rows, capacity)
        self._limits = Limits(rows, self.capacity, prefix_tokens)
        self._worker = Worker(Schedulers(target, makers, decoder.eos, self._limits), queue)
        weakref.finalize(self, self._worker.close, 0.0)

    def submit(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        max_tokens: int = 256,
        min_tokens: int = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: Logprobs | int | None = None,
        processor: Processor | None = None,
        speculate: bool = True,
        max_draft: int | None = None,
        drafter: str | None = None,
    ) -> Ticket:
        """Have a prompt answered; without `speculate` nothing is drafted for it, which changes nothing in the text.

        Nor does `drafter`, one of `drafters`, or `max_draft`, tokens to draft at once if fewer than the drafter would.

        Raises ConfigError or DataError for the arguments, CapacityError for a request longer than a row, QueueFull if
        too many wait already, EngineClosed.
        """
        arguments = Arguments(
            sampling=sampling,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            processor=processor,
            speculate=speculate,
            max_draft=max_draft,
        )
        (ticket,) = self._submit([prompt], arguments, drafter, patient=False)
        return ticket

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, in any thread. Raises DataError for what is none."""
        with self._encoding:  # tokenizers are not made for several threads
            return self.decoder.tokenizer.encode(prompt)

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncIterator[Piece]:
        """The pieces of one answer, as `submit` takes it. Leaving the iteration early cancels the request."""
        ticket = self.submit(prompt, **options)
        try:
            async for piece in ticket:
                yield piece
        finally:
            ticket.cancel()

    def generate(self, prompts: Sequence[Prompt], *, drafter: str | None = None, **options: Any) -> list[Completion]:
        """Answer a list of prompts as Decoder.generate does, beside whatever else is running. Waits for the queue."""
        tickets = self._submit(prompts, Arguments(**options), drafter, patient=True)
        for ticket in tickets:
            for _ in ticket:
                pass
        return [ticket.completion for ticket in tickets if ticket.completion is not None]

    def _submit(
        self, prompts: Sequence[Prompt], arguments: Arguments, drafter: str | None, *, patient: bool
    ) -> list[Ticket]:
        decoder, drafter = self.decoder, choose([*self.drafters], drafter)
        with self._encoding:
            tokens = encode_all(prompts, decoder.tokenizer)
        requests = [check_request(request, decoder.target, decoder.eos) for request in arguments.requests(tokens)]
        texts, tickets = arguments.texts(decoder.tokenizer, len(requests)), list[Ticket]()
        for request, text in zip(requests, texts, strict=True):
            transcript = Transcript(request, request.ends(decoder.eos), text, 0)
            job = Job(request, transcript, drafter, self._worker.cancel)
            self._limits.check(request)
            self._worker.submit(job, patient=patient)
            tickets.append(Ticket(job))
        return tickets

    def status(self) -> EngineStatus:
        """What it is doing, and has done so far."""
        return self._worker.status()

    def close(self, drain: float | None = None) -> None:
        """Take no more requests, finish those there are within `drain` seconds, break off the rest.

        None waits for all of them. A request broken off raises EngineClosed where it is read. Closing twice is fine.
        """
        self._worker.close(drain)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else 0.0)


def choose(offered: Sequence[str], drafter: object) -> str:
    """The drafter of that name, or for None the first. Raises ConfigError for one that is not offered."""
    found = offered[0] if drafter is None else drafter
    if found not in offered:
        raise ConfigError(f"drafter must be one of {', '.join(offered)}, got {shown(drafter)}")
    return str(found)


def _capacity(target: Target, drafters: Sequence[Drafter], rows: int, asked: int | None) -> int:
    """Tokens a row may have: as asked for, or as many as the context and half of the memory hold."""
    if asked is not None and not 2 <= need_whole("capacity", asked) <= target.context:
        raise ConfigError(f"capacity must be in 2..{target.context}, which is the context, got {asked}")
    caches = [[*target.shapes, *drafter.cache_layers] for drafter in drafters]
    fits = min(
        available_bytes(device) // (rows * sum(s.bytes_per_slot for s in shapes if s.device == device))
        for shapes in caches
        for device in {shape.device for shape in shapes}
    )
    if (asked or 2) > fits:
        raise CapacityError(
            f"{rows} rows of {asked or 2} tokens do not fit in memory, of {fits} they would; use fewer rows or a "
            "smaller capacity"
        )
    return asked or min(target.context, max(2, fits // 2))

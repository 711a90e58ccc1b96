"""A drafter of this library as a method of a benchmark; plain decoding is the drafter `none`."""

import time
from collections.abc import Sequence

from kangaroo.bench.methods import finish_reason, forget_peak, peak_bytes
from kangaroo.bench.records import Measured
from kangaroo.bench.timed import Timed, TimedTarget
from kangaroo.completion import Piece, Stats
from kangaroo.decode import Round, check_request
from kangaroo.decoder import Decoder
from kangaroo.machine import synchronise
from kangaroo.sampling import Sampling
from kangaroo.scheduler import Limits, Scheduler, Task
from kangaroo.state import Request


class Drafted:
    """Answers with a decoder's target and drafter, through the library's own loop."""

    def __init__(self, decoder: Decoder, rule: str = "match"):
        """`rule` says which drafted tokens survive (`accept.py`)."""
        self._rule = rule
        self._target, self._make_drafter, self._eos = TimedTarget(decoder.target), decoder.make_drafter, decoder.eos

    def answer(self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_tokens: int) -> list[Measured]:
        """Prefill is everything before the first round: the cache, the prompts, what the drafter makes of them."""
        target, device = self._target, self._target.device
        drafter = Timed(self._make_drafter(), device)
        forget_peak(device)
        synchronise(device)
        began = time.perf_counter()
        scheduler = Scheduler(target, lambda: drafter, self._eos, Limits(len(prompts)), rule=self._rule)
        answers = [
            _Answer(check_request(Request(p, sampling, max_tokens), target, self._eos), self._eos) for p in prompts
        ]
        for answer in answers:
            scheduler.submit(Task(answer.request, answer))
        scheduler.read_prompts()
        synchronise(device)
        decoding = time.perf_counter()
        target.clock.reset()
        drafter.clock.reset()
        while scheduler.busy:
            scheduler.step()
        synchronise(device)
        ended = time.perf_counter()

        share = 1 / len(prompts)
        draft, verify = drafter.clock.seconds * share, target.clock.seconds * share
        return [
            Measured(
                tokens=answer.tokens,
                finish_reason=finish_reason(answer.tokens, self._eos),
                prefill=(decoding - began) * share,
                draft=draft,
                verify=verify,
                rest=max(0.0, (ended - decoding) * share - draft - verify),
                emitted=answer.stats.lengths,
                drafted=answer.stats.drafts,
                stops=answer.stops,
                peak_bytes=peak_bytes(device),
            )
            for answer in answers
        ]


class _Answer:
    """An answer of which nobody reads the text."""

    def __init__(self, request: Request, eos: Sequence[int]):
        self.request, self._ends, self.stats = request, request.ends(eos), Stats()
        self.tokens: list[int] = []
        self.stops: list[str] = []

    @property
    def ended(self) -> bool:
        """Whether it is whole."""
        return len(self.tokens) == self.request.max_tokens or self.tokens[-1:] in [[end] for end in self._ends]

    def read(self, done: Round, row: int) -> list[Piece]:
        """Note what a round has brought."""
        emitted = done.emitted[row]
        self.tokens += emitted
        self.stops.append(done.stops[row].value)
        self.stats.lengths.append(len(emitted))
        self.stats.drafts.append(done.drafted[row])
        return []

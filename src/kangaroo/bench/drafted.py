"""A drafter of this library as a method of a benchmark; plain decoding is the drafter `none`."""

import time
from collections.abc import Sequence

from kangaroo.bench.methods import finish_reason, forget_peak, peak_bytes
from kangaroo.bench.records import Measured
from kangaroo.bench.timed import Timed, TimedTarget
from kangaroo.decode import decode, start
from kangaroo.decoder import Decoder
from kangaroo.machine import synchronise
from kangaroo.sampling import Sampling
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
        requests = [Request(p, sampling, max_tokens) for p in prompts]
        state = start(target, drafter, requests, eos=self._eos, rule=self._rule)
        synchronise(device)
        decoding = time.perf_counter()
        target.clock.reset()
        drafter.clock.reset()
        rounds = list(decode(target, drafter, state))
        synchronise(device)
        ended = time.perf_counter()

        share = 1 / len(prompts)
        draft, verify = drafter.clock.seconds * share, target.clock.seconds * share
        answers = []
        for row in range(len(prompts)):
            mine = [(r.emitted[row], r.drafted[row], r.stops[row]) for r in rounds if r.emitted[row]]
            tokens = [token for emitted, _, _ in mine for token in emitted]
            answers.append(
                Measured(
                    tokens=tokens,
                    finish_reason=finish_reason(tokens, self._eos),
                    prefill=(decoding - began) * share,
                    draft=draft,
                    verify=verify,
                    rest=max(0.0, (ended - decoding) * share - draft - verify),
                    emitted=[len(emitted) for emitted, _, _ in mine],
                    drafted=[drafted for _, drafted, _ in mine],
                    stops=[stop.value for _, _, stop in mine],
                    peak_bytes=peak_bytes(device),
                )
            )
        return answers

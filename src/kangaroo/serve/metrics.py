"""What Prometheus scrapes: what requests have waited, and what speculation has cost and brought."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kangaroo.worker import EngineStatus

PREFIX = "kangaroo_"
"""Not "kangaroo:", as colons are for the names that Prometheus users give to their own rules."""
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    """Everything measured of one server."""

    def __init__(self, status: Callable[[], EngineStatus | None]):
        """`status` of the engine; None while there is none."""
        self.registry = CollectorRegistry()
        self.registry.register(_EngineMetrics(status))
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request to its first token", _LONG)
        self.between = self._histogram("inter_token_latency_seconds", "From one token of an answer to the next", _SHORT)
        self.whole = self._histogram("e2e_request_latency_seconds", "From a request to its end", _LONG)
        self.finished = self._counter("request_success", "Answers, by what ended them", "finished_reason")
        self.cancelled = self._counter("requests_cancelled", "Requests whose client left")
        self.refused = self._counter("requests_refused", "Requests refused, by HTTP status", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, help_text, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help_text, labels, registry=self.registry)


class Clock:
    """When the tokens of one request have come."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._began, self._last = metrics, time.monotonic(), dict[int, float]()

    def token(self, answer: int) -> None:
        """One has come."""
        now, before = time.monotonic(), self._last.get(answer)
        if before is None:
            self._metrics.first_token.observe(now - self._began)
        else:
            self._metrics.between.observe(now - before)
        self._last[answer] = now

    def end(self) -> None:
        """All have come."""
        self._metrics.whole.observe(time.monotonic() - self._began)


class _EngineMetrics(Collector):
    """The engine's own counts, read when somebody asks."""

    def __init__(self, status: Callable[[], EngineStatus | None]):
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """As a registry calls it."""
        found = self._status()
        if found is None:
            return
        for name, help_text, gauge in (
            ("num_requests_running", "Answers being written", found.running),
            ("num_requests_waiting", "Answers waiting for a row", found.waiting),
            ("num_rows", "Answers that can be written at once", found.rows),
        ):
            yield GaugeMetricFamily(PREFIX + name, help_text, value=gauge)
        for name, help_text, count in (
            ("generation_tokens", "Tokens of answers", found.emitted),
            ("prefix_cache_hit_tokens", "Tokens of prompts that were there already", found.prefix_hits_tokens),
            ("spec_decode_num_drafts", "Drafts made", found.rounds),
            ("spec_decode_num_draft_tokens", "Tokens drafted", found.drafted),
            ("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted", found.accepted),
            ("spec_decode_draft_seconds", "Time spent drafting", found.draft_seconds),
            ("spec_decode_verify_seconds", "Time spent verifying", found.verify_seconds),
        ):
            yield CounterMetricFamily(PREFIX + name, help_text, value=count)
        places = CounterMetricFamily(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos", "Accepted, by place in the draft", labels=["position"]
        )
        for place, accepted in enumerate(found.accepted_per_position):
            places.add_metric([str(place)], accepted)
        yield places
        stops = CounterMetricFamily(PREFIX + "spec_decode_draft_stops", "Why drafting stopped", labels=["reason"])
        for reason, times in found.stops.items():
            stops.add_metric([reason], times)
        yield stops

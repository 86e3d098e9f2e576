"""The server's metrics, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from merino_edge.runtime.generation import Statistics

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class Metrics:
    """Counts and times of one server."""

    def __init__(self, pending: Callable[[], float]) -> None:
        """`pending` returns the number of answers that are running or waiting."""
        self._registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self._requests = Counter("merino_edge_requests", "Requests by path and status.", ["path", "status"], registry=r)
        self._prompt = Counter("merino_edge_prompt_tokens", "Prompt tokens.", registry=r)
        self._cached = Counter("merino_edge_cached_tokens", "Prompt tokens found in the cache.", registry=r)
        self._generated = Counter("merino_edge_generated_tokens", "Generated tokens.", registry=r)
        self._first = Histogram(
            "merino_edge_first_token_seconds", "Time to the first token.", buckets=FIRST_TOKEN_SECONDS, registry=r
        )
        self._token = Histogram(
            "merino_edge_token_seconds",
            "Time per token after the first, mean of an answer.",
            buckets=TOKEN_SECONDS,
            registry=r,
        )
        Gauge("merino_edge_pending_answers", "Answers that are running or waiting.", registry=r).set_function(pending)

    def answered(self, path: str, status: int) -> None:
        """Count a request by its path and HTTP status."""
        self._requests.labels(path, str(status)).inc()

    def generated(self, statistics: Statistics) -> None:
        """Count the tokens and times of an answer that has ended for any reason."""
        self._prompt.inc(statistics.prompt_tokens)
        self._cached.inc(statistics.reused_tokens)
        self._generated.inc(statistics.generated_tokens)
        if statistics.first_token_ms is not None:
            self._first.observe(statistics.first_token_ms / 1e3)
        if statistics.decode_tokens_per_second:
            self._token.observe(1 / statistics.decode_tokens_per_second)

    def text(self) -> bytes:
        """All metrics, as /metrics returns them."""
        return bytes(generate_latest(self._registry))

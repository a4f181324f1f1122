"""What Prometheus is told. Every server has its own registry, so that two in one process do not add up."""

from __future__ import annotations

from collections.abc import Callable

from router_cli.schema import Prediction

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server. `waiting` gives the length of its queue."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self._registry = to = CollectorRegistry()
        ProcessCollector(registry=to)  # memory, CPU time, open files
        self._requests = Counter("router_requests", "Requests answered.", ["endpoint", "status"], registry=to)
        self._seconds = Histogram(
            "router_request_seconds", "From a request to its answer.", ["endpoint"], buckets=SECONDS, registry=to
        )
        self._errors = Counter(
            "router_errors",
            "Requests, and tasks of answered lists, that got an error, by its code.",
            ["code"],
            registry=to,
        )
        self._sizes = Histogram("router_batch_size", "Tasks decided at once.", buckets=SIZES, registry=to)
        self._batches = Histogram("router_batch_seconds", "Time a batch takes.", buckets=SECONDS, registry=to)
        Gauge("router_queue_depth", "Tasks that wait for a batch.", registry=to).set_function(waiting)
        self._inside = Gauge("router_requests_in_progress", "Requests being answered.", registry=to)
        self._decisions = Counter("router_decisions", "Decisions given out.", ["topology"], registry=to)
        self._fallbacks = Counter(
            "router_fallbacks", "Tasks that somebody else decided, or nobody (abstain).", ["by"], registry=to
        )
        self._dollars = Counter(
            "router_fallback_dollars", "What the fallback's answers cost, where known.", registry=to
        )
        self.answered = self.refused = self.gone = self.given = self.fallbacks = 0
        self._paid = 0.0

    def came(self) -> None:
        """A request came in."""
        self._inside.inc()

    def went(self, endpoint: str, status: int, seconds: float, code: str) -> None:
        """It was answered, or its client went away (status 499). `code` is its error's, if it got one."""
        self._inside.dec()
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)
        if code:
            self._errors.labels(code).inc()
        self.answered += not code
        self.gone += code == "gone"
        self.refused += code not in ("", "gone", "shutting_down")

    def failed(self, code: str) -> None:
        """A task of a list got an error while others of it were decided."""
        self._errors.labels(code).inc()

    def batch(self, size: int, seconds: float) -> None:
        """A batch was decided."""
        self._sizes.observe(size)
        self._batches.observe(seconds)

    def decided(self, row: Prediction) -> None:
        """A decision was made; `none` where nobody made one."""
        self.given += 1
        self._decisions.labels(row.decision.topology if row.decision else "none").inc()
        if row.fallback is not None:
            self.fallbacks += 1
            # "teacher (no_json)": the reason would make a series each.
            self._fallbacks.labels(row.fallback.partition(" ")[0]).inc()

    def paid(self, dollars: float) -> None:
        """The fallback's answers have cost so much until now."""
        self._dollars.inc(max(0.0, dollars - self._paid))
        self._paid = dollars

    def page(self) -> tuple[bytes, str]:
        """All of it as text, and the text's content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST

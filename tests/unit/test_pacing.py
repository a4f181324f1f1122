"""The pace of requests, played against endpoints that limit in different ways, on a clock of their own."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from router_cli.teachers.pacing import Pace

RATE = 50.0
"""Requests a second that the endpoints of these tests let through: 3,000 a minute."""


@dataclass
class Endpoint:
    """A token bucket. `tell`: headers say so; `after`: a 429 says for how many whole seconds to wait."""

    rate: float = RATE
    burst: float = RATE
    tell: bool = False
    after: bool = False
    change: tuple[float, float] = (math.inf, 0.0)
    level: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.level = self.burst

    def take(self, now: float) -> tuple[bool, dict[str, str], float | None]:
        if now > self.change[0]:
            self.rate = self.change[1]
        self.level, self.at = min(self.burst, self.level + (now - self.at) * self.rate), now
        passed = self.level >= 1
        self.level -= passed
        headers = {
            "x-ratelimit-limit-requests": f"{self.rate * 60:g}",
            "x-ratelimit-remaining-requests": str(int(self.level)),
            "x-ratelimit-reset-requests": f"{(self.burst - self.level) / self.rate * 1000:.0f}ms",
        }
        wait = None if passed or not self.after else math.ceil((1 - self.level) / self.rate)
        return passed, headers if self.tell else {}, wait


@dataclass
class Window(Endpoint):
    """`rate` times `seconds` requests in each window of so many seconds."""

    seconds: float = 60.0
    number: int = 0
    used: int = 0

    def take(self, now: float) -> tuple[bool, dict[str, str], float | None]:
        if (number := int(now / self.seconds)) != self.number:
            self.number, self.used = number, 0
        passed = self.used < self.rate * self.seconds
        self.used += passed
        return passed, {}, None


class Careless:
    """Refuses by chance, whatever the pace."""

    def __init__(self, share: float) -> None:
        self.share, self.random = share, random.Random(7)

    def take(self, now: float) -> tuple[bool, dict[str, str], float | None]:
        return self.random.random() >= self.share, {}, None


@dataclass(frozen=True)
class Played:
    seconds: float
    wasted: float


def play(
    endpoint: Endpoint | Careless,
    pace: Pace,
    tasks: int = 1000,
    concurrency: int = 64,
    latency: float = 0.5,
    refusal: float = 0.005,
    seed: int = 1,
) -> Played:
    """Send `tasks` tasks, a millisecond of work each, and take refused ones up again; the time to the last answer."""
    rng, order = random.Random(seed), itertools.count()
    now, ready, left, done, sent = 0.0, min(concurrency, tasks), max(0, tasks - concurrency), 0, 0
    coming: list[tuple[float, int, Callable[[float], bool]]] = []

    def answered(ticket: object, headers: dict[str, str]) -> Callable[[float], bool]:
        return lambda at: pace.passed(ticket, at, headers) is None  # type: ignore[arg-type]

    def refused(ticket: object, headers: dict[str, str], wait: float | None) -> Callable[[float], bool]:
        def happen(at: float) -> bool:
            if wait is not None:
                pace.pause(at, wait)
            pace.refuse(ticket, at, headers)  # type: ignore[arg-type]
            return False

        return happen

    while done < tasks:
        due = coming[0][0] if coming else math.inf
        wait = pace.wait(now) if ready else math.inf
        if due <= now + wait:
            now = max(now, due)
            if heapq.heappop(coming)[2](now):
                done += 1
                ready, left = ready + (left > 0), left - (left > 0)
            elif pace.free:
                heapq.heappush(coming, (now + 0.5, next(order), lambda at: back()))
            else:
                ready += 1
        elif wait > 0:
            now += wait + rng.uniform(0, 0.001)
        else:
            ready -= 1
            sent += 1
            ticket = pace.take(now)
            passed, headers, after = endpoint.take(now)
            at = now + (latency * rng.uniform(0.9, 1.1) if passed else refusal)
            happens = answered(ticket, headers) if passed else refused(ticket, headers, after)
            heapq.heappush(coming, (at, next(order), happens))
            now += 0.001

        def back() -> bool:
            nonlocal ready, done
            ready, done = ready + 1, done - 1
            return True

    return Played(now, 1 - tasks / sent)


@pytest.mark.parametrize("concurrency", [64, 256])
@pytest.mark.parametrize(
    ("endpoint", "rpm", "wasted"),
    [
        (Endpoint(), 3000, 0.03),
        (Endpoint(tell=True), None, 0.03),
        (Endpoint(), None, 0.10),
        (Endpoint(after=True), None, 0.10),
    ],
    ids=["option", "headers", "untold", "retry-after"],
)
def test_a_limit_is_used_up_and_hardly_overstepped(
    endpoint: Endpoint, rpm: float | None, wasted: float, concurrency: int
) -> None:
    played = play(replace(endpoint), Pace(rpm=rpm), concurrency=concurrency)
    assert 1000 / (RATE * played.seconds) >= 0.98 and played.wasted <= wasted


@pytest.mark.parametrize("refusal", [0.003, 0.01, 0.03])
@pytest.mark.parametrize("concurrency", [64, 256])
def test_pauses_of_whole_seconds_leave_the_limit_used_whatever_the_moments(concurrency: int, refusal: float) -> None:
    for seed in range(5):
        played = play(Endpoint(after=True), Pace(), concurrency=concurrency, refusal=refusal, seed=seed)
        assert 1000 / (RATE * played.seconds) >= 0.98 and played.wasted <= 0.10


def test_without_a_limit_nothing_is_held_back() -> None:
    played = play(Careless(0.0), Pace(), tasks=2000, concurrency=256)
    assert played.seconds < 1.15 * 2000 / (256 / 0.5)


def test_a_bucket_of_a_minute_and_a_window_of_a_minute_are_found_out() -> None:
    assert play(Endpoint(burst=1500), Pace(), tasks=3000, concurrency=256).wasted < 0.05
    assert play(Window(), Pace(), tasks=3500, concurrency=256).seconds < 90


def test_a_limit_that_falls_or_rises_is_followed() -> None:
    fallen = play(Endpoint(change=(10, RATE / 2)), Pace())
    assert fallen.wasted < 0.1 and fallen.seconds < 1.15 * (10 + 500 / (RATE / 2))
    risen = play(Endpoint(change=(10, RATE * 2)), Pace(), tasks=3000)
    assert risen.wasted < 0.1 and risen.seconds < 1.3 * (10 + 2500 / (RATE * 2))


def test_refusals_by_chance_do_not_slow_everything_to_a_crawl() -> None:
    assert play(Careless(0.3), Pace()).seconds < 100


def test_an_endpoint_that_is_shut_is_asked_rarely() -> None:
    pace, now, asked = Pace(), 0.0, 0
    while now < 60:
        now += pace.wait(now)
        pace.refuse(pace.take(now), now, {})
        asked, now = asked + 1, now + 0.001
    assert asked < 40


def test_a_pause_holds_everybody_and_news_is_only_a_longer_one() -> None:
    pace = Pace()
    assert pace.pause(10.0, 20.0) and not pace.pause(10.5, 20.0)
    assert pace.wait(15.0) == 15.5 and pace.wait(31.0) == 0.0


def test_tokens_a_minute_hold_back_and_what_was_really_used_counts() -> None:
    pace = Pace(tpm=6000)  # 100 a second
    first = pace.take(0.0, 100)
    assert pace.wait(0.0, 100) == pytest.approx(1.5)
    pace.passed(first, 0.1, {}, tokens=300)
    assert pace.wait(0.1, 100) == pytest.approx(3.4)


def test_a_limit_a_day_is_not_taken_for_one_a_minute() -> None:
    pace = Pace()
    ticket = pace.take(0.0)
    left = {"x-ratelimit-limit-requests": "200", "x-ratelimit-remaining-requests": "0"}
    pace.passed(ticket, 0.5, {**left, "x-ratelimit-reset-requests": "24h0m0s"})
    assert pace.wait(0.5) == pytest.approx(86400 / 200, rel=0.01)


def test_headers_that_promise_too_much_are_believed_once() -> None:
    class Boasting(Endpoint):
        def take(self, now: float) -> tuple[bool, dict[str, str], float | None]:
            passed, headers, wait = super().take(now)
            return passed, {**headers, "x-ratelimit-remaining-requests": "2999"}, wait

    assert play(Boasting(tell=True), Pace(), concurrency=256).wasted < 0.1

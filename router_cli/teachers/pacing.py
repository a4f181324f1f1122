"""How fast requests may go: as the user says, as the endpoint's headers say, else as its refusals (429) tell.

Pure arithmetic on a clock that the caller brings, so that a test can play an hour in a moment.

What a refusal tells: the endpoint's bucket was empty when the refused request came. So between two refusals it let
through exactly as much as it refilled, and what passed divided by the time is its rate, whatever the bucket's size.
One refusal alone tells nothing, and neither do two of the same burst. Sending a little faster than measured meets a
refusal every now and then, and with it a new measurement; what was sent too slowly in between is still in the bucket.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

# Until the first response, requests leave half a millisecond apart: the first refusals stop the rest of the burst.
RAMP = 0.0005
# A measured rate is tried with GAIN. It grows, by so many e-folds a second, once so many requests met no refusal; a
# rate that is no more than a guess grows sooner and faster. Where a refusal makes everybody pause (Retry-After has
# whole seconds) it costs a second of all: there is no gain, more patience, and a guess grows more slowly.
GAIN, PATIENCE, GROWTH = 1.03, 100, 0.2
CAREFUL, CAREFUL_PATIENCE, GUESS_GROWTH = 1.0, 400, 0.5
HASTY_PATIENCE, HASTY_GROWTH = 3, 2.0
# A refusal costs no more than this factor where nothing was measured, or the bucket ran over and hid what it holds.
CUT = 0.7
# Refusals nearer to each other than so many seconds, or with fewer requests between them, measure nothing.
SHORTEST, FEWEST = 0.25, 10
# An endpoint that takes nothing is asked once in so many seconds, or in as many as it last asked to wait.
PROBE = 5.0
# So many refusals among so many requests although a measured pace is kept have nothing to do with the pace: then they
# slow nothing down while the next so many requests leave.
RANDOM_REFUSALS, RANDOM_REQUESTS, DISTRUST = 10, 120, 100
# What is tried after the first refusal, at least: requests a second.
FIRST_GUESS = 10.0
# So many of the last requests tell how fast they really leave.
RECENT = 16


@dataclass(frozen=True)
class Ticket:
    """One request on its way: when it left, and how many requests and tokens had left before it."""

    at: float
    sent: int
    tokens: float
    amount: float


class Bucket:
    """What refills at `rate` a second up to `size`; a rate of None refills at once."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self.level, self.at = self.size / 2, 0.0

    @property
    def size(self) -> float:
        """A second's worth, but one request at least."""
        return max(1.0, self.rate or 0.0)

    def refill(self, now: float) -> None:
        """Bring the level up to date."""
        if self.rate is not None and now > self.at:
            # A level that the endpoint reports may stand above the size.
            self.level = max(self.level, min(self.size, self.level + (now - self.at) * self.rate))
        self.at = now

    def wait(self, amount: float) -> float:
        """Seconds until `amount` may be taken."""
        if self.rate is None:
            return 0.0
        return max(0.0, (min(amount, self.size) - self.level) / self.rate)


class Pace:
    """When the next request may go. `rpm` and `tpm` are limits a minute of which the user knows."""

    def __init__(self, rpm: float | None = None, tpm: float | None = None) -> None:
        self.requests, self.tokens = Bucket(rpm / 60 if rpm else None), Bucket(tpm / 60 if tpm else None)
        self._told, self._told_by_user = self.requests.rate, (rpm is not None, tpm is not None)
        self._learnt: float | None = None
        self._measured, self._since_refusal = False, 0
        self._answered, self._first = False, 0.0
        self.sent, self.refused, self._amount = 0, 0, 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)  # when the last requests left
        self._marks: deque[tuple[float, int]] = deque()  # at refusals: when, and how many had passed
        self._refusals: deque[int] = deque(maxlen=RANDOM_REFUSALS)  # how many had been sent
        self._trusted = 0  # from which request on refusals count
        self._asked: float | None = None
        self._cut = self.paused_until = 0.0
        self._headers_lie = False

    @property
    def free(self) -> bool:
        """Whether nothing is known that would hold requests back."""
        return self.requests.rate is None and self.tokens.rate is None

    def wait(self, now: float, tokens: float = 0.0) -> float:
        """Seconds from `now` until a request of so many tokens may go; 0 is at once."""
        if now < self.paused_until:
            return self.paused_until - now
        if self.free:
            return 0.0 if self._answered or not self._recent else max(0.0, self._recent[-1] + RAMP - now)
        self.requests.refill(now)
        self.tokens.refill(now)
        return max(self.requests.wait(1), self.tokens.wait(tokens))

    def take(self, now: float, tokens: float = 0.0) -> Ticket:
        """Send a request, `wait` having become 0."""
        self._first = self._first if self.sent else now
        self.requests.refill(now)
        self.tokens.refill(now)
        self.requests.level -= 1
        self.tokens.level -= tokens
        ticket = Ticket(now, self.sent, self._amount, tokens)
        self.sent, self._amount = self.sent + 1, self._amount + tokens
        self._since_refusal += 1
        if self._learnt is not None:
            pauses = self._asked is not None
            patience, growth = CAREFUL_PATIENCE if pauses else PATIENCE, GROWTH
            if not self._measured:
                patience, growth = HASTY_PATIENCE, GUESS_GROWTH if pauses else HASTY_GROWTH
            if self._since_refusal > patience and self._recent:
                self._set(min(self._learnt * math.exp(growth * min(1.0, now - self._recent[-1])), 1e6))
        self._recent.append(now)
        return ticket

    def passed(self, ticket: Ticket, now: float, headers: Mapping[str, str], tokens: float | None = None) -> None:
        """The endpoint took the request, and counted `tokens` (None: as expected)."""
        self._answered = True
        if tokens is not None:
            self.tokens.level -= tokens - ticket.amount
            self._amount += tokens - ticket.amount
        self._read(ticket, now, headers)

    def pause(self, now: float, seconds: float) -> bool:
        """Let nothing go for so long, as the endpoint asks. Returns whether that is longer than it asked before."""
        until = now + seconds
        longer = until > self.paused_until + 1
        self._asked = seconds
        self.paused_until = max(self.paused_until, until)
        # Nobody knows how much it takes after that: apart again, until it responds.
        self._answered = False
        return longer

    def refuse(self, ticket: Ticket, now: float, headers: Mapping[str, str]) -> None:
        """The endpoint turned the request away (429)."""
        self._answered = True
        self.refused += 1
        self.tokens.level += ticket.amount
        if "x-ratelimit-remaining-requests" in headers:
            # A 429 with requests left means that the number is not the whole truth.
            self._headers_lie |= _number(headers, "x-ratelimit-remaining-requests") >= 1
        self._read(ticket, now, headers)
        self.requests.refill(now)
        self.requests.level = min(self.requests.level, 0.0)
        if ticket.at < self._cut or self.sent < self._trusted:
            return  # it left before the pace changed, and tells nothing about the new one
        self._learn(ticket, now)

    def _learn(self, ticket: Ticket, now: float) -> None:
        passed = ticket.sent + 1 - self.refused
        marks = self._marks
        while len(marks) > 1 and ticket.at - marks[1][0] >= SHORTEST and passed - marks[1][1] >= FEWEST:
            marks.popleft()
        start, before = marks[0] if marks else (ticket.at, passed)
        marks.append((ticket.at, passed))
        span, gone = ticket.at - start, passed - before
        kept = self._measured
        self._measured = span >= SHORTEST and gone >= FEWEST
        if self._learnt is None:
            # As if the bucket held a second's worth; the next refusals will tell.
            self._set(max(FIRST_GUESS, passed / (ticket.at - self._first + 1)))
        else:
            while_sent = self._recent[-1] - self._recent[0]
            pace = min(self._learnt, len(self._recent) / while_sent) if while_sent > 0 else self._learnt
            gain = CAREFUL if self._asked is not None else GAIN
            self._set(
                max(
                    gone / span * gain if span >= SHORTEST else 0.0,
                    pace * CUT,
                    1 / max(PROBE if self._asked is None else self._asked, RAMP),
                )
            )
        self._cut, self._since_refusal = now, 0
        if not kept:
            self._refusals.clear()
        self._refusals.append(self.sent)
        if len(self._refusals) == RANDOM_REFUSALS and self.sent - self._refusals[0] <= RANDOM_REQUESTS:
            self._trusted, self._measured = self.sent + DISTRUST, False
            self._refusals.clear()
            marks.clear()

    def _set(self, rate: float) -> None:
        self._learnt = rate
        self.requests.rate = rate if self._told is None else min(rate, self._told)

    def _read(self, ticket: Ticket, now: float, headers: Mapping[str, str]) -> None:
        """Limits as response headers have them (OpenAI's names, which others took over)."""
        kinds = (
            ("requests", self.requests, self.sent - ticket.sent),
            ("tokens", self.tokens, self._amount - ticket.tokens),
        )
        for (kind, bucket, since), by_user in zip(kinds, self._told_by_user, strict=True):
            limit = _number(headers, f"x-ratelimit-limit-{kind}")
            if by_user or limit <= 0:
                continue
            left, full = (
                _number(headers, f"x-ratelimit-remaining-{kind}"),
                _seconds(headers, f"x-ratelimit-reset-{kind}"),
            )
            rate = limit / 60
            if left >= 0 and full > 0 and limit > left:
                # A limit a day refills more slowly. Where a window starts anew instead of refilling, this is too slow
                # while much is left, and then it does not matter.
                rate = min(rate, (limit - left) / full)
            if kind == "requests":
                self._told = rate
                rate = rate if self._learnt is None else min(rate, self._learnt)
            bucket.rate = rate
            bucket.refill(now)
            if left >= 0 and not self._headers_lie:
                bucket.level = left + rate * (now - ticket.at) - (since - (1 if kind == "requests" else ticket.amount))


def _number(headers: Mapping[str, str], name: str) -> float:
    try:
        return float(headers.get(name, ""))
    except ValueError:
        return -1.0


def _seconds(headers: Mapping[str, str], name: str) -> float:
    """A duration such as `1s`, `20ms`, `6m0s`, `7m12.5s` or a bare number of seconds; -1 if there is none."""
    text = headers.get(name, "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s|d)", text)
    scale = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    return sum(float(number) * scale[unit] for number, unit in parts) if parts else -1.0

"""The journal beside a label file: every finished sample, durable before it counts, and what was asked for.

One JSON object a line, only ever appended to:

    {"sample": 0, "messages": ..., "provenance": {"key": ...}}   a finished sample: a `Label` or a `Rejection`
    {"asks": KEY, "sample": 0, "id": ...}                        about to be paid for
    {"unanswered": KEY, "sample": 0, "why": ..., "usage": ...}   nothing came of it: it is to be asked again
    {"run": TIME, "lost": 2}                                     a run begins, and named what an earlier one lost
    {"learnt": {"endpoint": ..., "model": ...}}                  what the endpoint turned out not to take
    {"astray": 0.01}                                             dollars that a run's lost answers may have cost

`sample` numbers the votes of one task; KEY is of `worklist.Worklist.key`. What was asked for without an answer, or a
line that says why there is none, may have been paid for and lost: the next run names it. The last row of a sample
counts. Rows without `sample` are of older journals, and stand for 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from router_cli.jsonl import Appender, writing
from router_cli.progress import Progress
from router_cli.schema import Label, Rejection, Usage

ROWS_AT_RISK, SECONDS_AT_RISK = 20, 1.0
"""What a power cut may cost at most. A killed process loses no written row: those are the kernel's by then."""


@dataclass(frozen=True)
class Entry:
    """A finished sample in the journal: where its line starts."""

    key: str
    sample: int
    at: int


class Journal:
    """The journal `path`. Read it with `entries` and `lost`; write between `with journal.open()`.

    One process at a time (`alone`). Everything that writes raises OutputError where the disk is full; the lines before
    stay whole.
    """

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path, self._progress = path, progress
        self._file: Appender | None = None
        # Rows written in this run, and those of them that are on the disk.
        self.written = self.durable = 0
        self._syncing = asyncio.Lock()
        self._open_asks: dict[tuple[str, int], str] = {}
        self.learnt: dict[str, Any] = {}  # about the endpoint, by the last run that learnt something
        self.paid = 0.0  # dollars, as far as the entries were read

    # -- reading ----------------------------------------------------------------------------------------------

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """The finished samples from the offset `start` on, in the order of finishing; a later one replaces an earlier.

        A damaged line is said and passed over. Afterwards `lost` tells what was asked for and never answered.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            at = file.seek(start)
            for line in file:
                try:
                    row = json.loads(line)
                    found = self._note(row, at)
                except (ValueError, LookupError, TypeError, AttributeError):
                    self._progress.warn(f"{self.path}: the line at byte {at} is damaged; its task is asked again")
                    found = None
                if found is not None:
                    yield found
                at += len(line)

    def _note(self, row: dict[str, Any], at: int) -> Entry | None:
        if "asks" in row:
            self._open_asks[str(row["asks"]), int(row["sample"])] = str(row["id"])
        elif "unanswered" in row:
            self._open_asks.pop((str(row["unanswered"]), int(row["sample"])), None)
            self.paid += row["usage"]["cost_usd"] or 0.0
        elif "run" in row:
            self._open_asks.clear()
        elif "learnt" in row:
            self.learnt = dict(row["learnt"])
        elif "astray" in row:
            self.paid += float(row["astray"])
        else:
            entry = Entry(str(row["provenance"]["key"]), int(row.get("sample", 0)), at)
            bytes.fromhex(entry.key)  # or it is no key
            self._open_asks.pop((entry.key, entry.sample), None)
            self.paid += row["provenance"]["usage"]["cost_usd"] or 0.0
            return entry
        return None

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[int], dict[str, Any]]]:
        """A function from an `Entry.at` to its row, `sample` left out."""
        with (self.path if self.path.exists() else Path(os.devnull)).open("rb") as file:

            def read(at: int) -> dict[str, Any]:
                file.seek(at)
                row: dict[str, Any] = json.loads(file.readline())
                row.pop("sample", None)
                return row

            yield read

    @property
    def lost(self) -> list[str]:
        """The ids of the tasks whose calls of an interrupted run may have been paid for without an answer kept."""
        return list(self._open_asks.values())

    @property
    def size(self) -> int:
        """Bytes of the journal."""
        return self.path.stat().st_size if self.path.exists() else 0

    # -- writing ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def open(self) -> Iterator[Journal]:
        """Open for appending, and bring everything to the disk at the end. What a kill left half written is cut off."""
        with Appender(self.path, sync_every=None) as self._file:
            yield self
        self.durable = self.written

    def begin(self) -> None:
        """Note that a run begins; what an earlier one lost is named by now (`lost` is empty from here on)."""
        self._write({"run": datetime.now(UTC).isoformat(timespec="seconds"), "lost": len(self._open_asks)})
        self._open_asks.clear()

    def asks(self, key: str, sample: int, task_id: str) -> None:
        """Note that a sample is about to be paid for; with the kernel before the call is sent."""
        self._write({"asks": key, "sample": sample, "id": task_id})

    def unanswered(self, key: str, sample: int, why: str, usage: Usage) -> None:
        """Note that nothing came of a sample, and what that cost."""
        self._write({"unanswered": key, "sample": sample, "why": why, "usage": usage.model_dump(mode="json")})

    def learns(self, learnt: dict[str, Any]) -> None:
        """Keep what was found out about the endpoint for the next run."""
        if learnt and learnt != self.learnt:
            self._write({"learnt": learnt})

    def went_astray(self, dollars: float) -> None:
        """Note what this run may have paid for answers that never came."""
        if dollars > 0:
            self._write({"astray": dollars})

    async def finished(self, row: Label | Rejection, sample: int) -> None:
        """Keep a finished sample; back at once, but for those that must wait for the disk to bound what is at risk."""
        self.keep(row, sample)
        if self.written - self.durable >= ROWS_AT_RISK:
            await self.sync()

    def keep(self, row: Label | Rejection, sample: int) -> None:
        """Keep a finished sample, for callers that bring many at a time: they call `sync` themselves, or close."""
        self._write({"sample": sample, **row.model_dump(mode="json")})
        self.written += 1

    async def sync(self) -> None:
        """Bring what is written to the disk; other work goes on meanwhile."""
        wanted = self.written
        async with self._syncing:
            if self.durable < wanted and self._file is not None:
                wanted = self.written
                with writing(self.path):
                    await asyncio.to_thread(os.fsync, self._file.fileno())
                self.durable = wanted

    @contextlib.asynccontextmanager
    async def kept_in_time(self) -> AsyncIterator[None]:
        """Within this block no row stays off the disk for longer than `SECONDS_AT_RISK`."""

        async def tick() -> None:
            while True:
                await asyncio.sleep(SECONDS_AT_RISK)
                await self.sync()

        ticking = asyncio.create_task(tick())
        try:
            yield
        finally:
            ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking

    def _write(self, line: BaseModel | dict[str, Any]) -> None:
        assert self._file is not None, "the journal is open while it is written to"
        self._file.append(line)

"""What was handed to a provider's Batch API and what came back, durable beside the label file.

A SQLite file, because each step has to be on the disk whole or not at all: a batch stands here before the provider
hears of it (`planned`), then gets the id that the provider gave (`open`), then its answers (`collected`). Answers stay
until the journal has the row made of them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from router_cli.errors import OutputError

_TABLES = """
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,      -- ours, sent along as metadata
    settings TEXT NOT NULL,  -- what the answers depend on; a run looks at its own batches only
    sent TEXT NOT NULL,      -- the requests' common parameters, as JSON
    file TEXT,               -- the provider's id of the uploaded file
    id TEXT,                 -- the provider's id of the batch
    state TEXT NOT NULL DEFAULT 'planned',
    cost REAL NOT NULL       -- US dollars: the worst case, once collected the actual
);
CREATE TABLE IF NOT EXISTS requests (
    key TEXT NOT NULL,       -- with `sample`: `worklist.Question.key` and `.number`
    sample INTEGER NOT NULL, batch INTEGER NOT NULL,
    worst REAL NOT NULL, answer TEXT,
    PRIMARY KEY (key, sample, batch)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS of_batch ON requests (batch);
"""

PLANNED, OPEN, COLLECTED = "planned", "open", "collected"
"""The states of a batch."""


@dataclass(frozen=True)
class Batch:
    """One batch; `file` and `id` are the provider's, None until it gave them."""

    number: int
    name: str
    sent: str
    file: str | None
    id: str | None
    state: str


@dataclass(frozen=True)
class Asked:
    """One request of a sample: the state of its batch, the parameters sent, and the answer's line, None without one."""

    state: str
    sent: str
    answer: str | None


class BatchStore:
    """The file `path`; made where it is missing. Raises OutputError where it cannot be read or written."""

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self._settings = path, settings
        with self._guarded():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None)
            # A batch that the provider bills must not be forgotten by a power cut.
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_TABLES)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    # -- batches ----------------------------------------------------------------------------------------------

    def plan(self, name: str, sent: str, requests: Iterable[tuple[str, int, float]]) -> int:
        """Note a batch that is about to be made of the requests (key, sample, worst cost); its number."""
        with self._transaction():
            number = self._db.execute(
                "INSERT INTO batches (name, settings, sent, cost) VALUES (?, ?, ?, 0)", (name, self._settings, sent)
            ).lastrowid
            assert number is not None
            rows = ((key, sample, number, worst) for key, sample, worst in requests)
            self._db.executemany("INSERT INTO requests (key, sample, batch, worst) VALUES (?, ?, ?, ?)", rows)
            self._db.execute(
                "UPDATE batches SET cost = (SELECT total(worst) FROM requests WHERE batch = number) WHERE number = ?",
                (number,),
            )
        return number

    def uploaded(self, number: int, file: str) -> None:
        """Note the uploaded file's id."""
        with self._transaction():
            self._db.execute("UPDATE batches SET file = ? WHERE number = ?", (file, number))

    def created(self, number: int, batch_id: str) -> None:
        """Note the batch's id: from here on it is paid for, and looked after."""
        with self._transaction():
            self._db.execute("UPDATE batches SET id = ?, state = ? WHERE number = ?", (batch_id, OPEN, number))

    def drop(self, number: int) -> None:
        """Forget a batch that the provider did not take or that it answered nothing of: its requests are free again."""
        with self._transaction():
            self._db.execute("DELETE FROM requests WHERE batch = ?", (number,))
            self._db.execute("DELETE FROM batches WHERE number = ?", (number,))

    def collect(self, number: int, answers: Iterable[tuple[str, int, str, float | None]]) -> None:
        """Keep a batch's answers (key, sample, line, cost), all or none, and book what they cost.

        What may have been charged is booked at its worst case: an answer of unknown cost, a request without a line.
        """
        with self._transaction():
            spent = 0.0
            for key, sample, line, cost in answers:
                where = (key, sample, number)
                if cost is None:
                    found = self._db.execute(
                        "SELECT worst FROM requests WHERE key = ? AND sample = ? AND batch = ?", where
                    ).fetchone()
                    cost = found[0] if found else 0.0
                spent += cost
                self._db.execute(
                    "UPDATE requests SET answer = ? WHERE key = ? AND sample = ? AND batch = ?", (line, *where)
                )
            self._db.execute(
                "UPDATE batches SET state = ?, cost = ? + (SELECT total(worst) FROM requests WHERE batch = number AND "
                "answer IS NULL) WHERE number = ?",
                (COLLECTED, spent, number),
            )

    def batches(self, *states: str) -> list[Batch]:
        """The batches of these settings in one of the states, in the order in which they were made."""
        marks = ", ".join("?" * len(states))
        with self._guarded():
            rows = self._db.execute(
                f"SELECT number, name, sent, file, id, state FROM batches WHERE settings = ? AND state IN ({marks}) "
                "ORDER BY number",
                (self._settings, *states),
            ).fetchall()
        return [Batch(*row) for row in rows]

    def elsewhere(self) -> int:
        """How many batches of other settings are still to be collected."""
        return int(self._one("SELECT count(*) FROM batches WHERE settings != ? AND state IN ('planned', 'open')"))

    def committed(self) -> float:
        """US dollars that the batches of these settings have cost, or may cost while they are not collected."""
        return float(self._one("SELECT total(cost) FROM batches WHERE settings = ?"))

    # -- requests ---------------------------------------------------------------------------------------------

    def history(self, key: str, sample: int) -> list[Asked]:
        """The requests of a sample that has no row in the journal yet, the oldest first."""
        with self._guarded():
            rows = self._db.execute(
                "SELECT state, sent, answer FROM requests JOIN batches ON batch = number "
                "WHERE key = ? AND sample = ? ORDER BY number",
                (key, sample),
            ).fetchall()
        return [Asked(*row) for row in rows]

    def answered(self) -> Iterator[Asked]:
        """The requests of these settings whose answer has not become a row, the oldest first."""
        with self._guarded():
            yield from (
                Asked(*row)
                for row in self._db.execute(
                    "SELECT state, sent, answer FROM requests JOIN batches ON batch = number "
                    "WHERE settings = ? AND answer IS NOT NULL ORDER BY number",
                    (self._settings,),
                )
            )

    def size(self, number: int) -> int:
        """How many requests a batch holds."""
        with self._guarded():
            return int(self._db.execute("SELECT count(*) FROM requests WHERE batch = ?", (number,)).fetchone()[0])

    def waiting(self) -> int:
        """How many requests of these settings are with the provider."""
        return int(
            self._one(
                "SELECT count(*) FROM requests JOIN batches ON batch = number WHERE settings = ? AND state = 'open'"
            )
        )

    def has(self, key: str, sample: int) -> bool:
        """Whether a sample is with the provider, or its answer lies here."""
        return any(asked.answer is not None or asked.state in (PLANNED, OPEN) for asked in self.history(key, sample))

    def settle(self, done: Iterable[tuple[str, int]]) -> None:
        """Forget samples (key, sample) that the journal keeps durably."""
        with self._transaction():
            self._db.executemany("DELETE FROM requests WHERE key = ? AND sample = ?", done)

    # -- SQLite -----------------------------------------------------------------------------------------------

    def _one(self, query: str) -> float:
        with self._guarded():
            found: float = self._db.execute(query, (self._settings,)).fetchone()[0]
            return found

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._guarded():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise OutputError(f"{self.path}: the record of batches cannot be used: {error}") from error

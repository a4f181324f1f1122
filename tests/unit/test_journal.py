"""The journal: what is durable when, and what an interrupted run may have lost."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from router_cli.errors import OutputError
from router_cli.labelling.journal import ROWS_AT_RISK, Journal
from router_cli.progress import SILENT, Silent
from router_cli.schema import Provenance, Rejection, Usage


def row(number: int) -> Rejection:
    origin = Provenance(
        teacher="openai", model="m", prompt_version="1", roles=("a",), strategy="balanced", key=f"{number:032x}"
    )
    return Rejection(origin_task_id=f"t{number}", task="x", violations=(), raw="", provenance=origin)


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_of_the_rows_that_count_few_are_not_yet_on_the_disk(tmp_path: Path) -> None:
    journal, most, counted = Journal(tmp_path / "j", SILENT), 0, 0

    async def worker(numbers: range) -> None:
        nonlocal most, counted
        for number in numbers:
            await journal.finished(row(number), 0)
            counted += 1
            most = max(most, counted - journal.durable)

    async def work() -> None:
        await asyncio.gather(*(worker(range(start, start + 10)) for start in range(0, 400, 10)))

    with journal.open():
        asyncio.run(work())
    assert 0 < most <= ROWS_AT_RISK
    assert len(list(journal.entries())) == journal.durable == 400


def test_a_lone_row_is_on_the_disk_soon(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", SILENT)

    async def work() -> None:
        async with journal.kept_in_time():
            await journal.finished(row(1), 0)
            assert journal.durable == 0
            async with asyncio.timeout(30):
                while not journal.durable:
                    await asyncio.sleep(0.05)

    with journal.open():
        asyncio.run(work())


def test_questions_without_an_answer_are_lost_until_a_run_has_named_them(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", SILENT)
    with journal.open():
        journal.begin()
        for number in range(4):
            journal.asks(f"{number:032x}", 0, f"t{number}")
        journal.asks(f"{1:032x}", 1, "t1")  # another vote on the same task
        journal.keep(row(0), 0)
        journal.keep(row(1), 1)
        journal.unanswered(f"{2:032x}", 0, "no answer", Usage())
    again = Journal(tmp_path / "j", SILENT)
    assert [(entry.key, entry.sample) for entry in again.entries()] == [(f"{0:032x}", 0), (f"{1:032x}", 1)]
    assert again.lost == ["t1", "t3"]
    with again.open():
        again.begin()
    third = Journal(tmp_path / "j", SILENT)
    assert len(list(third.entries())) == 2 and third.lost == []
    assert [line["lost"] for line in map(json.loads, (tmp_path / "j").read_text().splitlines()) if "run" in line] == [
        0,
        2,
    ]


def test_rows_of_an_older_journal_are_the_first_sample(tmp_path: Path) -> None:
    (tmp_path / "j").write_text(row(1).model_dump_json() + "\n")
    journal = Journal(tmp_path / "j", SILENT)
    [entry] = journal.entries()
    with journal.reading() as read:
        assert entry.sample == 0 and Rejection.model_validate(read(entry.at)) == row(1)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"asks": 1}', '{"provenance": {"key": "x"}, "sample": "y"}', "\0"])
def test_a_damaged_line_is_said_and_passed_over(tmp_path: Path, line: str) -> None:
    heard = Heard()
    (tmp_path / "j").write_text(f"{line}\n{row(1).model_dump_json()}\n")
    assert len(list(Journal(tmp_path / "j", heard).entries())) == 1
    assert len(heard.warnings) == 1 and "damaged" in heard.warnings[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "j").symlink_to("/dev/full")
    journal = Journal(tmp_path / "j", SILENT)
    with pytest.raises(OutputError, match="no space left"), journal.open():
        journal.asks("00", 0, "t")

"""kill -9 at any moment of labelling in a storm, then the same command: nothing lost, nothing doubled.

Every start is a fork of one process that has imported what the verb needs, so that fifty of them take seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from router_cli.labelling.journal import Journal
from router_cli.progress import SILENT
from tests.fake_teacher import Call, FakeTeacher, Reply, Storm

CONCURRENCY = 8
BAD = "Write part 7."  # answered with nonsense, so that rejections are killed too

FORKING = """
import os, sys
import openai, filelock, genai_prices
from router_cli.label import label
from router_cli.settings import load
from router_cli.teachers import openai as teacher
for line in sys.stdin:
    keys = ("label.data", "label.output", "endpoint.base_url", "label.concurrency")
    chosen = dict(zip(keys, line.split())) | {"label.reask": 6, "endpoint.timeout": 5, "endpoint.retries": 20}
    child = os.fork()
    if not child:
        code = 1
        try:
            result = label(load({key: ("test", value) for key, value in chosen.items()}, environ={}))
            code = 0 if result.unanswered == 0 else 2
        except Exception as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def finished(journal: Path) -> dict[str, dict[str, Any]]:
    """Task -> its row, of the whole lines in the journal."""
    whole = journal.read_bytes().rpartition(b"\n")[0] if journal.exists() else b""
    lines = [json.loads(line) for line in whole.splitlines()]
    return {line.get("task") or text_of(line): line for line in lines if "provenance" in line}


def text_of(row: dict[str, Any]) -> str:
    return next(m["content"] for m in row["messages"] if m["role"] == "user").removeprefix("Task: ")


def without_usage(path: Path) -> list[dict[str, Any]]:
    """The rows but for what each attempt cost."""
    return [{**row, "provenance": {**row["provenance"], "usage": None}} for row in rows(path)]


@pytest.mark.parametrize(("tasks", "kills"), [(30, 4), pytest.param(400, 50, marks=pytest.mark.slow)])
def test_kills_in_a_storm_lose_nothing_and_pay_only_for_calls_on_their_way_twice(
    tmp_path: Path, tasks: int, kills: int
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    moments = random.Random(seed)
    data, output = tmp_path / "tasks.jsonl", tmp_path / "labels.jsonl"
    data.write_text("".join(json.dumps({"id": f"t{i}", "task": f"Write part {i}."}) + "\n" for i in range(tasks)))
    journal = Path(f"{output}.journal.jsonl")
    forking = subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert forking.stdin is not None and forking.stdout is not None

    def start(target: Path, url: str) -> int:
        assert forking.stdin is not None and forking.stdout is not None
        forking.stdin.write(f"{data} {target} {url} {CONCURRENCY}\n")
        forking.stdin.flush()
        return int(forking.stdout.readline())

    def storm() -> Storm:
        # Waits grow with failures in a row: the short test has a mild storm.
        mild = {} if kills > 10 else {"busy": 0.1, "down": 0.03, "hung": 0.0}
        return Storm(seed, **{"hang": 1.0, **mild})

    def behave(call: Call) -> Reply | None:
        return Reply("nonsense") if call.task == BAD else blowing(call)

    interrupted: Counter[str] = Counter()
    blowing = storm()
    with FakeTeacher(behave=behave, delay=0.005) as server:
        calls = 0
        for _ in range(kills):
            kept, before = finished(journal), len(server.calls)
            child = start(output, server.url)
            until = before + moments.randrange(1, max(2, 5 * tasks // (2 * kills)))
            while len(server.calls) < until and alive(child):
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.02))
            with contextlib.suppress(ProcessLookupError):  # it has finished everything
                os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(int(forking.stdout.readline())) in (-signal.SIGKILL, 0)
            assert kept.keys() <= finished(journal).keys()
            assert not kept.keys() & {call.task for call in server.calls[before:]}, "asked again about a finished task"
            if journal.exists():
                read = Journal(journal, SILENT)
                assert len(list(read.entries())) == len(finished(journal))
                interrupted.update(f"Write part {name[1:]}." for name in read.lost)
        start(output, server.url)
        assert int(forking.stdout.readline()) == 0, "the last run did not end well"
        calls = len(server.calls)
        start(output, server.url)
        assert int(forking.stdout.readline()) == 0 and len(server.calls) == calls, "a finished file paid for something"

    made = finished(journal)
    assert len(made) == tasks
    assert sum(line["lost"] for line in rows(journal) if "run" in line) == interrupted.total()
    tokens: Counter[str] = Counter()
    for billed in server.ledger:
        tokens[billed.task] += billed.prompt_tokens + billed.completion_tokens
    for task, row in made.items():
        usage = row["provenance"]["usage"]
        once = usage["prompt_tokens"] + usage["completion_tokens"]
        assert tokens[task] == once or (tokens[task] > once and interrupted[task]), f"{task} is paid for twice"

    blowing = storm()
    with FakeTeacher(behave=behave) as server:
        start(tmp_path / "unbroken.jsonl", server.url)
        assert int(forking.stdout.readline()) == 0
    forking.stdin.close()
    forking.stdout.close()
    assert forking.wait() == 0
    unbroken = tmp_path / "unbroken.jsonl"
    assert without_usage(output) == without_usage(unbroken)
    # The last answer before a rejection may have been cut in one of the two.
    refused, other = (rows(Path(f"{path}.rejected.jsonl")) for path in (output, unbroken))
    assert "t7" in ids(refused) and ids(refused) == ids(other) and len(rows(output)) + len(refused) == tasks


def ids(found: list[dict[str, Any]]) -> list[str]:
    return [row["origin_task_id"] for row in found]


def alive(child: int) -> bool:
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return False
    return True

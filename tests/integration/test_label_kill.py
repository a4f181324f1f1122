"""kill -9 at any moment of labelling, then the same command: nothing lost, nothing doubled, nothing paid twice."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.fake_teacher import Call, FakeTeacher, Reply

TASKS, CONCURRENCY, KILLS = 400, 4, 10
BAD = "Write part 7."  # answered with nonsense, so that rejections are killed too

VERB = """
import sys
from router_cli.label import label
from router_cli.settings import load
keys = ("label.data", "label.output", "endpoint.base_url", "label.concurrency")
result = label(load({key: ("test", value) for key, value in zip(keys, sys.argv[1:])}, environ={}))
print(result.labelled, result.resumed, result.rejected)
"""


def journaled(path: Path) -> set[str]:
    """The ids of the whole lines in the journal."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return {json.loads(line)["origin_task_id"] for line in whole.splitlines()}


def test_ten_kills_lose_nothing_and_pay_nothing_twice(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    moments = random.Random(seed)
    data, output = tmp_path / "tasks.jsonl", tmp_path / "labels.jsonl"
    data.write_text("".join(json.dumps({"id": f"t{i}", "task": f"Write part {i}."}) + "\n" for i in range(TASKS)))
    journal = Path(f"{output}.journal.jsonl")
    names = {f"Write part {i}.": f"t{i}" for i in range(TASKS)}

    def behave(call: Call) -> Reply | None:
        return Reply("nonsense") if call.task == BAD else None

    with FakeTeacher(behave=behave, delay=0.01) as server:
        command = [sys.executable, "-c", VERB, str(data), str(output), server.url, str(CONCURRENCY)]
        for _ in range(KILLS):
            kept, before = journaled(journal), len(server.calls)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            until = before + moments.randint(0, 24)
            while len(server.calls) < until and process.poll() is None:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.03))
            process.kill()
            said, _ = process.communicate()
            assert process.returncode == -9, said.decode()
            assert kept <= journaled(journal)
            assert not kept & {names[call.task] for call in server.calls[before:]}, "asked again about a kept row"
        kept, before = journaled(journal), len(server.calls)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not kept & {names[call.task] for call in server.calls[before:]}
        calls = len(server.calls)
        again = subprocess.run(command, capture_output=True, text=True)
        assert len(server.calls) == calls, "a finished file paid for something"

    rows = [json.loads(line) for line in output.read_text().splitlines()]
    rejected = [json.loads(line) for line in Path(f"{output}.rejected.jsonl").read_text().splitlines()]
    assert [row["origin_task_id"] for row in rows] == [f"t{i}" for i in range(TASKS) if i != 7]
    assert [row["origin_task_id"] for row in rejected] == ["t7"]
    assert again.stdout.split() == ["0", str(TASKS - 1), "1"]
    written = Counter(json.loads(line)["origin_task_id"] for line in journal.read_text().splitlines())
    assert set(written.values()) == {1}
    paid = server.answered()
    # The rejected task's three questions are one unit of work: a kill in the middle starts it anew.
    wasted = sum(count - 1 for task, count in paid.items() if task != BAD)
    assert set(paid) == set(names) and wasted <= KILLS * CONCURRENCY

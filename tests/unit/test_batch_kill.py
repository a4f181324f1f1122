"""`label --batch` is ended at every step that the provider sees; the same command goes on, and pays nothing twice."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from router_cli.cli import main
from router_cli.label import LabelResult, label
from router_cli.settings import load
from tests.fake_batch import FakeBatches
from tests.fake_teacher import Call, Reply

# Starting a program takes a second, a fork of one that has everything loaded does not.
PROCESSES = multiprocessing.get_context("forkserver")
LOADED = ["aiohttp", "filelock", "genai_prices.data", "httpcore2", "openai.resources", "pytest", "toktok"]
PROCESSES.set_forkserver_preload(["router_cli.label", "router_cli.teachers.batch", "router_cli.cli", *LOADED])
PATIENCE = 300.0


def ask(folder: Path, url: str) -> LabelResult:
    """Five tasks in batches of three."""
    values = {
        "label.data": str(folder / "tasks.jsonl"),
        "label.output": str(folder / "labels.jsonl"),
        "label.batch": True,
        "label.batch_size": 3,
        "label.batch_poll": 0.01,
        "endpoint.base_url": url,
    }
    return label(load({key: ("test", value) for key, value in values.items()}, environ={}))


def command(folder: Path, url: str) -> None:
    """The same on the command line, which says to a file what it has to say."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["LLM_API_BASE"] = url
    with (folder / "said").open("w") as sys.stderr:
        files = f"--data {folder}/tasks.jsonl --output {folder}/labels.jsonl"
        code = main(f"label --batch --batch-size 3 --batch-poll 0.01 --yes {files}".split())
    sys.exit(code)


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    tasks = [{"id": f"t{i}", "task": f"Write part {i}."} for i in range(5)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return folder


def behave(call: Call) -> Reply | None:
    """One task is answered with nonsense until it is asked again."""
    return Reply("nonsense") if call.task == "Write part 1." and len(call.messages) == 2 else None


class Trap:
    """Stops the server at its `number`-th step, until what has to happen there happened; the answer is lost then."""

    def __init__(self, number: int) -> None:
        self.reached, self.over, self._left = threading.Event(), threading.Event(), number

    def __call__(self, step: str) -> Reply | None:
        self._left -= 1
        if self._left != 0:
            return None
        self.reached.set()
        self.over.wait(PATIENCE)
        return Reply(drop=True)

    @contextlib.contextmanager
    def springs(self, process: BaseProcess) -> Iterator[None]:
        """Within this block the process stands at the step; afterwards it has ended."""
        process.start()
        try:
            assert self.reached.wait(PATIENCE), "the run did not come so far"
            yield
            process.join(PATIENCE)
        finally:
            process.kill()
            process.join()
            self.over.set()


@pytest.mark.slow
def test_kill_9_at_every_step_pays_for_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    with FakeBatches(behave=behave) as server:
        unbroken = ask(write_tasks(tmp_path / "unbroken"), server.url)
    paid, steps, wanted = server.paid, server.steps, unbroken.output.read_bytes()
    assert unbroken.complete and paid == {f"Write part {i}.": 2 if i == 1 else 1 for i in range(5)}
    # An upload, the making of a batch and a download, each of them twice before the re-asked task, and once after.
    assert [steps.count(step) for step in ("upload", "created", "download")] == [3, 3, 3] and len(steps) < 40
    for number in range(1, len(steps) + 1):
        folder, trap = write_tasks(tmp_path / str(number)), Trap(number)
        with FakeBatches(behave=behave, watch=trap) as server:
            process: Any = PROCESSES.Process(target=ask, args=(folder, server.url))
            with trap.springs(process):
                process.kill()
            assert process.exitcode == -signal.SIGKILL
            again = ask(folder, server.url)
        where = f"killed at step {number}, {steps[number - 1]}"
        assert again.output.read_bytes() == wanted, where
        assert server.paid == paid, where
        assert again.usage_all.cost_usd == unbroken.usage_all.cost_usd, where
        assert {path.name for path in folder.iterdir() if path.suffix == ".part"} == set(), where


def test_ctrl_c_leaves_the_batches_to_the_provider_and_says_so(tmp_path: Path) -> None:
    folder, trap = write_tasks(tmp_path / "run"), Trap(11)
    with FakeBatches(behave=behave, watch=trap) as server:
        process: Any = PROCESSES.Process(target=command, args=(folder, server.url))
        with trap.springs(process):
            assert server.steps[-1] == "poll"
            os.kill(process.pid, signal.SIGINT)
        assert process.exitcode == 130
        said = " ".join((folder / "said").read_text().split())
        assert "5 requests wait in 2 batches, which go on at the provider: the same command collects them" in said
        assert ask(folder, server.url).complete
        assert sum(server.paid.values()) == 6

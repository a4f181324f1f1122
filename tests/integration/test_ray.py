"""`router infer --engine ray` on a local cluster of two workers: the rows of one process, whoever is killed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tiny import tiny_model

pytest.importorskip("ray.data", reason="--engine ray needs the extra [ray]")
pytestmark = pytest.mark.slow

SHARDS, ROWS = 6, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, shards, and the predictions of one process."""
    there = tmp_path_factory.mktemp("ray")
    tiny_model(there / "model", layers=2, hidden=32)
    (there / "in").mkdir()
    for i in range(SHARDS):
        text = "".join(json.dumps({"id": f"s{i}-{j}", "task": f"Do {i} {'well ' * j}."}) + "\n" for j in range(ROWS))
        name = there / "in" / f"part-{i}.jsonl"
        if i % 2:
            name.with_suffix(".jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            name.write_text(text)
    done = subprocess.run(command(there, "one"), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return there


def command(folder: Path, output: str, *more: str) -> list[str]:
    words = ["infer", "--base", str(folder / "model"), "--dtype", "float32", "--batch-size", "4", "--json"]
    words += ["--data", str(folder / "in"), "--output", str(folder / output), *more]
    return [sys.executable, "-m", "router_cli", *words]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each shard that stands, without what the clock says. Fails where one is not whole."""
    found = {}
    for file in sorted(folder.glob("part-*")):
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert text.endswith(b"\n")
        found[file.name] = [{**json.loads(line), "milliseconds": 0} for line in text.splitlines()]
        assert len(found[file.name]) == ROWS
    return found


def alike(one: dict[str, list[dict[str, Any]]], other: dict[str, list[dict[str, Any]]]) -> None:
    assert one.keys() == other.keys() and len(one) == SHARDS
    for name in one:
        for row, same in zip(one[name], other[name], strict=True):
            assert row.pop("topologies") == pytest.approx(same.pop("topologies"), abs=1e-5)
            assert row.pop("probability") == pytest.approx(same.pop("probability"), abs=1e-5)
            assert row == same


def started(folder: Path, output: str, meanwhile: Callable[[psutil.Process], None]) -> tuple[int, str, str]:
    """Run with two workers; call `meanwhile` with the process once the first shard stands."""
    argv = command(folder, output, "--engine", "ray", "--workers", "2")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, env=environment(), **pipes) as process:  # type: ignore[call-overload]
        deadline = time.monotonic() + 900
        while not list((folder / output).glob("part-*")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        meanwhile(psutil.Process(process.pid))
        out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if "MapWorker" in " ".join(child.cmdline())]


def gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)  # nobody may be there to reap an orphan
    except psutil.NoSuchProcess:
        return True


def test_two_workers_make_the_rows_of_one_process_though_one_is_killed(folder: Path) -> None:
    killed = []

    def kill(process: psutil.Process) -> None:
        killed.extend(workers_of(process)[:1])
        killed[0].kill()

    code, out, err = started(folder, "ray", kill)
    assert code == 0, err
    assert killed and json.loads(out)["shards"] == SHARDS
    alike(rows(folder / "ray"), rows(folder / "one"))
    assert "Traceback" not in err and "Deprecat" not in err


def test_a_killed_driver_leaves_whole_shards_that_the_next_call_goes_on_from(folder: Path) -> None:
    children: list[psutil.Process] = []

    def kill(process: psutil.Process) -> None:
        children.extend(process.children(recursive=True))
        os.kill(process.pid, signal.SIGKILL)

    code, _, _ = started(folder, "killed", kill)
    assert code == -signal.SIGKILL
    deadline = time.monotonic() + 300
    while not all(map(gone, children)):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)
    standing = rows(folder / "killed")
    assert 0 < len(standing) < SHARDS
    # The engine is no part of what a row depends on.
    done = subprocess.run(command(folder, "killed"), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] == len(standing)
    alike(rows(folder / "killed"), rows(folder / "one"))
    assert not list((folder / "killed").glob(".*.part"))

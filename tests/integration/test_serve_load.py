"""`router serve` as a process of its own: many clients at once, clients that are killed, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serve import arrive, gauge, kill, saturate, server, session
from tests.fake_teacher import Call, FakeTeacher
from tests.serving import PATIENCE, Later, ask, until
from tests.tiny import tiny_model

TOKEN = "a-token-of-20-letters"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model", layers=2, hidden=32)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    environ = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with server(f"--base={model}", "--queue=1000", "--dtype=float32", environ=environ) as (address, _):
        yield address


@pytest.mark.slow
def test_200_clients_are_served_without_an_error(url: str) -> None:
    load = asyncio.run(saturate(url, 200, 5.0))
    assert not load.errors and len(load.latencies) >= 200
    # What comes at once is decided together.
    batches, tasks = asyncio.run(_sums(url, "router_batch_size_count", "router_batch_size_sum"))
    assert tasks / batches > 8


@pytest.mark.slow
def test_random_arrivals_are_served_without_an_error(url: str) -> None:
    load = asyncio.run(arrive(url, 10.0, 3.0))
    assert not load.errors and len(load.latencies) > 10


@pytest.mark.slow
def test_killed_clients_leave_nothing_behind(url: str) -> None:
    left = asyncio.run(kill(url, 300))
    assert left.pop("inside") >= 150
    assert set(left.values()) == {0.0}, left
    assert ask(f"{url}/v1/route", {"task": "Sort."}).status == 200


async def _sums(url: str, *names: str) -> list[float]:
    async with session() as looking:
        return [await gauge(looking, url, name) for name in names]


# -- how it ends ------------------------------------------------------------------------------------------------


def remote(teacher: FakeTeacher, *more: str) -> tuple[list[str], dict[str, str]]:
    """A server whose decisions take as long as the teacher's answers."""
    options = ["--backend=remote", "--model=m", f"--base-url={teacher.url}", f"--timeout={PATIENCE}"]
    options += [f"--time-limit={PATIENCE}", *(more or [f"--drain={PATIENCE}"])]
    return options, {"LLM_API_KEY": "k", "ROUTER_SERVE__TOKEN": TOKEN}


def asked(url: str, text: str) -> Later:
    return Later(lambda: ask(f"{url}/v1/route", {"task": text}, {"Authorization": f"Bearer {TOKEN}"}))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_answers_what_is_in_flight(how: signal.Signals) -> None:
    answering = threading.Event()

    def behave(call: Call) -> None:
        assert answering.wait(PATIENCE)

    with FakeTeacher(behave=behave) as teacher:
        options, environ = remote(teacher)
        with server(*options, environ={**environ, "ROUTER_LABEL__CONCURRENCY": "1"}) as (url, process):
            # The second waits in the queue while the first is being decided.
            first = asked(url, "Sort a list.")
            until(lambda: len(teacher.calls) == 1)
            second = asked(url, "Reverse a string.")
            until(lambda: b"depth 1" in _metrics(url))
            process.send_signal(how)
            until(lambda: not _listens(url))
            answering.set()
            assert [one.get().status for one in (first, second)] == [200, 200]
            assert process.wait(PATIENCE) == 0


def test_what_hangs_is_cut_off_when_the_time_to_end_is_over() -> None:
    with FakeTeacher(delay=PATIENCE) as teacher:
        options, environ = remote(teacher, "--drain=1")
        with server(*options, environ=environ) as (url, process):
            hanging = asked(url, "Sort a list.")
            until(lambda: len(teacher.calls) == 1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 3
            assert (hanging.get().status, hanging.get().code) == (503, "shutting_down")


def _listens(url: str) -> bool:
    try:
        ask(f"{url}/healthz")
    except OSError:
        return False
    return True


def _metrics(url: str) -> bytes:
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        page: bytes = answer.read()
    return page


def test_the_token_is_never_said(tmp_path: Path) -> None:
    environ = {**os.environ, "ROUTER_SERVE__TOKEN": TOKEN}
    shown = subprocess.run(
        [sys.executable, "-m", "router_cli", "config", "show", "--json"], capture_output=True, text=True, env=environ
    )
    assert json.loads(shown.stdout)["serve.token"]["value"] == "********" and TOKEN not in shown.stdout
    command = [sys.executable, "-m", "router_cli", "serve", "--backend=heuristic", "--port=0", "-vv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        ask(line.split()[2].rstrip(",").removesuffix("/v1") + "/v1/route", {"task": "x"}, {"Authorization": "Bearer x"})
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "") and TOKEN not in line + out
    assert "0 requests answered, 0 decisions, 1 refused" in out

"""What a server takes: `python -m benchmarks.serve --adapter outputs/quickstart/adapter`.

Starts `router serve` as a user does, and asks it from this machine about the project's own tasks, no text twice:

    saturation    --clients at once, each asking again as soon as it is answered, for --seconds: decisions a second,
                  errors, and the server's memory in the first and in the last fifth
    half load     requests at random times (a Poisson process), half as many a second as it took: p50, p99, their ratio
    killed        --killed clients that are killed while they wait: what is left of them in the queue and of open files

Clients and server share the machine's cores, so that a server of its own does better. The bars: no error, p99 within 3
times p50 at half load, memory flat (at most 5 % more), nothing left of killed clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import aiohttp

from router_cli.jsonl import read_rows
from router_cli.tasks import locate


@dataclass
class Load:
    """What a load came to: seconds of each answer, errors by their name, megabytes of the server over time."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Seconds that this share of the answers took at most; NaN without any."""
        ranked = sorted(self.latencies)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else float("nan")

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    @property
    def fifths(self) -> list[float]:
        """The memory's peaks in each fifth of the time; empty where it is not known."""
        size = len(self.memory) / 5
        return [max(self.memory[int(i * size) : int((i + 1) * size)]) for i in range(5)] if size >= 1 else []

    @property
    def growth(self) -> float:
        """The memory of the last fifth of the time over that of the first; NaN where it is not known."""
        return self.fifths[-1] / self.fifths[0] if self.fifths else float("nan")


def texts() -> Iterator[str]:
    """The project's own tasks for ever, none of them twice."""
    rows = [str(row["task"]) for _, row in read_rows(locate("rubric"))]
    random.Random(0).shuffle(rows)
    return (f"{rows[number % len(rows)]} ({number})" for number in count())


@contextmanager
def server(*options: str, environ: dict[str, str] | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`router serve` on a free port; its address, and the process. It is told to end at the end of the block."""
    command = [sys.executable, "-m", "router_cli", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environ or {})}) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"(http://\S+)/v1,", line):
                    break
            else:
                raise SystemExit(f"the server did not start: {''.join(said)}")
            yield found[1], process
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()


async def ask(session: aiohttp.ClientSession, url: str, text: str, load: Load) -> None:
    """One task; what it took, or what went wrong."""
    started = time.perf_counter()
    try:
        async with session.post(f"{url}/v1/route", json={"task": text}) as answer:
            body = await answer.json()
            if answer.status != 200:
                load.errors[f"{answer.status} {body['error']['code']}"] += 1
                return
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        load.errors[type(error).__name__] += 1
        return
    load.latencies.append(time.perf_counter() - started)


async def gauge(session: aiohttp.ClientSession, url: str, name: str) -> float:
    """A gauge of /metrics."""
    async with session.get(f"{url}/metrics") as answer:
        found = re.search(rf"^{name} (\S+)$", await answer.text(), re.MULTILINE)
    return float(found[1]) if found else float("nan")


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300))


async def saturate(url: str, clients: int, seconds: float) -> Load:
    """So many clients, each asking again as soon as it is answered."""
    load, asked, end = Load(), texts(), time.perf_counter() + seconds
    async with session() as asking, session() as looking:

        async def client() -> None:
            while time.perf_counter() < end:
                await ask(asking, url, next(asked), load)

        async def watch() -> None:
            while time.perf_counter() < end:
                load.memory.append(await gauge(looking, url, "process_resident_memory_bytes") / 1e6)
                await asyncio.sleep(min(1.0, seconds / 10))

        started = time.perf_counter()
        await asyncio.gather(watch(), *(client() for _ in range(clients)))
        load.seconds = time.perf_counter() - started
    return load


async def arrive(url: str, rate: float, seconds: float) -> Load:
    """Requests at random times, `rate` a second on average, however slow the answers are."""
    load, asked, dice = Load(), texts(), random.Random(1)
    async with session() as asking, asyncio.TaskGroup() as group:
        started = due = time.perf_counter()
        while (due := due + dice.expovariate(rate)) < started + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(ask(asking, url, next(asked), load))
    load.seconds = time.perf_counter() - started
    return load


CHILD = """
import asyncio, sys
from benchmarks.serve import Load, ask, session, texts
async def main():
    asked = texts()
    async with session() as asking:
        waiting = asyncio.gather(*(ask(asking, sys.argv[1], next(asked), Load()) for _ in range(int(sys.argv[2]))))
        print("asked", flush=True)
        await waiting
asyncio.run(main())
"""


async def kill(url: str, clients: int) -> dict[str, float]:
    """Kill a process whose clients wait; what is left in the server 30 s later at most: queue, requests, files."""
    gauges = ("router_queue_depth", "router_requests_in_progress", "process_open_fds")
    async with session() as looking:

        async def look() -> dict[str, float]:
            return {name: await gauge(looking, url, name) for name in gauges}

        before = await look()
        with subprocess.Popen([sys.executable, "-c", CHILD, url, str(clients)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            await asyncio.to_thread(child.stdout.readline)
            while (inside := await look())["router_requests_in_progress"] < clients / 2:
                assert child.poll() is None, "answered before they could be killed: take more clients"
            child.send_signal(signal.SIGKILL)
        end = time.perf_counter() + 30
        while (after := await look()) != before and time.perf_counter() < end:
            await asyncio.sleep(0.1)
    return {"inside": inside["router_requests_in_progress"], **{name: after[name] - before[name] for name in gauges}}


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """All three, after a warm-up."""
    await saturate(url, options.clients, min(10.0, options.seconds / 4))
    full = await saturate(url, options.clients, options.seconds)
    if not full.latencies:
        raise SystemExit(f"nothing was answered: {dict(full.errors)}")
    half = await arrive(url, options.rate or full.rate / 2, options.half_seconds or options.seconds)
    left = await kill(url, options.killed)
    ratio = half.percentile(0.99) / half.percentile(0.5)
    errors = full.errors + half.errors
    return {
        "decisions a second": round(full.rate, 2),
        "clients": options.clients,
        "p50 at saturation, ms": round(1000 * full.percentile(0.5)),
        "p99 at saturation, ms": round(1000 * full.percentile(0.99)),
        "memory, MB": [round(min(full.memory)), round(max(full.memory))],
        "memory by fifths of the time, MB": [round(one) for one in full.fifths],
        "memory, last fifth over first": round(full.growth, 3),
        "half load, requests a second": round(half.rate, 2),
        "half load, requests": len(half.latencies),
        "p50 at half load, ms": round(1000 * half.percentile(0.5)),
        "p99 at half load, ms": round(1000 * half.percentile(0.99)),
        "p99 over p50": round(ratio, 2),
        "errors": dict(errors),
        "left of killed clients": left,
        "bars": {
            "no error": not errors,
            "p99 within 3 times p50": ratio <= 3,
            "memory flat": full.growth <= 1.05,
            "killed clients leak nothing": not any(value for name, value in left.items() if name != "inside"),
        },
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="folder of a trained adapter; without one the offline rules serve")
    parser.add_argument("--base", help="base model, for `router serve --base`")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--half-seconds", type=float, help="seconds of half load (default: --seconds)")
    parser.add_argument("--rate", type=float, help="requests a second of the half load (default: as measured)")
    parser.add_argument("--killed", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    chosen = [f"--{name}={value}" for name in ("adapter", "base") if (value := getattr(options, name))]
    chosen = [
        *(chosen or ["--backend=heuristic"]),
        f"--batch-size={options.batch_size}",
        f"--queue={4 * options.clients}",
    ]
    with server(*chosen) as (url, _):
        figures = asyncio.run(measure(url, options))
    print(json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", **figures}, indent=2))


if __name__ == "__main__":
    main()

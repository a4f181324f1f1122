"""How fast `router label` buys labels, beside the plain openai client: `python -m benchmarks.label`.

Against a quick server in a process of its own (`benchmarks.server`), each client in another:

speed   with 500 ms latency: share of the ideal, which is tasks / concurrency * latency
limit   with 3,000 requests a minute: rows lost, share of the limit used, share of the requests wasted; told by `--rpm`,
        by headers, and not at all, with and without Retry-After
memory  peak of `router label` for many tasks against few

Rivals: `plain` is AsyncOpenAI as people use it, its own retries on, all tasks gathered under a semaphore; `raw` is bare
aiohttp without retries, as fast as Python gets here (only for `speed`); `curator` is bespokelabs-curator, with the
endpoint's limit told where `router` is told it, if `--curator PYTHON` names the interpreter of an environment that has
it (it needs another version of the openai client). Times are the server's: from the first request
to the last answer. Sizes are options, so that it can be tried small: `--tasks 100 --concurrency 16 --only speed`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = "gpt-4o"


@contextlib.contextmanager
def serving(*options: str) -> Iterator[str]:
    """A server's base URL."""
    command = [sys.executable, "-m", "benchmarks.server", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        yield server.stdout.readline().strip()
        server.stdin.close()


def stats(url: str) -> dict[str, Any]:
    """What the server saw."""
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/stats") as response:
        return dict(json.load(response))


def texts(count: int) -> Iterator[str]:
    """So many different tasks."""
    return (
        f"Write a function that returns item {i} of a sorted list, and raises IndexError past its end."
        for i in range(count)
    )


# -- the clients, each in a process of its own ----------------------------------------------------------------


def ours(url: str, count: int, concurrency: int, options: list[str]) -> int:
    """`router label` as the Python API has it; the rows it wrote."""
    from router_cli.label import label
    from router_cli.settings import load

    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "tasks.jsonl", Path(folder) / "labels.jsonl"
        with data.open("w") as file:
            file.writelines(json.dumps({"id": f"t{i}", "task": text}) + "\n" for i, text in enumerate(texts(count)))
        values = {"label.data": str(data), "label.output": str(output), "label.concurrency": concurrency}
        values |= {"endpoint.base_url": url, "label.model": MODEL, **dict(one.split("=") for one in options)}
        result = label(load({key: ("benchmark", value) for key, value in values.items()}, environ={}))
        return result.labelled


def body(text: str) -> dict[str, Any]:
    """The request that `router label` makes."""
    from router_cli import prompts
    from router_cli.space import DecisionSpace

    space = DecisionSpace(("planner", "builder", "tester", "refractor"))
    schema = {"name": "decision", "strict": True, "schema": space.json_schema()}
    return {
        "model": MODEL,
        "messages": [message.model_dump() for message in prompts.teacher_messages(text, space)],
        "temperature": 0.1,
        "max_tokens": 1024,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }


def plain(url: str, count: int, concurrency: int, options: list[str]) -> int:
    """AsyncOpenAI under a semaphore; the rows that did not end in an exception."""
    from openai import AsyncOpenAI

    async def run() -> int:
        client, free = AsyncOpenAI(api_key="none", base_url=url), asyncio.Semaphore(concurrency)

        async def one(text: str) -> str | None:
            async with free:
                answer = await client.chat.completions.create(**body(text))
                return answer.choices[0].message.content

        done = await asyncio.gather(*[one(text) for text in texts(count)], return_exceptions=True)
        return sum(isinstance(answer, str) for answer in done)

    return asyncio.run(run())


def raw(url: str, count: int, concurrency: int, options: list[str]) -> int:
    """Bare aiohttp, the body encoded once."""
    import aiohttp

    async def run() -> int:
        todo, sent = iter(range(count)), json.dumps(body("a task")).encode()
        headers = {"Content-Type": "application/json"}

        async def worker(session: aiohttp.ClientSession) -> int:
            rows = 0
            for _ in todo:
                async with session.post(f"{url}/chat/completions", data=sent, headers=headers) as response:
                    rows += "choices" in json.loads(await response.read())
            return rows

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:
            return sum(await asyncio.gather(*[worker(session) for _ in range(concurrency)]))

    return asyncio.run(run())


def curator(url: str, count: int, concurrency: int, options: list[str]) -> int:
    """bespokelabs-curator with its backend for OpenAI; the rows it returns."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        os.environ |= {"TELEMETRY_ENABLED": "false", "OPENAI_API_KEY": "none", "CURATOR_CACHE_DIR": folder}
        import litellm

        # It would fetch the vocabulary that litellm brings along.
        vocabularies = Path(litellm.__file__).parent / "litellm_core_utils" / "tokenizers"
        os.environ |= {"HF_HOME": folder, "TIKTOKEN_CACHE_DIR": str(vocabularies)}
        from bespokelabs import curator

        class Labeller(curator.LLM):  # type: ignore[misc]  # not installed where types are checked
            def prompt(self, row: dict[str, Any]) -> Any:
                return body(row["task"])["messages"]

            def parse(self, row: dict[str, Any], response: Any) -> Any:
                return {"answer": str(response)}

        told = [int(float(one.partition("=")[2])) for one in options if one.startswith("label.rpm=")]
        rate = {"max_requests_per_minute": told[0] if told else 10**6, "max_tokens_per_minute": 10**9}
        backend = {"base_url": url, "max_concurrent_requests": concurrency, "require_all_responses": False, **rate}
        model = Labeller(MODEL, backend="openai", backend_params=backend, generation_params={"temperature": 0.1})
        return len(model([{"task": text} for text in texts(count)], working_dir=folder).dataset)


CLIENTS = {"ours": ours, "plain": plain, "raw": raw, "curator": curator}
RIVAL_PYTHON: list[str] = []
"""The interpreter that has curator, if there is one."""


def rivals(*names: str) -> list[str]:
    """The clients to compare, curator among them where it is to be had."""
    return [*names, *(["curator"] if RIVAL_PYTHON else [])]


def measured(client: str, url: str, count: int, concurrency: int, *options: str) -> dict[str, Any]:
    """Run a client against a server: `rows`, `cpu` (ms a task) and `memory` (peak, MB) of the client, and the stats."""
    python = RIVAL_PYTHON[0] if client == "curator" else sys.executable
    command = [python, "-m", "benchmarks.label", "--client", client, "--url", url, "--tasks", str(count)]
    chosen = [word for option in options for word in ("--set", option)]
    done = subprocess.run(
        [*command, "--concurrency", str(concurrency), *chosen],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if client == "curator" else None,  # it draws pictures there
        text=True,
        check=True,
    )
    seen = stats(url)
    return {**json.loads(done.stdout), **seen, "seconds": seen["last"] - seen["first"]}


def run_client(options: argparse.Namespace) -> None:
    """Be the client, and tell what it took."""
    before = time.process_time()
    rows = CLIENTS[options.client](options.url, options.tasks, options.concurrency[0], options.options)
    cpu = (time.process_time() - before) / options.tasks * 1000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": rows, "cpu": cpu, "memory": peak}))


# -- what is measured -----------------------------------------------------------------------------------------


def speed(count: int, concurrencies: list[int], latency: float) -> None:
    """Throughput as a share of the ideal."""
    print(f"speed: {count:,} tasks, {latency * 1000:g} ms latency")
    for concurrency in concurrencies:
        ideal = count / concurrency * latency
        for client in rivals("ours", "plain", "raw"):
            with serving("--latency", str(latency)) as url:
                seen = measured(client, url, count, concurrency)
            print(
                f"  concurrency {concurrency:4}  {client:7} {ideal / seen['seconds']:6.1%} of the ideal"
                f"  {seen['seconds']:6.1f} s  {seen['cpu']:5.2f} ms CPU a task  {seen['rows']:,} rows",
                flush=True,
            )


def limit(count: int, concurrencies: list[int], latency: float, rpm: int, burst: float) -> None:
    """What becomes of a rate limit."""
    print(f"limit: {count:,} tasks, {rpm:,} requests a minute, {burst:g} s of them in the bucket at the start")
    for concurrency in concurrencies:
        for name, server, options in (
            ("option", [], [f"label.rpm={rpm}"]),
            ("headers", ["--tell"], []),
            ("untold", [], []),
            ("Retry-After", ["--retry-after"], []),
        ):
            for client in rivals("ours", "plain"):
                if client == "plain" and name == "option":
                    continue  # it has no such option
                limits = ["--latency", str(latency), "--rpm", str(rpm), "--burst", str(burst)]
                with serving(*limits, *server) as url:
                    seen = measured(client, url, count, concurrency, *options)
                used = seen["answered"] / (rpm / 60 * seen["seconds"])
                wasted = seen["rejected"] / (seen["answered"] + seen["rejected"])
                print(
                    f"  concurrency {concurrency:4}  {name:11} {client:7} {count - seen['rows']:5} rows lost"
                    f"  {used:6.1%} of the limit used  {wasted:6.1%} wasted  {seen['seconds']:6.1f} s",
                    flush=True,
                )


def memory(few: int, many: int) -> None:
    """Peak memory for many tasks against few."""
    peaks = []
    for count in (few, many):
        with serving("--latency", "0") as url:
            peaks.append(measured("ours", url, count, 64)["memory"])
    print(f"memory: {peaks[0]:.0f} MB for {few:,} tasks, {peaks[1]:.0f} MB for {many:,}: {peaks[1] - peaks[0]:+.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("speed", "limit", "memory"), default=["speed", "limit", "memory"])
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--limit-tasks", type=int, default=1000)
    parser.add_argument("--many", type=int, default=200_000, help="tasks of the memory test, against --tasks")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--rpm", type=int, default=3000)
    parser.add_argument("--burst", type=float, default=1.0)
    parser.add_argument("--curator", metavar="PYTHON", help="interpreter of an environment with bespokelabs-curator")
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--set", dest="options", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        run_client(options)
        return
    RIVAL_PYTHON.extend([options.curator] if options.curator else [])
    if "speed" in options.only:
        speed(options.tasks, options.concurrency, options.latency)
    if "limit" in options.only:
        limit(options.limit_tasks, options.concurrency, options.latency, options.rpm, options.burst)
    if "memory" in options.only:
        memory(options.tasks, options.many)


if __name__ == "__main__":
    main()

"""How well `router eval --execute` keeps a worker busy: `python -m benchmarks.execute`.

Tasks times four topologies times repeats against a quick server in a process of its own (`benchmarks.server`). The
baseline is the ideal: calls times latency divided by concurrency. Time is that of the whole call, its start, the
sandbox and the files included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.label import serving, stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--concurrency", type=int, default=64)
    options = parser.parse_args()

    from router_cli.execute import execute
    from router_cli.settings import load

    os.environ["OPENAI_API_KEY"] = "none"
    with tempfile.TemporaryDirectory() as folder, serving("--latency", str(options.latency)) as url:
        data = Path(folder) / "toy.jsonl"
        rows = (
            {
                "task_id": f"T/{i}",
                "prompt": f'def f{i}(x):\n    """Add {i}.\n    >>> f{i}(1)\n    {i + 1}\n    """\n',
                "entry_point": f"f{i}",
                "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
            }
            for i in range(options.tasks)
        )
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "eval.data": str(data),
            "eval.output_dir": folder,
            "eval.allow_code_execution": True,
            "eval.repeats": options.repeats,
            "run.concurrency": options.concurrency,
            "endpoint.base_url": url,
        }
        settings = load({key: ("benchmark", value) for key, value in values.items()}, environ={})
        started = time.perf_counter()
        done = execute(settings, {})
        seconds = time.perf_counter() - started
        calls = stats(url)["answered"]
    ideal = calls * options.latency / options.concurrency
    print(
        f"{done.cells:,} executions, {calls:,} calls of {options.latency * 1000:g} ms, {options.concurrency} at once: "
        f"{seconds:.1f} s, {seconds / ideal:.2f} times the ideal ({ideal:.1f} s)"
    )


if __name__ == "__main__":
    main()

"""What a run in the sandbox costs over a bare `python -c pass`: `python -m benchmarks.sandbox [RUNS] [AT_ONCE]`.

Both are started in turn, RUNS (1,000) of each, AT_ONCE (the number of cores) at a time, so that what else the machine
does falls on both alike. The solution and its one assertion cost nothing by themselves. Then: what is left behind.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from router_cli.teams.sandbox import Sandbox

CODE, TESTS = "def add(a, b):\n    return a + b", "def check(candidate):\n    assert candidate(1, 2) == 3"
BATCH = 50


def bare() -> None:
    subprocess.run([sys.executable, "-c", "pass"], check=True)


def left_behind(folder: str) -> tuple[int, int, int]:
    """Processes, files and KiB of System V shared memory that the runs left."""
    import psutil

    processes = sum(folder in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    segments = Path("/proc/sysvipc/shm")
    rows = segments.read_text().splitlines()[1:] if segments.exists() else []
    mine = sum(int(row.split()[3]) for row in rows if int(row.split()[7]) == os.getuid())
    return processes, len(list(Path(folder).iterdir())), mine // 1024


def main(runs: int = 1000, at_once: int = 0) -> str:
    """The table as Markdown; times in milliseconds of wall clock a run."""
    import psutil

    at_once = at_once or os.cpu_count() or 1
    box = Sandbox(allow=True)
    lines = ["| what | runs | median | 95 % | wall / runs |", "|---|---:|---:|---:|---:|"]
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
        tempfile.tempdir, outer = folder, tempfile.tempdir
        shared = left_behind(folder)[2]
        memory = psutil.Process().memory_info().rss

        def judged() -> None:
            verdict = box.run_tests(CODE, TESTS, "add")
            if not verdict.passed:
                raise RuntimeError(f"a run that should pass ended with {verdict}")

        def timed(what: Callable[[], None]) -> float:
            started = time.perf_counter()
            what()
            return 1000 * (time.perf_counter() - started)

        kinds: dict[str, Callable[[], None]] = {"python -c pass": bare, "sandbox": judged}
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for start in range(0, runs, BATCH):
            for name, what in kinds.items():
                batch = [what] * min(BATCH, runs - start)
                started = time.perf_counter()
                times[name] += pool.map(timed, batch)
                spent[name] = spent.get(name, 0.0) + 1000 * (time.perf_counter() - started)
        grown = (psutil.Process().memory_info().rss - memory) / 2**20
        processes, files, segments = left_behind(folder)
        tempfile.tempdir = outer
    for name, each in times.items():
        late = sorted(each)[int(0.95 * (len(each) - 1))]
        lines.append(
            f"| {name} | {len(each)} | {statistics.median(each):.1f} | {late:.1f} | {spent[name] / len(each):.1f} |"
        )
    ratio = spent["sandbox"] / spent["python -c pass"]
    lines += [
        "",
        f"A run costs {ratio:.2f} times a bare interpreter; {at_once} at once; {', '.join(box.layers) or 'no walls'}.",
        f"Left behind: {processes} processes, {files} files, {segments - shared} KiB of shared memory; "
        f"this process grew by {grown:.1f} MiB.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(main(*(int(number) for number in sys.argv[1:3])))

"""The inside of the sandbox: three processes, forked from one interpreter that `sandbox.py` starts for each run.

    guard      enters the namespaces, waits for the judge until the clock runs out, then kills and reaps all there is
    judge      runs the tests; reads them, and the nonce, only after the solution's process has been forked
    solution   runs the generated code; gets nothing but calls and gives back nothing but plain values (`wire.py`)

So the tests' text, the expected values, the assertions and the nonce never enter the process that the generated code
runs in, and nothing that the code does to its own process reaches an assertion. Both lower processes are confined
(`confine.py`): hidden tests may come from the internet as well.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import math
import os
import re
import signal
import sys
import typing
from typing import Any, NoReturn

from router_cli.teams import confine, syscalls
from router_cli.teams.judge import Ended, Solution, run
from router_cli.teams.solution import serve
from router_cli.teams.wire import BROKEN, KILLED, TIMED_OUT

# Loaded before the fork, for the judge and the solution at once: what nearly every solution imports anyway.
COMMON = (collections, itertools, math, re, typing)


def main(config: str) -> NoReturn:
    """Be the guard of one run. `config` is JSON: `layers`, `folder` and the fields of `sandbox.Limits`."""
    settings = json.loads(config)
    sys.dont_write_bytecode = True
    if "namespaces" in settings["layers"]:
        confine.enter_namespaces()
        confine.replace_root(settings["folder"], settings["disk_mb"])
    # After the namespaces: gaining their privileges undoes all three.
    confine.die_with_parent()
    confine.adopt_orphans()
    confine.hide_memory()
    judge = os.fork()
    if judge == 0:
        try:
            _judge(settings)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(BROKEN)
    _guard(judge, settings["wall_seconds"])


def _guard(judge: int, seconds: float) -> NoReturn:
    late = False

    def stop(*_: object) -> None:
        nonlocal late
        late = True
        os.kill(judge, signal.SIGKILL)

    os.close(0)
    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, status = os.waitpid(judge, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    # A process namespace is empty once its first process is gone. Else: the judge's group, and whoever left it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(judge, signal.SIGKILL)
    while True:
        for child in _children():
            os.kill(child, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            break
    code = os.waitstatus_to_exitcode(status)
    os._exit(TIMED_OUT if late else KILLED if code < 0 else code)


def _children() -> list[int]:
    try:
        with open("/proc/thread-self/children") as file:  # noqa: PTH123 - see confine.py
            return [int(word) for word in file.read().split()]
    except OSError:  # no /proc: in a namespace, or not Linux
        return []


def _judge(settings: dict[str, Any]) -> NoReturn:
    os.setpgid(0, 0)
    confine.limit(settings)
    requests, replies, output = os.pipe(), os.pipe(), os.pipe()
    confine.die_with_parent()
    if "namespaces" in settings["layers"]:
        confine.hide_processes()
    pid = os.fork()
    if pid == 0:
        try:
            serve(settings, requests[0], replies[1], output[1])
        finally:
            os._exit(BROKEN)
    report = os.dup(1)
    for end in (requests[0], replies[1], output[1]):
        os.close(end)
    os.set_blocking(output[0], False)
    confine.drop_privileges()
    if "landlock" in settings["layers"]:
        confine.restrict_reading()
    if "seccomp" in settings["layers"]:
        syscalls.filter_calls(files="namespaces" in settings["layers"])
    with os.fdopen(0, "rb") as stdin:
        task = json.load(stdin)
    for stream in (1, 2):
        os.dup2(output[0], stream)  # a reading end: what the tests print goes nowhere
    sys.stdout = sys.stderr = _Nowhere()
    solution = Solution(pid, requests[1], replies[0], output[0], settings["output_kb"] * 1024)
    try:
        reason, detail = run(task, solution)
    except Ended as ended:
        reason, detail = ended.verdict
    except Exception as error:  # no memory, for one
        reason, detail = "wrong", type(error).__name__
    detail = detail.encode("utf-8", "replace").decode()
    for _ in range(4):  # a pipe's worth, and not for as long as the solution goes on
        if not solution.drain():
            break
    told = {"reason": reason, "detail": detail, "output": solution.kept.decode("utf-8", "replace")}
    if reason == "passed":
        told["nonce"] = task["nonce"]
    message = json.dumps(told).encode()
    while message:
        message = message[os.write(report, message) :]
    os._exit(0)


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

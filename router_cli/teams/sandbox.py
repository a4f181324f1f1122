"""Judge generated code by tests that it cannot see, in processes that can reach nothing and leave nothing.

The run itself is in `harness.py`, the walls are in `confine.py` and `syscalls.py`; docs/sandbox.md says what they hold
against.
"""

from __future__ import annotations

import functools
import json
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from router_cli.errors import RouterError, UsageError
from router_cli.progress import SILENT, Progress
from router_cli.teams.wire import KILLED, TIMED_OUT

Layer = Literal["namespaces", "landlock", "seccomp"]
Reason = Literal[
    "passed",  # the last assertion was reached, and the judge proved it
    "wrong",  # an assertion failed, or the tests could not use what came back
    "raised",  # the solution raised an exception that the tests did not expect
    "load",  # the code does not compile, or raises when it is loaded
    "missing",  # the code defines no function of the wanted name
    "exited",  # the solution's process ended, or tried to end the run
    "timeout",  # the wall clock ran out
    "limit",  # processor time or memory ran out
    "unsupported",  # an argument or a value is no plain value
    "tests",  # the tests do not run by themselves: a fault of the task, not of the solution
]

_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from router_cli.teams.harness import main; "
    "sys.path.pop(); main(sys.argv[2])"
)
_GRACE = 10.0
"""Seconds beyond the wall clock, which the guard inside keeps, before the run is killed from outside."""


@dataclass(frozen=True)
class Limits:
    """What one run may use. Solution and judge each have it to themselves, but for the wall clock."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_mb: int = 512
    file_mb: int = 16  # one file; all together: disk_mb
    disk_mb: int = 64  # where there are namespaces; without them no file is written
    output_kb: int = 64  # what is kept of standard output and error; the rest is dropped
    open_files: int = 64
    threads: int = 32


@dataclass(frozen=True)
class Verdict:
    """How one run ended. `detail` and `output` come from the solution's process and may hold arguments of the tests:
    where the tests are hidden, neither goes into a prompt.
    """

    reason: Reason
    detail: str = ""
    output: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def passed(self) -> bool:
        """Whether the solution passed all tests."""
        return self.reason == "passed"


class Sandbox:
    """Where generated code runs. Any number of threads may use one at the same time.

    `layers` are the walls that this system has. Missing ones are said to `progress`; given ones
    are demanded instead of found out.
    """

    def __init__(
        self,
        *,
        allow: bool,
        limits: Limits = Limits(),
        progress: Progress = SILENT,
        layers: tuple[Layer, ...] | None = None,
    ) -> None:
        """`allow` is the user's own word (--allow-code-execution): UsageError without it, or on Windows."""
        _permit(allow)
        self.limits = limits
        self.layers = available_layers() if layers is None else layers
        for missing in _missing(self.layers):
            progress.warn(missing)

    def run_tests(self, code: str, tests: str, entry_point: str | None = None, *, setup: str = "") -> Verdict:
        """Run `tests` against `code` in fresh processes.

        With an `entry_point`, HumanEval's shape: `tests` define `check(candidate)`, or call the function by its name.
        Without, MBPP's: assert statements that call functions of `code` by their names. `setup` is source that the
        tests may use, and is trusted like them (HumanEval's prompt, whose helpers some checks call). Empty tests ask
        whether the code loads. Raises RouterError where the sandbox itself fails.
        """
        task = {"code": code, "tests": tests, "entry_point": entry_point, "setup": setup}
        return _run(json.dumps(task), self.limits, self.layers)


def _permit(allow: bool, system: str = sys.platform) -> None:
    if not allow:
        raise UsageError("this runs code that a model wrote: say --allow-code-execution if you want that")
    if system == "win32":
        raise UsageError("code execution needs Linux or macOS: on Windows use WSL 2 (wsl --install)")


def _missing(layers: tuple[Layer, ...], system: str = sys.platform) -> list[str]:
    if system != "linux":
        return [
            "no namespaces and no seccomp on this system: generated code runs with limits only, and can reach the "
            "network and your files; run this on Linux or in a virtual machine"
        ]
    said = []
    if "namespaces" not in layers:
        rest = "it can reach your files and processes"
        if "seccomp" in layers:
            rest = "it can write no file" + ("" if "landlock" in layers else ", but read yours, keys and tests too")
        said.append(
            f"this system lets you make no namespaces, so generated code runs without: {rest} (docs/sandbox.md)"
        )
    if "seccomp" not in layers:
        rest = "" if "namespaces" in layers else ", and can reach the network"
        said.append(f"this system has no seccomp filter: generated code may start processes{rest}")
    return said


@functools.cache
def available_layers() -> tuple[Layer, ...]:
    """The walls that hold on this system, found out by trial runs. RouterError where not even a bare one works."""
    if sys.platform != "linux":
        return ()
    combinations: tuple[tuple[Layer, ...], ...] = (
        ("namespaces", "seccomp"),
        ("landlock", "seccomp"),
        ("seccomp",),
        ("namespaces",),
        (),
    )
    problem = ""
    for layers in combinations:
        task = {"code": "def one():\n    return 1", "tests": "assert one() == 1", "entry_point": None, "setup": ""}
        try:
            verdict = _run(json.dumps(task), Limits(wall_seconds=60), layers)
        except RouterError as error:
            problem = str(error)
        else:
            if verdict.passed:
                return layers
            if verdict.reason == "timeout":  # which says nothing of the walls, and must not cost one
                raise RouterError("the sandbox's trial run took a minute: try again when this machine is less busy")
            problem = f"a trial run ended with {verdict.reason} {verdict.detail}"
    raise RouterError(f"no sandbox on this system: {problem}")


def _run(task: str, limits: Limits, layers: tuple[Layer, ...]) -> Verdict:
    nonce = secrets.token_hex(16)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="router-sandbox-", ignore_cleanup_errors=True) as folder:
        config = json.dumps({"layers": layers, "folder": folder, **asdict(limits)})
        command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _BOOT, str(Path(__file__).parents[2]), config]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        payload = f'{task[:-1]}, "nonce": "{nonce}"}}'.encode()
        try:
            told, problem = process.communicate(payload, timeout=limits.wall_seconds + _GRACE)
        except subprocess.TimeoutExpired:
            told, problem = b"", b"the guard did not keep its time"
        finally:
            if process.poll() is None:
                _stop(process)
    return _verdict(process.returncode, told, problem, nonce, time.perf_counter() - started)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a run from outside, as on Ctrl-C: the guard cleans up, or the kernel does after it."""
    process.terminate()
    try:
        process.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _verdict(code: int, told: bytes, problem: bytes, nonce: str, seconds: float) -> Verdict:
    if code == TIMED_OUT:
        return Verdict("timeout", f"not done after {seconds:.1f} s", "", seconds)
    if code == KILLED:
        return Verdict("limit", "the judge was killed at a limit (processor time or memory)", "", seconds)
    if code:
        said = problem.decode("utf-8", "replace").strip() or f"exit code {code}"
        raise RouterError(f"the sandbox failed: {said.splitlines()[-1]}")
    if not told:
        return Verdict("tests", "the tests ended the judge", "", seconds)
    report = json.loads(told)
    # Whatever else could end in this word: only the judge, past the last assertion, has this run's nonce.
    if report["reason"] == "passed" and not secrets.compare_digest(report.get("nonce", ""), nonce):
        raise RouterError("the sandbox failed: a run passed without its proof")
    return Verdict(report["reason"], report["detail"], report["output"], seconds)

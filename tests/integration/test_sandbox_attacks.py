"""Attacks on the sandbox, one a test, each named by what it tries.

Those that would do so are first shown to work on a harness of the common kind, which runs the solution and the tests as
one program and believes its exit code or its last word.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from router_cli.errors import RouterError
from router_cli.teams.sandbox import Layer, Limits, Sandbox, Verdict

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")

# No test waits for these; they are wide since the machine may be busy.
PATIENT = Limits(wall_seconds=120, memory_mb=256)
LAYERS: tuple[tuple[Layer, ...], ...] = (("namespaces", "seccomp"), ("landlock", "seccomp"))

CHECK = """
def check(candidate):
    assert candidate(1000, 2000) == 3000
    assert candidate(4000, 5000) == 9000
    assert candidate("ab", "cd") == "abcd"
"""


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a run leaves carries the test's own folder in its path or its command line."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def sandboxed(
    code: str, tests: str = CHECK, layers: tuple[Layer, ...] = LAYERS[0], limits: Limits = PATIENT
) -> Verdict:
    if not holds(layers):
        pytest.skip(f"this system has no {' and '.join(layers)}")
    return Sandbox(allow=True, limits=limits, layers=layers).run_tests(code, tests, "add")


@functools.cache
def holds(layers: tuple[Layer, ...]) -> bool:
    try:
        return Sandbox(allow=True, layers=layers).run_tests("", "").passed
    except RouterError:
        return False


def naive(folder: Path, code: str, tests: str = CHECK) -> subprocess.CompletedProcess[str]:
    """One program, as HumanEval's own harness makes it."""
    program = folder / "program.py"
    program.write_text(f"{code}\n{tests}\ncheck(add)\nprint('passed')\n")
    return subprocess.run([sys.executable, "-S", str(program)], capture_output=True, text=True, timeout=120, cwd=folder)


# -- a verdict that is not earned -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Forgery:
    """Code that does not solve the task; `believed` is what makes the naive harness count it as solved."""

    code: str
    believed: str = "exit code"
    tests: str = CHECK
    reasons: tuple[str, ...] = ("wrong", "raised", "exited", "load", "unsupported", "timeout")


WRONG = "def add(a, b):\n    return None\n"

FORGERIES = {
    "ends the process when loaded": Forgery("import os\nos._exit(0)", reasons=("exited",)),
    "ends the process when called": Forgery("import os\ndef add(a, b):\n    os._exit(0)", reasons=("exited",)),
    "exits when loaded": Forgery("import sys\nsys.exit(0)", reasons=("exited",)),
    "exits when called": Forgery("def add(a, b):\n    raise SystemExit(0)", reasons=("exited",)),
    "exits by atexit": Forgery(f"import atexit, os\natexit.register(os._exit, 0)\n{WRONG}", reasons=("wrong",)),
    "exits by excepthook": Forgery(f"import os, sys\nsys.excepthook = lambda *a: os._exit(0)\n{WRONG}"),
    "exits when collected": Forgery(
        f"import os\nclass Last:\n    def __del__(self, end=os._exit):\n        end(0)\nlast = Last()\n{WRONG}"
    ),
    "exits from a thread": Forgery(
        "import os, threading, time\ndef add(a, b):\n"
        "    threading.Timer(0.1, os._exit, (0,)).start()\n    time.sleep(100)",
        reasons=("exited",),
    ),
    "exits from a signal handler": Forgery(
        "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
        "def add(a, b):\n    signal.setitimer(signal.ITIMER_REAL, 0.1)\n    signal.pause()",
        reasons=("exited",),
    ),
    "exits from a trace of the tests": Forgery(
        "import os, sys\nsys.settrace(lambda frame, *a: os._exit(0) if frame.f_code.co_name == 'check' else None)\n"
        + WRONG,
        reasons=("wrong",),
    ),
    "forks and exits in the parent": Forgery("import os\nif os.fork():\n    os._exit(0)\n" + WRONG, reasons=("load",)),
    "becomes another program": Forgery("import os\nos.execv('/bin/true', ['true'])\n" + WRONG, reasons=("load",)),
    "dies where the tests catch everything": Forgery(
        "import os\ndef add(a, b):\n    os._exit(0)",
        tests="def check(candidate):\n    try:\n        assert candidate(1, 2) == 3\n    except:\n        pass",
        reasons=("exited",),
    ),
    "says that it passed": Forgery(f"print('passed')\n{WRONG}", believed="word", reasons=("wrong",)),
    "says that it passed at its end": Forgery(
        f"import atexit\natexit.register(print, 'passed')\n{WRONG}", believed="word", reasons=("wrong",)
    ),
    "returns what equals everything": Forgery(
        "class Any:\n    __eq__ = lambda self, other: True\n    __bool__ = lambda self: True\n"
        "def add(a, b):\n    return Any()",
        reasons=("unsupported",),
    ),
    "returns mock.ANY": Forgery(
        "from unittest.mock import ANY\ndef add(a, b):\n    return ANY", reasons=("unsupported",)
    ),
    "returns an int that equals everything": Forgery(
        "class Any(int):\n    __eq__ = lambda self, other: True\ndef add(a, b):\n    return Any()", reasons=("wrong",)
    ),
    "returns a list that equals everything": Forgery(
        "class Any(list):\n    __eq__ = lambda self, other: True\ndef add(a, b):\n    return Any()", reasons=("wrong",)
    ),
    "claims another class": Forgery(
        "class Any:\n    __class__ = int\n    __eq__ = lambda self, other: True\ndef add(a, b):\n    return Any()"
    ),
    "replaces abs": Forgery(
        f"import builtins\nbuiltins.abs = lambda x: 0\n{WRONG.replace('None', '0')}",
        tests="def check(candidate):\n    assert abs(candidate(1, 2) - 3) < 1e-6",
        reasons=("wrong",),
    ),
    "replaces all": Forgery(
        f"import builtins\nbuiltins.all = lambda x: True\n{WRONG}",
        tests="def check(candidate):\n    assert all(candidate(x, x) == 2 * x for x in range(5))",
        reasons=("wrong",),
    ),
    "replaces a function of math": Forgery(
        f"import math\nmath.isclose = lambda *a, **b: True\n{WRONG}",
        tests="def check(candidate):\n    import math\n    assert math.isclose(candidate(1, 2) or 0, 3)",
        reasons=("wrong",),
    ),
    "replaces the module math": Forgery(
        f"import sys, unittest.mock\nsys.modules['math'] = unittest.mock.MagicMock()\n{WRONG}",
        tests="def check(candidate):\n    import math\n    assert math.isclose(candidate(1, 2) or 0, 3)",
        reasons=("wrong",),
    ),
    "defines a helper of the tests": Forgery(
        f"def close(a, b):\n    return True\n{WRONG}",
        tests="try:\n    close\nexcept NameError:\n    def close(a, b):\n        return a == b\n"
        "def check(candidate):\n    assert close(candidate(1, 2), 3)",
        reasons=("wrong",),
    ),
    "ends the tests' loop": Forgery(
        "def add(a, b):\n    raise StopIteration",
        tests="def check(candidate):\n    assert all(map(candidate, [1, 2], [3, 4]))",
        reasons=("raised",),
    ),
    "reads the expected value in the caller's frame": Forgery(
        "import dis, sys\ndef add(a, b):\n    frame = sys._getframe(1)\n"
        "    for op in dis.get_instructions(frame.f_code):\n"
        "        if op.offset > frame.f_lasti and op.opname == 'LOAD_CONST':\n            return op.argval"
    ),
    "finds the tests among all objects": Forgery(
        "import gc, types\ndef add(a, b):\n    for one in gc.get_objects():\n"
        "        if isinstance(one, types.FunctionType) and one.__name__ == 'check':\n"
        "            consts = one.__code__.co_consts\n            return consts[consts.index(b) + 1]"
    ),
    "reads the tests in the program's file": Forgery(
        "import re, sys\ndef add(a, b):\n    text = open(sys.argv[0]).read()\n"
        "    return eval(re.search(re.escape(f'candidate({a!r}, {b!r}) == ').replace(\"'\", '.') + '(.*)', text)[1])"
    ),
    "reads the tests by inspect": Forgery(
        "import inspect, re, sys\ndef add(a, b):\n    text = inspect.getsource(sys._getframe(1))\n"
        "    return eval(re.search(re.escape(f'candidate({a!r}, {b!r}) == ').replace(\"'\", '.') + '(.*)', text)[1])"
    ),
    "reads the tests by way of /proc": Forgery(
        "import re\ndef add(a, b):\n    path = open('/proc/self/cmdline').read().split(chr(0))[-2]\n"
        "    text = open(path).read()\n"
        "    return eval(re.search(re.escape(f'candidate({a!r}, {b!r}) == ').replace(\"'\", '.') + '(.*)', text)[1])"
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes(name: str) -> None:
    forgery = FORGERIES[name]
    assert sandboxed(forgery.code, forgery.tests).reason in forgery.reasons


@pytest.mark.parametrize("name", FORGERIES)
def test_a_naive_harness_believes_it(name: str, tmp_path: Path) -> None:
    forgery = FORGERIES[name]
    done = naive(tmp_path, forgery.code, forgery.tests)
    assert done.returncode == 0 if forgery.believed == "exit code" else "passed" in done.stdout


# The wire between judge and solution is the sandbox's own, so there is no naive harness to try these on.
FRAMES = """
import json, os
def frame(value):
    text = json.dumps(value).encode()
    return len(text).to_bytes(4, "big") + text
def everywhere(message):
    for number in range(3, 64):
        try:
            os.write(number, message)
        except OSError:
            pass
"""
WIRE = {
    "writes a verdict wherever it can": "everywhere(json.dumps({'reason': 'passed', 'nonce': '0' * 32}).encode())",
    "answers before it is asked": "everywhere(frame(['dict', [['value', True]]]) * 9)",
    "announces a message without end": "everywhere(b'\\xff\\xff\\xff\\xff')",
    "raises what is no exception": "everywhere(frame(['dict', [['raised', 5]]]))",
    "raises without a name": "everywhere(frame(['dict', [['raised', ['list', [['list', []], 'x']]]]]))",
    "names what is no name": "everywhere(frame(['dict', [['names', ['dict', [[1, 2]]]]]]))",
    "sends an unknown type": "everywhere(frame(['module', 'os']))",
    "nests a message deeply": "everywhere((3000000).to_bytes(4, 'big') + b'[' * 3000000)",
    "closes every file": "os.closerange(0, 64)",
    "rewrites its end of the wire": "import router_cli.teams.wire as w\nw.dumps = lambda v: b'[\"dict\", []]'",
}


@pytest.mark.parametrize("name", WIRE)
def test_no_message_forges_a_verdict(name: str) -> None:
    verdict = sandboxed(f"{FRAMES}\n{WRONG}\n{WIRE[name]}\n")
    assert verdict.reason in ("wrong", "raised", "exited", "load", "missing", "unsupported"), verdict


# -- harm -----------------------------------------------------------------------------------------------------


class World:
    """What an attack may harm, outside of the sandbox."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = f"secret-{os.getpid()}"
        self.file = folder / "precious.txt"
        self.file.write_text(self.secret)
        self.mode = self.file.stat().st_mode
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(f"\0router-{os.getpid()}-{time.monotonic_ns()}")
        self.unix.listen()
        for listener in (self.tcp, self.unix):
            listener.setblocking(False)
        self.victim = subprocess.Popen(["sleep", "300"])
        self.memory_key = 0x520000 + os.getpid() % 0xFFFF

    def close(self) -> None:
        self.tcp.close()
        self.unix.close()
        self.victim.kill()
        self.victim.wait()
        for number in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        libc = ctypes.CDLL(None)
        if (segment := libc.shmget(self.memory_key, 0, 0)) >= 0:
            libc.shmctl(segment, 0, None)

    def fill(self, code: str) -> str:
        values = {
            "FILE": repr(str(self.file)),
            "PORT": str(self.tcp.getsockname()[1]),
            "UNIX": repr(self.unix.getsockname()),
            "VICTIM": str(self.victim.pid),
            "KEY": str(self.memory_key),
        }
        for name, value in values.items():
            code = code.replace(f"<{name}>", value)
        return code

    def left(self) -> dict[int, str]:
        """Command lines, by number, of processes that carry this test's folder in them."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if str(self.folder) in command and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = command
        return found

    def harms(self, said: str) -> set[str]:
        harms = set()
        if not self.file.exists() or self.file.read_text() != self.secret or self.file.stat().st_mode != self.mode:
            harms.add("file")
        for listener in (self.tcp, self.unix):
            with contextlib.suppress(BlockingIOError):
                listener.accept()[0].close()
                harms.add("network")
        # A signal that was sent needs a moment to arrive.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.victim.wait(0.1)
            harms.add("process")
        if self.victim.poll() is None and psutil.Process(self.victim.pid).rlimit(psutil.RLIMIT_NOFILE)[0] == 7:
            harms.add("process")
        if self.secret in said:
            harms.add("secret")
        if self.left():
            harms.add("left")
        if ctypes.CDLL(None).shmget(self.memory_key, 0, 0) >= 0:
            harms.add("memory")
        return harms


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


HARMS = {
    "deletes a file": ("import os\nos.remove(<FILE>)", "file"),
    "overwrites a file": ("open(<FILE>, 'w').write('gone')", "file"),
    "renames a file": ("import os\nos.rename(<FILE>, <FILE> + '.encrypted')", "file"),
    "takes a file's permissions": ("import os\nos.chmod(<FILE>, 0o777)", "file"),
    "deletes by another program": ("import subprocess\nsubprocess.run(['rm', '-f', <FILE>], check=True)", "file"),
    "connects to a server": ("import socket\nsocket.create_connection(('127.0.0.1', <PORT>), 5)", "network"),
    "connects to a local socket": ("import socket\nsocket.socket(socket.AF_UNIX).connect(<UNIX>)", "network"),
    "kills a process": ("import os\nos.kill(<VICTIM>, 9)", "process"),
    "kills a process by a file's signal": (
        "import fcntl, os, socket\na, b = socket.socketpair()\nfcntl.fcntl(a, fcntl.F_SETOWN, <VICTIM>)\n"
        "fcntl.fcntl(a, 10, 9)\nfcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nb.send(b'x')",
        "process",
    ),
    "kills a process by ptrace": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nassert libc.ptrace(16, <VICTIM>, 0, 0) == 0\n"
        "os.waitpid(<VICTIM>, 0)\nlibc.ptrace(8, <VICTIM>, 0, 0)",
        "process",
    ),
    "changes a process's limits": ("import resource as r\nr.prlimit(<VICTIM>, r.RLIMIT_NOFILE, (7, 7))", "process"),
    "prints the environment": ("import os\nprint(os.environ)", "secret"),
    "leaves a daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.closerange(0, 64)\n        time.sleep(300)\n    os._exit(0)",
        "left",
    ),
    "leaves shared memory": (
        "import ctypes\nassert ctypes.CDLL(None).shmget(<KEY>, 4096, 0o1666) >= 0",
        "memory",
    ),
}


@pytest.mark.parametrize("layers", LAYERS, ids="+".join)
@pytest.mark.parametrize("name", HARMS)
def test_no_harm_is_done(
    name: str, layers: tuple[Layer, ...], world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", world.secret)
    before = {path.name for path in tmp_path.iterdir()}
    verdict = sandboxed(f"{world.fill(HARMS[name][0])}\n{WRONG}", layers=layers)
    assert not verdict.passed
    assert world.harms(verdict.output + verdict.detail) == set()
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", HARMS)
def test_a_naive_harness_lets_it_happen(
    name: str, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "ptrace" in name and (Path("/proc/sys/kernel/yama/ptrace_scope").exists() or os.getuid()):
        pytest.skip("this system lets nobody trace")
    monkeypatch.setenv("OPENAI_API_KEY", world.secret)
    code, harm = HARMS[name]
    done = naive(tmp_path, f"{world.fill(code)}\n{WRONG}")
    assert harm in world.harms(done.stdout)


@pytest.mark.parametrize("layers", LAYERS, ids="+".join)
@pytest.mark.parametrize("what", ["<FILE>", "'/proc/<ASKER>/environ'", "'/proc/<ASKER>/mem'"])
def test_nothing_of_the_user_can_be_read(what: str, layers: tuple[Layer, ...], world: World) -> None:
    path = world.fill(what).replace("<ASKER>", str(os.getpid()))
    verdict = sandboxed(f"open({path}, 'rb')\n{WRONG}", layers=layers)
    assert verdict.reason == "load"
    assert verdict.detail.startswith(("FileNotFoundError", "PermissionError"))


@pytest.mark.skipif(os.getuid() == 0, reason="no limit of processes holds for root")
def test_a_fork_bomb_ends_with_its_run_where_nothing_forbids_forking(world: World) -> None:
    code = f"import os\ntry:\n    while True:\n        os.fork()\nexcept OSError:\n    pass\n{WRONG}"
    assert not sandboxed(code, layers=("namespaces",)).passed
    assert world.left() == {}


def test_without_walls_a_daemon_still_ends_with_its_run(world: World) -> None:
    code = world.fill(HARMS["leaves a daemon"][0])
    if os.getuid():
        pytest.skip("the limit of processes forbids it")
    assert sandboxed(f"{code}\n{WRONG}", layers=()).reason == "wrong"
    assert world.left() == {}


# -- what a solution may not do at all ------------------------------------------------------------------------

# Each is tried when the code is loaded; `add` is right only where it worked.
TRY = """
import ctypes, os, resource, socket, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def attempt():
{body}
try:
    worked = attempt()
except (OSError, MemoryError, ValueError, RuntimeError):
    worked = False
def add(a, b):
    return a + b if worked else None
"""
DEEDS = {
    "fork": "pid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)\nreturn True",
    "start a program": "return subprocess.run(['true']).returncode == 0",
    "leave its session": "os.setsid()\nreturn True",
    "outlive its parent": "return libc.prctl(1, 0, 0, 0, 0) == 0",
    "open an internet socket": "socket.socket()\nreturn True",
    "open a datagram socket": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nreturn True",
    "open a local socket": "socket.socket(socket.AF_UNIX)\nreturn True",
    "make a file in memory": "os.memfd_create('x')\nreturn True",
    "raise its limit of memory": (
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nreturn len(bytearray(1 << 30)) > 0"
    ),
    "look for another process": "os.kill(os.getppid(), 0)\nreturn os.getppid() > 0",
    "open another process": "os.pidfd_open(os.getppid() or 1)\nreturn True",
    "read its parent's memory": "return open(f'/proc/{os.getppid()}/mem', 'rb') is not None",
}
# These a plain process may not do either, or not everywhere.
BARRED = {
    "read its parent's input": "return open(f'/proc/{os.getppid()}/fd/0', 'rb') is not None",
    "fork by the bare system call": (
        "if os.uname().machine != 'x86_64': return False\npid = libc.syscall(57)\n"
        "if pid == 0: os._exit(0)\nreturn pid > 0"
    ),
    "keep a privilege": (
        "held = (ctypes.c_uint * 6)()\nassert libc.capget((ctypes.c_uint * 2)(0x20080522, 0), held) == 0\n"
        "return any(held)"
    ),
    "make a namespace": "return libc.unshare(0x10000000) == 0",
    "mount": "return libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "open a ring": "return libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0",
    "keep a key in the kernel": "return libc.syscall({KEYCTL}, 0, -3, 1) >= 0",
    "write outside its folder": "return open('/usr/lib/router-sandbox-was-here', 'w') is not None",
    "read a package, which may hold the tests": (
        "packages = os.path.dirname(os.__file__) + '/site-packages'\n"
        "return any(open(at + '/' + name) for at, _, names in os.walk(packages) for name in names)"
    ),
    "write over its own library": "return open(os.__file__, 'a') is not None",
    "signal its own group": "os.killpg(0, 9)\nreturn True",
}


@pytest.mark.parametrize("layers", LAYERS, ids="+".join)
@pytest.mark.parametrize("name", [*DEEDS, *BARRED])
def test_a_solution_cannot(name: str, layers: tuple[Layer, ...]) -> None:
    verdict = sandboxed(deed(name), layers=layers)
    assert verdict.reason == "wrong", verdict


@pytest.mark.parametrize("name", DEEDS)
def test_a_plain_process_can(name: str, tmp_path: Path) -> None:
    if "memory" in name and os.getuid():
        pytest.skip("root alone can")
    assert naive(tmp_path, deed(name)).returncode == 0


def deed(name: str) -> str:
    body = (DEEDS | BARRED)[name].replace("{KEYCTL}", "219" if platform.machine() == "aarch64" else "250")
    return TRY.format(body="\n".join(f"    {line}" for line in body.splitlines()))


@pytest.mark.parametrize("layers", LAYERS, ids="+".join)
@pytest.mark.parametrize("deed", ["__import__('socket').socket()", "__import__('os').fork()"])
def test_the_tests_are_confined_too(deed: str, layers: tuple[Layer, ...]) -> None:
    verdict = sandboxed("def add(a, b):\n    return a + b", f"def check(candidate):\n    {deed}", layers)
    assert verdict.reason == "wrong" and "PermissionError" in verdict.detail


# -- more than its share --------------------------------------------------------------------------------------

SHORT = Limits(wall_seconds=1.5, memory_mb=256)
BURN = Limits(wall_seconds=120, cpu_seconds=1)
EXCESSES = {
    "loops": ("def add(a, b):\n    while True: pass", SHORT, ("timeout",)),
    "loops when loaded": ("while True: pass", SHORT, ("timeout",)),
    "loops and ignores every signal and exception": (
        "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "def add(a, b):\n    while True:\n"
        "        try:\n            while True: pass\n        except BaseException: pass",
        SHORT,
        ("timeout",),
    ),
    "sleeps": ("import time\ndef add(a, b):\n    time.sleep(1000)", SHORT, ("timeout",)),
    "stops itself": ("import os\ndef add(a, b):\n    os.kill(os.getpid(), 19)\n    return a", PATIENT, ("raised",)),
    "burns processor time and ignores the warning": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef add(a, b):\n    while True: pass",
        BURN,
        ("limit",),
    ),
    "takes much memory at once": ("def add(a, b):\n    return len(bytearray(1 << 32))", PATIENT, ("raised",)),
    "takes memory bit by bit": (
        "def add(a, b):\n    kept = []\n    while True:\n        kept.append(bytearray(1 << 20))",
        PATIENT,
        ("raised", "exited"),
    ),
    "starts threads without end": (
        "import threading, time\ndef add(a, b):\n"
        "    while True:\n        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()",
        PATIENT,
        ("raised",),
    ),
    "forks without end": (
        "import os\ndef add(a, b):\n    while True:\n        os.fork()",
        PATIENT,
        ("raised",),
    ),
    "writes a giant file": (
        "def add(a, b):\n    with open('/tmp/giant', 'wb') as f:\n        while True: f.write(bytes(1 << 20))",
        PATIENT,
        ("raised",),
    ),
    "writes files without end": (
        "def add(a, b):\n    for number in range(10000):\n        open(f'/tmp/{number}', 'wb').write(bytes(1 << 20))",
        PATIENT,
        ("raised",),
    ),
    "opens files without end": (
        "import os\ndef add(a, b):\n    return [os.dup(1) for _ in range(10000)]",
        PATIENT,
        ("raised",),
    ),
    "returns a giant text": ("def add(a, b):\n    return 'x' * (1 << 26)", PATIENT, ("raised", "unsupported")),
    "returns a giant number": ("def add(a, b):\n    return 1 << (1 << 28)", PATIENT, ("raised", "unsupported")),
    "returns without end": (
        "import itertools\ndef add(a, b):\n    return itertools.count()",
        PATIENT,
        ("unsupported",),
    ),
    "returns what holds itself": (
        "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
        PATIENT,
        ("unsupported",),
    ),
    "returns what raises when it is read": (
        "class Bad(dict):\n    def items(self): raise SystemExit(0)\ndef add(a, b):\n    return Bad()",
        PATIENT,
        ("raised", "exited"),
    ),
    "raises what raises when it is read": (
        "class Bad(Exception):\n    def __str__(self): raise SystemExit(0)\ndef add(a, b):\n    raise Bad",
        PATIENT,
        ("raised", "exited"),
    ),
    "crashes": ("import ctypes\ndef add(a, b):\n    ctypes.string_at(0)", PATIENT, ("exited",)),
    "recurses without end": ("def add(a, b):\n    return add(a, b)", PATIENT, ("raised",)),
    "returns half a character": ("def add(a, b):\n    return chr(0xD800)", PATIENT, ("wrong",)),
    "raises half a character": ("def add(a, b):\n    raise ValueError(chr(0xD800))", PATIENT, ("raised",)),
    "is no text": ("x = '\ud800'", PATIENT, ("load",)),
    "holds a null byte": ("x = '\0'", PATIENT, ("load",)),
}


@pytest.mark.parametrize("name", EXCESSES)
def test_no_run_takes_more_than_its_share(name: str, world: World) -> None:
    code, limits, reasons = EXCESSES[name]
    verdict = sandboxed(code, limits=limits)
    assert verdict.reason in reasons, verdict
    (verdict.detail + verdict.output).encode()  # can be written to a file
    assert world.left() == {}
    assert sorted(path.name for path in world.folder.iterdir()) == ["precious.txt"]


@pytest.mark.parametrize(
    "flood",
    [
        "for _ in range(200): print('x' * 100000)",
        "import os\nfor _ in range(200): os.write(2, bytes([255]) * 100000)",
        "import threading\ndef more():\n    while True: print('x' * 1000)\n"
        "threading.Thread(target=more, daemon=True).start()",
    ],
    ids=["standard output", "bytes on standard error", "a thread that never stops"],
)
def test_output_without_end_is_cut_and_harms_nobody(flood: str) -> None:
    verdict = sandboxed(f"{flood}\ndef add(a, b):\n    return a + b")
    assert verdict.passed
    assert 1000 <= len(verdict.output) <= PATIENT.output_kb * 1024


def test_a_run_ends_when_the_program_that_asked_for_it_is_killed(world: World) -> None:
    code = "from router_cli.teams.sandbox import *; import tempfile, sys\n"
    code += f"tempfile.tempdir = {str(world.folder)!r}\n"
    code += "Sandbox(allow=True, limits=Limits(300, 300)).run_tests('while True: pass', '')"
    asker = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    # The guard, the judge and the solution, and the asker itself.
    while sum("harness" in command for command in world.left().values()) < 3:
        assert time.monotonic() < deadline and asker.poll() is None
        time.sleep(0.05)
    asker.send_signal(signal.SIGKILL)
    asker.wait()
    while world.left():
        assert time.monotonic() < deadline, world.left()
        time.sleep(0.05)

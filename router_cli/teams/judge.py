"""The judge's side of a run in the sandbox: the tests, with the solution's functions behind a wire.

What a test calls is a stand-in that sends its arguments to the solution's process and gets plain values back, so every
comparison is of the judge's own objects.
"""

from __future__ import annotations

import builtins
import os
import select
import signal
import types
from collections.abc import Callable
from typing import Any

from router_cli.teams import wire
from router_cli.teams.solution import TEXT, send


class Ended(BaseException):
    """The run is decided, whatever the tests still do: the reason and what there is to say about it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.verdict = (reason, detail)


class Solution:
    """The judge's end of the solution's process: calls go out, plain values come back, output is kept up to a bound."""

    def __init__(self, pid: int, requests: int, replies: int, output: int, output_bytes: int) -> None:
        self.pid, self.requests, self.replies, self.output = pid, requests, replies, output
        self.kept, self.bound, self.open = bytearray(), output_bytes, True
        self.raised, self.called = "", False
        self.ended: Ended | None = None
        self.poll = select.poll()
        self.poll.register(replies, select.POLLIN)
        self.poll.register(output, select.POLLIN)

    def ask(self, request: Any) -> dict[str, Any]:
        """Send one request and wait for its reply.

        It holds `raised`, the names of the exception's classes and its message, or what was asked for. Raises Ended
        where there can be no reply, and remembers that: tests may catch everything.
        """
        try:
            if self.ended is None:
                return self._ask(request)
        except Ended as ended:
            self.ended = ended
        raise self.ended

    def _ask(self, request: Any) -> dict[str, Any]:
        try:
            message = wire.dumps(request)
        except wire.NotPlain as error:
            raise Ended("unsupported", f"the tests pass {error}, which does not travel") from None
        try:
            send(self.requests, message)
            reply = wire.loads(self._receive())
        except BrokenPipeError:
            raise self._death() from None
        except wire.NotPlain as error:
            raise Ended("unsupported", f"the solution sent {error}") from None
        if not isinstance(reply, dict):
            raise Ended("unsupported", "the solution sent a message that is no reply")
        if "foreign" in reply:
            raise Ended("unsupported", f"the solution returned {str(reply['foreign'])[:TEXT]}, which does not travel")
        if "raised" in reply:
            # The code can write what it likes to its end of the wire.
            given = reply["raised"]
            kinds, text = given if isinstance(given, list) and len(given) == 2 else ((), given)
            kinds = [str(kind) for kind in kinds] if isinstance(kinds, list) else []
            self.raised = f"{kinds[0] if kinds else 'an error'}: {text}"[:TEXT]
            return {"raised": (kinds, self.raised)}
        return reply

    def _receive(self) -> bytes:
        size = int.from_bytes(self._read(4), "big")
        if size > wire.MAX_BYTES:
            raise wire.NotPlain("a message that is too long")
        return self._read(size)

    def _read(self, size: int) -> bytes:
        read = bytearray()
        while len(read) < size:
            ready = dict(self.poll.poll())
            if self.output in ready:
                self.drain()
            if self.replies in ready:
                part = os.read(self.replies, size - len(read))
                if not part:
                    raise self._death()
                read += part
        return bytes(read)

    def drain(self) -> bool:
        """Take in what there is of the output; what is beyond the bound is dropped. Whether there was any."""
        try:
            part = os.read(self.output, 65536)
        except BlockingIOError:
            return False
        if not part and self.open:
            self.open = False
            self.poll.unregister(self.output)
        self.kept += part[: self.bound - len(self.kept)]
        return bool(part)

    def _death(self) -> Ended:
        # The pipe may have been closed by a process that lives on.
        for _ in range(50):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                if code == -signal.SIGKILL:
                    return Ended("limit", "the solution's process was killed at a limit (processor time or memory)")
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                return Ended("exited", f"the solution's process ended {how}")
            select.select([], [], [], 0.01)
        return Ended("exited", "the solution's process no longer answers")

    def call(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The solution's function `name` of these arguments: its value, or an exception of its built-in type."""
        self.called = True
        reply = self.ask({"call": name, "arguments": list(arguments), "named": named})
        if "raised" not in reply:
            value, theirs = reply.get("value"), reply.get("arguments")
            # A function that works in place returns None; any other must not change what it is judged by.
            if value is None and isinstance(theirs, list):
                for mine, changed in zip(arguments, theirs, strict=False):
                    _become(mine, changed)
            return value
        kinds, text = reply["raised"]
        for kind in kinds:
            found = getattr(builtins, kind, None)
            # As in generators (PEP 479): it would end a loop in the tests as if there were no more to test.
            if found in (StopIteration, StopAsyncIteration):
                found = RuntimeError
            if isinstance(found, type) and issubclass(found, Exception):
                try:
                    raised = found(text)
                except TypeError:  # UnicodeDecodeError and its like want more
                    continue
                raise raised
        # SystemExit and its like, which tests have no business with.
        self.ended = Ended("exited", text)
        raise self.ended


def _become(mine: Any, changed: Any) -> None:
    if isinstance(mine, list) and isinstance(changed, list):
        mine[:] = changed
    elif (isinstance(mine, dict) and isinstance(changed, dict)) or (isinstance(mine, set) and isinstance(changed, set)):
        mine.clear()
        mine.update(changed)


def run(task: dict[str, Any], solution: Solution) -> tuple[str, str]:
    """Load the solution, then run the tests against it: the reason and the detail of the verdict."""
    loaded = solution.ask({"code": task["code"]})
    if "raised" in loaded:
        kinds, text = loaded["raised"]
        return ("load" if "Exception" in kinds else "exited"), text
    given = loaded.get("names")
    names = {name for name in given if isinstance(name, str)} if isinstance(given, list) else set()
    entry = task["entry_point"]
    if entry and entry not in names:
        return "missing", f"the solution defines no function {entry}"
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(task["setup"], "<setup>", "exec", dont_inherit=True), namespace)
        tests = compile(task["tests"], "<tests>", "exec", dont_inherit=True)
    except Exception as error:
        return "tests", f"the tests do not run by themselves: {type(error).__name__}"

    def proxy(name: str) -> Callable[..., Any]:
        def function(*arguments: Any, **named: Any) -> Any:
            return solution.call(name, arguments, named)

        function.__name__ = name
        return function

    # Only what is asked for, or what the tests name and do not bring: no solution stands in for `len` or for a helper.
    wanted = {entry} if entry else {name for name in names & _names_of(tests) if not hasattr(builtins, name)}
    proxies = {name: proxy(name) for name in wanted if name == entry or name not in namespace}
    namespace.update(proxies)
    try:
        exec(tests, namespace)
        check = namespace.get("check")
        if entry and callable(check) and check not in proxies.values():
            check(proxies[entry])
    except AssertionError:
        verdict = "wrong", solution.raised
    except BaseException as error:
        # No words of the tests: what is hidden stays hidden.
        verdict = "wrong", f"the tests cannot use what the solution returned ({type(error).__name__})"
        if solution.raised:
            verdict = "raised", solution.raised
    else:
        verdict = "passed", ""
        if task["tests"].strip() and not solution.called:
            verdict = "tests", "the tests never called the solution"
    return solution.ended.verdict if solution.ended else verdict


def _names_of(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*(_names_of(one) for one in inner))

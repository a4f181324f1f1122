"""The process in the sandbox that the generated code runs in: it takes calls and gives back plain values.

It is forked before the judge has read the tests, so there is nothing in it that a solution should not see.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import types
from typing import Any, NoReturn

from router_cli.teams import confine, syscalls, wire

TEXT = 500
"""How many characters of an error's message are kept."""


def send(channel: int, message: bytes) -> None:
    """Write one message with its length in front."""
    rest = memoryview(len(message).to_bytes(4, "big") + message)
    while rest:
        rest = rest[os.write(channel, rest) :]


def serve(settings: dict[str, Any], requests: int, replies: int, output: int) -> NoReturn:
    """Give up everything, then load the code and answer calls until killed."""
    layers = settings["layers"]
    source, end = os.pipe()
    os.close(end)
    os.dup2(source, 0)  # input is at its end
    os.dup2(output, 1)
    os.dup2(output, 2)
    low, high = sorted((requests, replies))
    for first, last in ((3, low), (low + 1, high), (high + 1, 1 << 16)):
        os.closerange(first, last)
    confine.die_with_parent()
    confine.drop_privileges()
    # Processes and threads count alike, and without a namespace all of the user's: then there is only none or all.
    if "namespaces" in layers:
        resource.setrlimit(resource.RLIMIT_NPROC, (settings["threads"], settings["threads"]))
    elif "seccomp" not in layers:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    if "landlock" in layers:
        confine.restrict_reading()
    if "seccomp" in layers:
        syscalls.filter_calls(files="namespaces" in layers)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    while True:
        try:
            request = wire.loads(_exactly(requests, int.from_bytes(_exactly(requests, 4), "big")))
            reply = _answer(request, module)
        except BaseException as error:
            reply = {"raised": [[kind.__name__ for kind in type(error).__mro__], str(error)[:TEXT]]}
        try:
            message = wire.dumps(reply)
        except wire.NotPlain as error:
            message = wire.dumps({"foreign": str(error)})
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        send(replies, message)


def _exactly(channel: int, size: int) -> bytes:
    read = bytearray()
    while len(read) < size:
        part = os.read(channel, size - len(read))
        if not part:
            os._exit(0)  # the judge is gone
        read += part
    return bytes(read)


def _answer(request: dict[str, Any], module: types.ModuleType) -> dict[str, Any]:
    if "code" in request:
        exec(compile(request["code"], "<solution>", "exec", dont_inherit=True), module.__dict__)
        return {"names": [name for name, value in module.__dict__.items() if callable(value)]}
    arguments = request["arguments"]
    value = module.__dict__[request["call"]](*arguments, **request["named"])
    return {"value": value, "arguments": [one if isinstance(one, list | dict | set) else None for one in arguments]}

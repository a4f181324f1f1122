"""Values on their way between judge and solution: plain types only, rebuilt from nothing on either side.

A value that comes out of generated code has to be what it seems: no `__eq__` of its own, no subclass, no callable. So
neither pickle nor marshal: JSON, in which every container is a pair [type, parts]. Anything else does not travel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

MAX_BYTES = 16 * 2**20
"""The longest message that is read."""
MAX_ITEMS = 100_000
"""How much of an iterator travels."""

TIMED_OUT, KILLED, BROKEN = 124, 125, 70
"""How the guard ends where the judge did not report: out of time, killed at a limit, a fault of the sandbox itself."""


class NotPlain(Exception):
    """A value, or a message, that does not travel."""


def dumps(value: Any) -> bytes:
    """The message of `value`. Raises NotPlain where it is or holds anything but plain values."""
    try:
        message = json.dumps(_pack(value)).encode()
    except RecursionError:
        raise NotPlain("a value nested too deeply") from None
    if len(message) > MAX_BYTES:
        raise NotPlain(f"a value of more than {MAX_BYTES >> 20} MiB")
    return message


def loads(message: bytes) -> Any:
    """The value of a message that anyone may have made. Raises NotPlain where it is none of `dumps`."""
    try:
        return _unpack(json.loads(message))
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        raise NotPlain("a message that is no value") from None


def _pack(value: Any) -> Any:
    # Subclasses travel as what they are a kind of: a Counter equals its dict, an IntEnum its number.
    if value is None or isinstance(value, str | bool | float):
        return value
    if isinstance(value, int):
        # Beyond this, text in decimals has a limit of digits, and its time grows with their square.
        return int(value) if abs(value) < 2**63 else ["int", hex(value)]
    if isinstance(value, dict):
        return ["dict", [[_pack(key), _pack(item)] for key, item in value.items()]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [_pack(item) for item in value]]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, value.hex()]
    if isinstance(value, Iterator):
        items = [_pack(item) for item in islice(value, MAX_ITEMS + 1)]
        if len(items) <= MAX_ITEMS:
            return ["iterator", items]
    raise NotPlain(f"a value of type {type(value).__name__}")


def _unpack(node: Any) -> Any:
    if not isinstance(node, list | dict):
        return node
    kind, parts = node
    match kind:
        case "int":
            return int(parts, 16)
        case "dict":
            return {_unpack(key): _unpack(item) for key, item in parts}
        case "list":
            return [_unpack(item) for item in parts]
        case "tuple":
            return tuple(_unpack(item) for item in parts)
        case "set":
            return {_unpack(item) for item in parts}
        case "frozenset":
            return frozenset(_unpack(item) for item in parts)
        case "complex":
            return complex(*parts)
        case "range":
            return range(*parts)
        case "bytes":
            return bytes.fromhex(parts)
        case "bytearray":
            return bytearray.fromhex(parts)
        case "iterator":
            return iter([_unpack(item) for item in parts])
    raise ValueError(kind)

"""Read JSON lines with line numbers in errors, append them safely, replace files atomically.

Text files arrive as UTF-8 with or without a BOM, as UTF-16 (Windows PowerShell's `>`), with CRLF, gzipped, or on
standard input (`-`).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pydantic import BaseModel

from router_cli.errors import InputError, OutputError

BadLine = Callable[[int, str, str], None]
"""Called with line number, raw text and reason of a line that is skipped."""


def open_text(path: str) -> IO[str]:
    """Open a text file of any supported encoding for reading; `-` is standard input, which is read once.

    Bytes that are not UTF-8 come as lone surrogates (PEP 383), for `read_lines` to name their line.
    Raises InputError where the file is missing, unreadable, a folder or plainly binary.
    """
    raw: IO[bytes] | None = None
    try:
        raw = _stdin() if path == "-" else Path(path).open("rb")  # noqa: SIM115  # the caller's to close
        head = raw.peek(4)  # type: ignore[attr-defined]  # both are BufferedReader
        if head[:2] == b"\x1f\x8b":
            unzipped = gzip.GzipFile(fileobj=raw)
            unzipped.myfileobj = raw  # type: ignore[assignment]  # closed along with it
            raw = io.BufferedReader(unzipped)  # closed along with it
            head = raw.peek(4)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, expected a file") from None
    except _UNREADABLE as error:
        if raw is not None:
            raw.close()
        raise InputError(f"{path}: cannot be read: {reason(error)}") from None
    encoding = _encoding(head)
    return io.TextIOWrapper(raw, encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict")


# What reading a file raises for bad discs and for damaged or truncated gzip.
_UNREADABLE = (OSError, EOFError, zlib.error)


def _stdin() -> IO[bytes]:
    # Reading closes what it has read, and nothing is left there for a second reader.
    if sys.stdin is None or sys.stdin.closed or sys.stdin.buffer.closed:
        raise InputError("-: standard input can be read only once; save it to a file first")
    try:
        own = open(os.dup(sys.stdin.fileno()), "rb")  # noqa: SIM115, PTH123  # a descriptor, and the caller's to close
    except OSError:  # no file of the system, as in tests
        return sys.stdin.buffer
    # A thread may sit in a read when the program ends, and Python's own object is locked by that.
    sys.stdin.close()
    return own


def _encoding(head: bytes) -> str:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    # UTF-16 without a mark: JSON and task texts start with an ASCII character.
    if len(head) >= 2 and head[1] == 0 and head[0] != 0:
        return "utf-16-le"
    return "utf-8-sig"


def read_lines(path: str, on_bad: BadLine | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without line end) of every line that is not blank.

    `on_bad` takes lines that are not UTF-8. Raises InputError for them without it, and for a file that is no text,
    naming the line.
    """
    number = 0
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise InputError(f"{path}:{number}: is binary, expected text lines")
                if not whole(line):
                    refuse(path, number, line.rstrip("\r\n"), "is not UTF-8 or UTF-16 text", on_bad)
                elif line.strip():
                    yield number, line.rstrip("\r\n")
        except UnicodeError:  # UTF-16 is decoded by the block: the bad character is in the next lines
            raise InputError(f"{path}:{number + 1}: is not UTF-16 text from here on") from None
        except _UNREADABLE as error:
            raise InputError(f"{path}:{number + 1}: cannot be read further: {reason(error)}") from None


def read_rows(path: str, on_bad: BadLine | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON-lines file; `on_bad` takes bad lines, else they raise InputError."""
    for number, line in read_lines(path, on_bad):
        try:
            row = parse_row(line)
        except ValueError as error:
            refuse(path, number, line, str(error), on_bad)
        else:
            yield number, row


def parse_row(line: str) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError saying what is wrong with it."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    return row


def refuse(path: str, number: int, raw: str, problem: str, on_bad: BadLine | None) -> None:
    """Hand a bad line to `on_bad`, or raise an InputError that names file and line where there is none."""
    if on_bad is None:
        raise InputError(f"{path}:{number}: {problem}")
    on_bad(number, raw if whole(raw) else raw.encode("utf-8", "backslashreplace").decode(), problem)


def whole(text: str) -> bool:
    """Whether `text` can be written as UTF-8: it holds no half of a surrogate pair, as JSON's \\ud83d alone leaves."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def dumps(row: BaseModel | dict[str, Any]) -> str:
    """One row as a line of JSON, characters as they are."""
    if isinstance(row, BaseModel):
        row = row.model_dump(mode="json", exclude_none=False)
    line = json.dumps(row, ensure_ascii=False)
    return line if whole(line) else json.dumps(row)


class Appender:
    """An append-only JSON-lines file that survives a kill at any moment.

    A line counts once its newline is on disk: what a kill left behind the last newline is cut off on opening.
    Rows are flushed to the kernel at once (a killed process loses nothing) and to the disk every
    `sync_every` rows and on closing (a power cut loses at most that many); None leaves that to the caller (`fileno`).
    """

    def __init__(self, path: Path, sync_every: int | None = 20) -> None:
        self._path, self._sync_every, self._pending = path, sync_every, 0
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            end = self._file.seek(0, os.SEEK_END)
            if (whole_lines := _last_newline(self._file, end)) < end:
                self._file.truncate(whole_lines)
            self._file.seek(0, os.SEEK_END)

    def append(self, row: BaseModel | dict[str, Any]) -> None:
        """Write one row. Raises OutputError on a full disk, leaving the rows before it whole."""
        with writing(self._path):
            self._file.write((dumps(row) + "\n").encode())
            self._file.flush()
            self._pending += 1
            if self._sync_every is not None and self._pending >= self._sync_every:
                os.fsync(self._file.fileno())
                self._pending = 0

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def close(self) -> None:
        """Bring everything to the disk."""
        with writing(self._path):
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def __enter__(self) -> Appender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _last_newline(file: IO[bytes], end: int, block: int = 65536) -> int:
    """The offset just behind the last newline before `end`, 0 where there is none."""
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file beside `path` and move it there when the block ends well: readers see the old or the new one.

    A link stays a link, and a device or pipe (/dev/null, /dev/stdout) is written to, not replaced.
    """
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    named, path = path, Path(os.path.realpath(path))  # failures speak of the path as the user gave it
    if path.exists() and not path.is_file() and not path.is_dir():
        with writing(named), path.open(mode, encoding=encoding, newline=newline) as f:
            yield f
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(named):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open(mode, encoding=encoding, newline=newline) as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[BaseModel | dict[str, Any]]) -> int:
    """Replace a JSON-lines file atomically; returns the number of rows."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(dumps(row) + "\n")
            count += 1
    return count


def write_json(path: Path, value: BaseModel | dict[str, Any]) -> None:
    """Replace a JSON file atomically, indented for people."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    with replacing(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object. Raises InputError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into an OutputError."""
    try:
        yield
    except FileExistsError as error:  # from making the folders above it
        raise OutputError(f"{path}: cannot be written: a file stands where its folder should be") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {reason(error)}") from error


@contextmanager
def alone(path: Path, lock: Path, taken: str) -> Iterator[None]:
    """Hold the file `lock`, whose folder is made, against other processes that would write `path`.

    Raises OutputError, in the words `taken` where another process has it.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    with writing(path):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(blocking=False)
        except Timeout:
            # Where no file can be made at all, as in /proc, this is all that the lock says too.
            none = f"{path}: cannot be written: {lock.parent} takes no files"
            raise OutputError(taken if lock.exists() else none) from None
    try:
        yield
    finally:
        held.release()


def read_text(path: str) -> str:
    """The whole text of a file, `-` for standard input, with newlines for line ends. Raises what `read_lines` does."""
    lines = dict(read_lines(path))
    return "\n".join(lines.get(number, "") for number in range(1, max(lines, default=0) + 1))


def reason(error: BaseException) -> str:
    """The operating system's words for a failure, without number and path."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()

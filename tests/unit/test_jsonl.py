"""Reading JSON lines in every encoding, appending through kills and full disks, replacing atomically."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from router_cli.errors import InputError, OutputError
from router_cli.jsonl import (
    Appender,
    alone,
    dumps,
    read_json,
    read_lines,
    read_rows,
    replacing,
    write_json,
    write_rows,
)

ROWS = [{"task": "Sort a list."}, {"task": "排序列表，保留重复项。"}]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def written(folder: Path, content: bytes, name: str = "f.jsonl") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def python(code: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code, *arguments], input=stdin, capture_output=True, timeout=60)


# -- encodings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.replace("\n", "\r\n").encode(),
        b"\xff\xfe" + TEXT.replace("\n", "\r\n").encode("utf-16-le"),
        gzip.compress(TEXT.encode()),
        gzip.compress(TEXT.encode("utf-16")),
        ("\n  \n" + TEXT.replace("\n", "\n\n")).encode(),
        TEXT.rstrip("\n").encode(),
    ],
    ids=["utf8", "bom", "utf16", "utf16be", "utf16-no-mark", "crlf", "powershell", "gz", "gz16", "blank", "no-end"],
)
def test_rows_are_the_same_in_every_encoding(tmp_path: Path, content: bytes) -> None:
    assert [row for _, row in read_rows(written(tmp_path, content))] == ROWS


def test_blank_lines_count_in_line_numbers(tmp_path: Path) -> None:
    assert [number for number, _ in read_lines(written(tmp_path, b"\n\na\n\r\nb"))] == [3, 5]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    assert len(list(read_lines(written(tmp_path, "a\u2028b\x85c\x0bd\n".encode())))) == 1


def test_standard_input_is_decoded_like_a_file_and_read_once() -> None:
    code = (
        "from router_cli.jsonl import read_rows; print(len(list(read_rows('-'))))\n"
        "try: list(read_rows('-'))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    out = python(code, stdin=TEXT.encode("utf-16")).stdout.decode().splitlines()
    assert out == ["2", "InputError -: standard input can be read only once; save it to a file first"]


# -- bad files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1}\n\xff\xfe\x00broken\n', ":2: is binary"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00", "f.jsonl:1: is not UTF-8"),
        (gzip.compress(TEXT.encode() * 5000)[:-400], "cannot be read further"),
        (gzip.compress(TEXT.encode())[:10] + b"\xff" * 40, "cannot be read"),
        (TEXT.encode("utf-16")[:-1], "is not UTF-16 text"),
        (b'{"a": 1}\n{"a": \n', ":2: is not JSON"),
        (b'{"a": 1}\n[1]\n', ":2: expected a JSON object"),
        (b'{"a": 1}\n' + b'{"a":' * 50_000 + b"\n", ":2: is nested too deeply"),
    ],
    ids=["binary", "png", "gz-cut", "gz-damaged", "utf16-cut", "not-json", "array", "deep"],
)
def test_a_file_that_is_no_json_lines_is_refused_with_its_name(tmp_path: Path, content: bytes, words: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(path) and words in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(read_lines(str(tmp_path / "none.jsonl")))
    with pytest.raises(InputError, match="is a folder"):
        list(read_lines(str(tmp_path)))


def test_the_line_of_a_bad_byte_is_exact_far_into_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, b"ok\n" * 70 + "naïve\n".encode("latin-1") + b"ok\n")
    with pytest.raises(InputError, match=r"f\.jsonl:71: is not UTF-8"):
        list(read_lines(path))


def test_bad_lines_are_handed_over_and_reading_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path, b'{"a": 1}\nnope\n"caf\xe9"\n[]\n{"a": 2}\n')
    bad: list[tuple[int, str, str]] = []
    rows = [row["a"] for _, row in read_rows(path, on_bad=lambda *line: bad.append(line))]
    assert rows == [1, 2]
    assert [(number, raw) for number, raw, _ in bad] == [(2, "nope"), (3, '"caf\\udce9"'), (4, "[]")]
    write_rows(tmp_path / "bad.jsonl", ({"line": line} for line in bad))  # what is handed over can be written


# -- appending ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "kept"),
    [(b'{"a": 1}\n{"a": 2', b'{"a": 1}\n'), (b'{"a"', b""), (b'{"a": 1}\n', b'{"a": 1}\n'), (b"", b"")],
)
def test_what_a_kill_left_behind_the_last_newline_is_cut_off(tmp_path: Path, left: bytes, kept: bytes) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(left)
    with Appender(path) as file:
        file.append({"b": "中"})
    assert path.read_bytes() == kept + '{"b": "中"}\n'.encode()


def test_a_half_line_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    Appender(path).close()
    assert path.read_bytes() == b'{"a": 1}\n'


def test_a_file_is_held_against_others_and_a_place_without_files_is_named(tmp_path: Path) -> None:
    path, lock = tmp_path / "new" / "f.jsonl", tmp_path / "new" / ".f.lock"
    with alone(path, lock, "taken"), pytest.raises(OutputError, match=r"^taken$"), alone(path, lock, "taken"):
        raise AssertionError("two have it")
    with alone(path, lock, "taken"):
        pass
    if Path("/proc/self").exists():
        with (
            pytest.raises(OutputError, match=r"^/proc/x.jsonl: cannot be written"),
            alone(Path("/proc/x.jsonl"), Path("/proc/.x.lock"), "taken"),
        ):
            raise AssertionError("/proc takes no files")


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_rows_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    code = (
        "import sys, pathlib, itertools\nfrom router_cli.jsonl import Appender\n"
        "with Appender(pathlib.Path(sys.argv[1])) as file:\n"
        "    for n in itertools.count():\n"
        "        file.append({'n': n, 'text': 'x' * 5000}); print(n, flush=True)"
    )
    said = 0
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if (said := int(line)) == 300:
                    process.send_signal(signal.SIGKILL)
        Appender(path).close()
        rows = [row["n"] for _, row in read_rows(str(path))]
        # Every row that was announced is there; at most one more had been finished when the kill came.
        last = rows[len(rows) - rows[::-1].index(0) - 1 :]
        assert last == list(range(len(last))) and len(last) in (said + 1, said + 2)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
def test_a_full_disk_is_an_output_error() -> None:
    full = Path("/dev/full")  # appended to only: were replacing it broken, root would lose the device
    with pytest.raises(OutputError, match="/dev/full: cannot be written: no space left"), Appender(full) as file:
        file.append({"a": 1})


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_what_was_written_before_the_disk_was_full_stays_whole(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, resource, signal\nfrom router_cli.jsonl import Appender, write_rows\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "rows = [{'n': n, 'text': 'x' * 80} for n in range(100)]\n"
        "appended, replaced = map(pathlib.Path, sys.argv[1:])\n"
        "try:\n"
        "    with Appender(appended) as file:\n"
        "        for row in rows: file.append(row)\n"
        "except Exception as error: print(type(error).__name__)\n"
        "try: write_rows(replaced, rows)\n"
        "except Exception as error: print(type(error).__name__)"
    )
    appended, replaced = tmp_path / "a.jsonl", tmp_path / "r.jsonl"
    write_rows(replaced, [{"old": True}])
    ended = python(code, str(appended), str(replaced))
    assert (ended.stdout, ended.stderr) == (b"OutputError\nOutputError\n", b"")
    assert [row for _, row in read_rows(str(replaced))] == [{"old": True}]
    Appender(appended).close()
    assert [row["n"] for _, row in read_rows(str(appended))] == list(range(len(appended.read_bytes().splitlines())))
    assert 0 < appended.stat().st_size <= 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "r.jsonl"]


def test_half_a_surrogate_pair_is_written_and_read_back(tmp_path: Path) -> None:
    row = {"raw": "cut \ud83d"}
    with Appender(tmp_path / "f.jsonl") as file:
        file.append(row)
    assert [row for _, row in read_rows(str(tmp_path / "f.jsonl"))] == [row]


def test_characters_stand_in_a_line_as_they_are() -> None:
    assert dumps({"text": "中\n\u2028"}) == '{"text": "中\\n\u2028"}'


# -- replacing ------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    write_rows(path, [{"a": 1}])

    def rows() -> Any:
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(path, rows())
    assert path.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "f.json"
    write_json(path, {"a": 1})
    with replacing(path) as file:
        file.write('{"a"')
        file.flush()
        assert read_json(path) == {"a": 1}
        file.write(": 2}")
    assert read_json(path) == {"a": 2}


def test_a_link_stays_a_link_when_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text("old")
    link = tmp_path / "link.jsonl"
    link.symlink_to("real.jsonl")
    write_rows(link, [{"a": 1}])
    assert link.is_symlink() and (tmp_path / "real.jsonl").read_text() == '{"a": 1}\n'


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        assert write_rows(pipe, [{"a": 1}]) == 1
        assert reader.communicate(timeout=10)[0] == b'{"a": 1}\n'
    assert pipe.is_fifo()


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "f.jsonl", tmp_path):
        with pytest.raises(OutputError, match="cannot be written"):
            write_rows(path, [{"a": 1}])
        with pytest.raises(OutputError, match="cannot be written"):
            Appender(path)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\xff", b"[" * 100_000])
def test_a_json_file_without_an_object_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"f\.jsonl: (is not JSON|expected a JSON object)"):
        read_json(Path(written(tmp_path, content)))

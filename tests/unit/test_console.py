"""The one sink in each of its modes: terminal, pipe, --json, NO_COLOR, quiet. Terminals are real pseudo-terminals."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from router_cli import console as module
from router_cli.console import Console
from router_cli.schema import Decision, Prediction
from router_cli.summaries.infer import decision_table

SCRIPT = """
from router_cli.console import Console
console = Console({arguments})
with console.bar("label [x]", 3) as bar, console.bar("second", None) as other:
    for i in range(3):
        bar.advance(1, "$0.01 [y]")
        other.advance()
console.notice("a [notice]")
console.warn("a [warning]")
console.error("an [error] of ./a[x].jsonl")
console.result("the [result]", {{"value": "[r]"}})
"""
ESCAPE = "\x1b["


def in_terminal(arguments: str = "", script: str = SCRIPT, **environment: str) -> tuple[str, str]:
    """Run the script with stderr on a pseudo-terminal and stdout on a pipe: (stdout, what the terminal got)."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are Unix's")
    master, slave = pty.openpty()
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-c", script.format(arguments=arguments)],
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
        env={**kept, "TERM": "xterm-256color", "COLUMNS": "120", **environment},
    )
    os.close(slave)
    seen = b""
    while True:
        try:
            block = os.read(master, 65536)
        except OSError:  # Linux says so that the other end is closed
            break
        if not block:
            break
        seen += block
    out, _ = process.communicate()
    os.close(master)
    assert process.returncode == 0, seen.decode()
    return out, seen.decode()


def piped(capsys: pytest.CaptureFixture[str], **arguments: object) -> tuple[str, str]:
    scope: dict[str, object] = {}
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    exec(SCRIPT.format(arguments=given), scope)
    out, err = capsys.readouterr()
    return out, err


def test_a_terminal_gets_bars_and_colours_and_texts_as_they_are() -> None:
    out, err = in_terminal()
    assert ESCAPE in err and "3/3" in err and "━" in err
    for text in ("label [x]", "$0.01 [y]", "a [notice]", "a [warning]", "an [error] of ./a[x].jsonl"):
        assert text in err
    assert out == "the [result]\n"


def test_several_figures_of_a_bar_stand_below_it_in_a_terminal() -> None:
    script = SCRIPT.replace('"$0.01 [y]"', '"loss 1.234, topology 86% right, lr 1.0e-04, 512 tokens/s, 3.2 GB, $0.12"')
    _, err = in_terminal(script=script, COLUMNS="90")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err).replace("\r", "\n").splitlines()
    below = [line for line in lines if "loss 1.234" in line]
    # One row, whole, and not beside the bar.
    assert below and all("512 tokens/s" in line and "$0.12" in line and "━" not in line for line in below)


def test_a_terminal_that_wants_no_colour_gets_none() -> None:
    _, err = in_terminal(NO_COLOR="1")
    assert "\x1b[1;31m" not in err and "\x1b[33m" not in err
    assert "an [error] of ./a[x].jsonl" in err


def test_a_quiet_terminal_gets_the_error_alone() -> None:
    out, err = in_terminal("verbosity=-1")
    assert "an [error]" in err and "notice" not in err and "warning" not in err and "label" not in err
    assert out == "the [result]\n"


def test_a_pipe_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = piped(capsys)
    lines = err.splitlines()
    assert ESCAPE not in err
    assert len(lines) == 5  # a bar that ends at once is one line
    assert lines[1].startswith("label [x]: 3/3, ") and lines[1].endswith(", $0.01 [y]")
    assert lines[0].startswith("second: 3, ")
    assert lines[2:] == ["a [notice]", "warning: a [warning]", "error: an [error] of ./a[x].jsonl"]
    assert out == "the [result]\n"


def test_json_is_one_document_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = piped(capsys, as_json=True)
    assert json.loads(out) == {"value": "[r]"}
    assert "warning: a [warning]" in err


def test_quiet_leaves_the_error_and_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = piped(capsys, verbosity=-1)
    assert err == "error: an [error] of ./a[x].jsonl\n" and out == "the [result]\n"
    out, err = piped(capsys, verbosity=-1, as_json=True)
    assert json.loads(out) == {"value": "[r]"} and err.count("\n") == 1


def test_a_long_step_says_now_and_then_where_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    with Console().bar("train", 10, done=4) as bar:
        bar.advance(2, "loss 1.5")
        bar.advance(4)
    first, second = capsys.readouterr().err.splitlines()  # the end was said already
    assert first.startswith("train: 6/10, ") and " s left, " in first and first.endswith("loss 1.5")
    assert second.startswith("train: 10/10, ") and "left" not in second


def test_a_bar_that_ends_in_an_error_says_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), Console().bar("label", 3):
        raise RuntimeError
    assert capsys.readouterr().err == ""


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.error("x" * 500)
    console.result(Text("y " * 300))
    out, err = capsys.readouterr()
    assert err == "error: " + "x" * 500 + "\n" and out.count("\n") == 1


def test_tables_show_markup_and_emoji_codes_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    table.add_row("[bold]role[/bold] :key:")
    Console().result(table)
    assert "[bold]role[/bold] :key:" in capsys.readouterr().out
    decision = Decision(topology="chain", roles=("[x]", ":key:"), manager_role=None, entry_role="[x]", max_steps=2)
    row = Prediction(task_id="t", decision=decision, backend="local", model="a[b]", milliseconds=1)
    Console().result(decision_table(row))
    shown = capsys.readouterr().out
    assert "[x] -> :key:" in shown and "local: a[b], 1 ms" in shown


@pytest.mark.parametrize(("encoding", "kept"), [("utf-8", True), ("cp1252", False), ("ascii", False)])
def test_json_survives_every_encoding_of_stdout(encoding: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    Console(as_json=True).result("", {"task": "排序 😀"})
    assert json.loads(raw.getvalue()) == {"task": "排序 😀"}
    assert ("排序".encode() in raw.getvalue()) is kept


def test_half_an_emoji_does_not_stop_json(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "utf-8"))
    Console(as_json=True).result("", {"task": "\ud83d"})
    assert raw.getvalue().strip() == b'{\n  "task": "\\ud83d"\n}'

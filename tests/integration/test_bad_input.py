"""Bad input of every kind through every command: one line on stderr that names the culprit, the right code, no more."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router_cli.backends.local import META
from router_cli.cli import main
from router_cli.prompts import PROMPT_VERSION, render
from router_cli.schema import Decision

ROOT = Path(__file__).parents[2]
HEURISTIC = ["--teacher", "heuristic"]
OFFLINE = ["infer", "--backend", "heuristic"]
VARIABLES = ("LLM_API_KEY", "OPENAI_API_KEY", "LLM_API_BASE", "OPENAI_BASE_URL", "OPENAI_API_BASE", "HF_TOKEN")

SINGLE = {"topology": "single", "roles": ["builder"], "manager_role": None, "entry_role": "builder", "max_steps": 1}


def label_row(name: str, text: str, **more: Any) -> dict[str, Any]:
    answer = render(Decision(**{**SINGLE, "roles": ("builder",)}))
    messages = [("system", "You are a meta-router."), ("user", f"Task: {text}"), ("assistant", answer)]
    chat = [{"role": role, "content": content} for role, content in messages]
    return {"messages": chat, "sample_type": "teacher_distilled", "origin_task_id": name, "decision": SINGLE, **more}


def meta(**changed: Any) -> str:
    described = {
        "base_model": {"folder_or_id": "./base"},
        "roles": ["builder", "tester"],
        "topologies": ["single", "chain"],
        "step_bound": 12,
        "prompt_version": PROMPT_VERSION,
    }
    kept = {key: value for key, value in {**described, **changed}.items() if value is not ...}
    return json.dumps(kept)


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder full of good and bad files, in which the commands run."""
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tasks = [{"id": "t1", "task": "Sort a list."}, {"id": "t2", "task": "Reverse a string."}]
    text = "".join(json.dumps(row) + "\n" for row in tasks)
    labels = "".join(json.dumps(label_row(f"t{i}", f"Write part {i}.")) + "\n" for i in range(1, 5))
    first = json.dumps({"task_id": "t1", "decision": SINGLE}) + "\n"
    written: dict[str, str | bytes] = {
        "tasks.jsonl": text,
        "empty.jsonl": "",
        "blank.jsonl": "\n\n \n",
        "binary.jsonl": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00",
        "latin.jsonl": '{"task": "ok"}\n{"task": "naïve"}\n'.encode("latin-1"),
        "cut.jsonl": text + '{"id": "t3", "task": "Wri',
        "number.jsonl": text + '{"id": "t3", "task": 5}\n',
        "list.jsonl": text + "[1, 2]\n",
        "none.jsonl": text + '{"id": "t3", "title": "no text"}\n',
        "odd16.jsonl": text.encode("utf-16") + b"\x00",
        "half16.jsonl": b"\xff\xfe" + '{"task": "'.encode("utf-16-le") + b"\x00\xd8" + '"}\n'.encode("utf-16-le"),
        "cut.jsonl.gz": gzip.compress(text.encode() * 500)[:60],
        "labels.jsonl": labels,
        "invalid.jsonl": labels + json.dumps({"task": "Write part 9.", "decision": {**SINGLE, "max_steps": 0}}) + "\n",
        "undecided.jsonl": labels + json.dumps({"task": "Write part 9."}) + "\n",
        "unlike.jsonl": labels + json.dumps({"messages": "hello"}) + "\n",
        "train-only.jsonl": json.dumps(label_row("t1", "Write part 1.", split="train")) + "\n",
        "predictions.jsonl": first,
        "foreign.jsonl": json.dumps({"task_id": "x", "decision": SINGLE}) + "\n",
        "cut-predictions.jsonl": first + '{"task_id": "t2", "deci',
        "nameless.jsonl": first + json.dumps({"decision": SINGLE}) + "\n",
        "file": "a file, not a folder",
        "notes.txt": "not mine\n",
        "bad.toml": "[train\nlr = 1",
        "section.toml": "[trian]\nlr = 1\n",
        "key.toml": "[train]\nlearning_rat = 1\n",
        "flat.toml": "train = 3\n",
        "type.toml": "[train]\nepochs = 'many'\n",
        "latin.toml": "[label]\nmodel = 'é'\n".encode("latin-1"),
        "fake.gguf": b"GGML....",
    }
    for name, content in written.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    adapters = {
        "no-meta": None,
        "cut-meta": meta()[:40],
        "lacking-meta": meta(roles=...),
        "old-prompt": meta(prompt_version="0-ancient"),
        "list-meta": "[1]",
        "lost-base": meta(base_model={"folder_or_id": "./gone"}),
        "odd-meta": meta(base_model="x", roles="builder"),
        "odd-space": meta(topologies=["ring"]),
        "odd-base": meta(base_model="x"),
    }
    for name, content in adapters.items():
        (tmp_path / "adapters" / name).mkdir(parents=True)
        if content is not None:
            (tmp_path / "adapters" / name / META).write_text(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    return tmp_path


def check(code: int, expected: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One error line that says `said`, as the last of stderr; nothing on stdout."""
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert code == expected, err
    assert "Traceback" not in err and "error: unexpected " not in err, err
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], err
    assert said in lines[-1], err
    assert out == ""


def label(data: str, *more: str) -> list[str]:
    return ["label", *HEURISTIC, "--data", data, *more]


def train(data: str, *more: str) -> list[str]:
    return ["train", "--model", "./base", "--data", data, *more]


def evaluate(predictions: str, labels: str, *more: str) -> list[str]:
    return ["eval", "--predictions", predictions, "--labels", labels, *more]


def adapter(name: str) -> list[str]:
    return ["infer", "--adapter", f"adapters/{name}", "Sort a list."]


NOBODY = ["--base-url", "http://127.0.0.1:9/v1", "--set", "endpoint.retries=0"]

CASES: dict[str, tuple[list[str], int, str]] = {
    # -- task files
    "label, file missing": (label("gone.jsonl"), 1, "gone.jsonl: no such file"),
    "label, no data": (["label", *HEURISTIC], 2, "--data"),
    "label, empty path": (["label", *HEURISTIC, "--data", ""], 2, "--data: expected a path, got nothing"),
    "label, empty path after =": (["label", *HEURISTIC, "--data="], 2, "--data: expected a path, got nothing"),
    "label, folder": (label("folder"), 1, "folder: is a folder"),
    "label, empty": (label("empty.jsonl"), 1, "empty.jsonl: holds no task"),
    "label, blank": (label("blank.jsonl"), 1, "blank.jsonl: holds no task"),
    "label, binary": (label("binary.jsonl"), 1, "binary.jsonl:"),
    "label, latin-1": (label("latin.jsonl"), 1, "latin.jsonl:2: is not UTF-8"),
    "label, last line cut": (label("cut.jsonl"), 1, "cut.jsonl:3: is not JSON"),
    "label, task is a number": (label("number.jsonl"), 1, "number.jsonl:3:"),
    "label, line is a list": (label("list.jsonl"), 1, "list.jsonl:3: expected a JSON object"),
    "label, row without task": (label("none.jsonl"), 1, "none.jsonl:3:"),
    "label, UTF-16 with an odd byte": (label("odd16.jsonl"), 1, "odd16.jsonl:"),
    "label, UTF-16 with half a pair": (label("half16.jsonl"), 1, "half16.jsonl:"),
    "label, gzip cut": (label("cut.jsonl.gz"), 1, "cut.jsonl.gz:"),
    "label, one of two missing": (label("tasks.jsonl,gone.jsonl"), 1, "gone.jsonl: no such file"),
    "label, path below a file": (label("file/tasks.jsonl"), 1, "file/tasks.jsonl: cannot be read"),
    "infer, file missing": ([*OFFLINE, "--data", "gone.jsonl"], 1, "gone.jsonl: no such file"),
    "infer, binary": ([*OFFLINE, "--data", "binary.jsonl"], 1, "binary.jsonl:"),
    "infer, last line cut": ([*OFFLINE, "--data", "cut.jsonl"], 1, "cut.jsonl:3: is not JSON"),
    "infer, none of the split": (
        [*OFFLINE, "--data", "tasks.jsonl", "--split", "test"],
        1,
        "no task of the test split",
    ),
    "infer, nothing to decide": (OFFLINE, 2, "--data"),
    "infer, text and file": ([*OFFLINE, "Sort.", "--data", "tasks.jsonl"], 2, "either one task as text, or --data"),
    "infer, empty text": ([*OFFLINE, "  "], 2, "the task is empty"),
    # -- label files
    "train, no data": (["train"], 2, "--data"),
    "train, file missing": (train("gone.jsonl"), 1, "gone.jsonl: no such file"),
    "train, empty": (train("empty.jsonl"), 1, "empty.jsonl: holds no row"),
    "train, binary": (train("binary.jsonl"), 1, "binary.jsonl:"),
    "train, last line cut": (train("cut.jsonl"), 1, "cut.jsonl:"),
    "train, invalid decision": (train("invalid.jsonl"), 1, "invalid.jsonl:5:"),
    "train, no decision": (train("undecided.jsonl"), 1, "undecided.jsonl:5:"),
    "train, messages of a wrong type": (train("unlike.jsonl"), 1, "unlike.jsonl:5:"),
    "train, unknown sample type": (train("labels.jsonl", "--sample-types", "nope"), 1, "nope"),
    "train, roles that the data has not": (train("labels.jsonl", "--roles", "cook"), 1, "labels.jsonl:1:"),
    "train, UTF-16 with an odd byte": (train("odd16.jsonl"), 1, "odd16.jsonl:"),
    # -- models and adapters
    "train, model folder missing": (
        ["train", "--data", "labels.jsonl", "--model", "./nope"],
        1,
        "./nope: no such model",
    ),
    "train, model folder empty": (["train", "--data", "labels.jsonl", "--model", "folder"], 1, "folder: is no model"),
    "train, model is no name": (["train", "--data", "labels.jsonl", "--model", "a b c"], 1, "'a b c' is no model"),
    "train, no GGUF": (["train", "--data", "labels.jsonl", "--model", "fake.gguf"], 1, "fake.gguf: is no GGUF file"),
    "train, GGUF missing": (
        ["train", "--data", "labels.jsonl", "--model", "no.gguf"],
        1,
        "no.gguf: no such .gguf file",
    ),
    "train, not on this machine": (
        ["train", "--data", "labels.jsonl", "--model", "org/m"],
        1,
        "org/m: not in the cache",
    ),
    "infer, no router": (["infer", "Sort a list."], 2, "--adapter"),
    "infer, adapter missing": (adapter("gone"), 1, "adapters/gone: no such adapter folder"),
    "infer, adapter without meta": (adapter("no-meta"), 1, "adapters/no-meta: holds no trained router"),
    "infer, meta cut": (adapter("cut-meta"), 1, f"adapters/cut-meta/{META}: is not JSON"),
    "infer, meta a list": (adapter("list-meta"), 1, f"adapters/list-meta/{META}: expected a JSON object"),
    "infer, meta lacks roles": (adapter("lacking-meta"), 1, "lacks roles"),
    "infer, meta of wrong types": (adapter("odd-meta"), 1, f"adapters/odd-meta/{META}:"),
    "infer, meta of an impossible space": (adapter("odd-space"), 1, f"adapters/odd-space/{META}: is damaged"),
    "infer, meta with an odd base": (adapter("odd-base"), 1, f"adapters/odd-base/{META}: is damaged"),
    "infer, other prompt version": (adapter("old-prompt"), 1, "prompt version 0-ancient"),
    "infer, base is gone": (adapter("lost-base"), 1, "./gone: no such model folder"),
    "infer, base without weights": (["infer", "--base", "base", "Sort."], 1, "base: cannot be loaded as a model"),
    "infer, remote without server": (["infer", "--backend", "remote", "Sort."], 2, "LLM_API_BASE"),
    "infer, remote without model": (
        ["infer", "--backend", "remote", "--base-url", "http://127.0.0.1:9/v1", "Sort."],
        2,
        "--model",
    ),
    "infer, remote not there": (
        [
            "infer",
            "--backend",
            "remote",
            "--base-url",
            "http://127.0.0.1:9/v1",
            "--model",
            "m",
            "Sort.",
            "--set",
            "endpoint.retries=0",
        ],
        1,
        "http://127.0.0.1:9/v1 cannot be reached",
    ),
    "eval, adapter missing": (["eval", "--adapter", "gone", "--data", "labels.jsonl"], 1, "gone: no such adapter"),
    "eval, adapter and predictions": (
        ["eval", "--adapter", "folder", "--predictions", "predictions.jsonl", "--labels", "labels.jsonl"],
        2,
        "exclude",
    ),
    "eval, adapter without data": (["eval", "--adapter", "folder"], 2, "--adapter needs --data"),
    # -- predictions
    "eval, no predictions": (["eval", "--labels", "labels.jsonl"], 2, "--predictions"),
    "eval, no labels": (["eval", "--predictions", "predictions.jsonl"], 2, "--labels"),
    "eval, predictions missing": (evaluate("gone.jsonl", "labels.jsonl"), 1, "gone.jsonl: no such file"),
    "eval, predictions empty": (evaluate("empty.jsonl", "labels.jsonl"), 1, "empty.jsonl:"),
    "eval, predictions binary": (evaluate("binary.jsonl", "labels.jsonl"), 1, "binary.jsonl:"),
    "eval, predictions cut": (evaluate("cut-predictions.jsonl", "labels.jsonl"), 1, "cut-predictions.jsonl:2:"),
    "eval, prediction without id": (evaluate("nameless.jsonl", "labels.jsonl"), 1, "nameless.jsonl:2:"),
    "eval, other tasks": (evaluate("foreign.jsonl", "labels.jsonl"), 1, "foreign.jsonl: no row answers a judged task"),
    "eval, labels missing": (evaluate("predictions.jsonl", "gone.jsonl"), 1, "gone.jsonl: no such file"),
    "eval, labels empty": (evaluate("predictions.jsonl", "empty.jsonl"), 1, "empty.jsonl: holds no row"),
    "eval, labels without decision": (evaluate("predictions.jsonl", "tasks.jsonl"), 1, "tasks.jsonl: none of the 2"),
    "eval, none of the split": (evaluate("predictions.jsonl", "train-only.jsonl"), 1, "train-only.jsonl: no row of"),
    "eval, compare without a name": (
        evaluate("predictions.jsonl", "labels.jsonl", "--compare", "x.jsonl"),
        2,
        "eval.compare (--compare): expected",
    ),
    "eval, compared file missing": (
        evaluate("predictions.jsonl", "labels.jsonl", "--compare", "x=gone.jsonl"),
        1,
        "gone.jsonl: no such file",
    ),
    # -- teams
    "run, no task": (["run"], 2, "task"),
    "run, empty task": (["run", " "], 2, "the task is empty"),
    "run, no router": (["run", "Sort."], 2, "--adapter"),
    "run, adapter missing": (["run", "Sort.", "--adapter", "gone"], 1, "gone: no such adapter folder"),
    "run, no key": (["run", "Sort.", "--decision", "single"], 1, "LLM_API_KEY/OPENAI_API_KEY is not set"),
    "run, unknown topology": (["run", "Sort.", "--decision", "ring"], 2, "--decision"),
    "run, decision cut": (["run", "Sort.", "--decision", '{"topology": '], 2, "--decision"),
    "run, unknown trigger": (["run", "Sort.", "--cascade", "luck"], 2, "run.cascade (--cascade): must be among"),
    "run, code without leave": (
        ["run", "Sort.", "--decision", "chain", "--cascade", "examples", *NOBODY],
        2,
        "--allow-code-execution",
    ),
    "run, nobody there": (["run", "Sort.", "--decision", "single", *NOBODY], 1, "cannot be reached"),
    "run, output below a file": (
        ["run", "Sort.", "--decision", "single", "--output-dir", "file/x", *NOBODY],
        1,
        "file/x: cannot be written",
    ),
    "execute, no data": (["eval", "--execute"], 2, "--execute needs --data"),
    "execute, without leave": (["eval", "--execute", "--data", "humaneval"], 2, "--allow-code-execution"),
    "execute, tasks without tests": (
        ["eval", "--execute", "--allow-code-execution", "--data", "tasks.jsonl"],
        1,
        "tasks.jsonl:1: has no tests",
    ),
    # -- outcomes
    "outcomes, missing": (["eval", "--outcomes", "gone.jsonl"], 1, "gone.jsonl: no such file"),
    "outcomes, unknown table": (["eval", "--outcomes", "humaneval-mapcodr"], 1, "humaneval-mapcoder"),
    "outcomes, empty": (["eval", "--outcomes", "empty.jsonl"], 1, "empty.jsonl: holds no outcome"),
    "outcomes, binary": (["eval", "--outcomes", "binary.jsonl"], 1, "binary.jsonl:1:"),
    "outcomes, of another kind": (
        ["label", "--from-outcomes", "tasks.jsonl", "--output", "o.jsonl"],
        1,
        "tasks.jsonl:1:",
    ),
    # -- the server
    "serve, no router": (["serve"], 2, "--adapter"),
    "serve, adapter missing": (["serve", "--adapter", "gone"], 1, "gone: no such adapter folder"),
    "serve, no port": (["serve", "--backend", "heuristic", "--port", "99999"], 2, "serve.port (--port): must be <="),
    "serve, no address": (["serve", "--backend", "heuristic", "--host", "300.1.1.1"], 2, "--host 300.1.1.1"),
    "unknown flag of serve": (["serve", "--quue", "1"], 2, "--queue"),
    "unknown flag of run": (["run", "Sort.", "--wroker-model", "m"], 2, "--worker-model"),
    # -- settings
    "unknown command": (["lable"], 2, "'label'"),
    "unknown flag of label": (["label", "--temprature", "1"], 2, "--temperature"),
    "unknown flag of doctor": (["doctor", "--aks"], 2, "--ask"),
    "unknown flag of quickstart": (["quickstart", "--teachr", "x"], 2, "--teacher"),
    "unknown command of config": (["config", "shwo"], 2, "'show'"),
    "config, one word too many": (["config", "show", "train"], 2, "train"),
    "flag without its value": (["train", "--lr"], 2, "--lr"),
    "unknown key": (["config", "show", "--set", "train.learning=1"], 2, "there is no setting 'train.learning'"),
    "key without value": (["config", "show", "--set", "train.lr"], 2, "--set train.lr: expected section.field=value"),
    "number below its bound": (["train", "--lora-r", "0"], 2, "train.lora_r (--lora-r): must be >= 1, got '0'"),
    "no number": (["train", "--epochs", "three"], 2, "train.epochs (--epochs): "),
    "no whole number": (["train", "--batch-size", "1.5"], 2, "train.batch_size (--batch-size): "),
    "not finite": (["train", "--lr", "nan"], 2, "train.lr (--lr): "),
    "infinite": (["train", "--weight-decay", "inf"], 2, "train.weight_decay (--weight-decay): "),
    "temperature out of bounds": (label("tasks.jsonl", "--temperature", "3"), 2, "label.temperature (--temperature)"),
    "unknown teacher": (["label", "--teacher", "oracle"], 2, "label.teacher (--teacher): must be 'openai'"),
    "unknown teacher of quickstart": (["quickstart", "--teacher", "openai"], 2, "quickstart.teacher (--teacher)"),
    "unknown backend": (["infer", "--backend", "gpu", "x"], 2, "infer.backend (--backend): must be 'local'"),
    "unknown topology": (label("tasks.jsonl", "--topologies", "ring"), 2, "decision.topologies"),
    "no roles": (label("tasks.jsonl", "--roles", ","), 2, "decision.roles (--roles)"),
    "roles twice": (label("tasks.jsonl", "--roles", "a,b,a"), 2, "decision.roles (--roles)"),
    "too few resamples": (["eval", "--resamples", "5"], 2, "eval.resamples (--resamples): must be >= 100"),
    "both half types": (train("labels.jsonl", "--bf16", "--fp16"), 2, "--bf16 and --fp16 exclude each other"),
    "settings file missing": (["config", "show", "--config", "gone.toml"], 2, "gone.toml: no such file"),
    "settings file no TOML": (["config", "show", "--config", "bad.toml"], 2, "bad.toml: is not TOML"),
    "settings file, unknown section": (
        ["doctor", "--config", "section.toml"],
        2,
        "no section 'trian'; did you mean 'train'",
    ),
    "settings file, unknown key": (
        ["train", "--config", "key.toml"],
        2,
        "key.toml: there is no setting 'train.learning_rat'",
    ),
    "settings file, value for a section": (["train", "--config", "flat.toml"], 2, "flat.toml: train must be a table"),
    "settings file, wrong type": (["train", "--config", "type.toml"], 2, "train.epochs (type.toml): "),
    "settings file, latin-1": (["label", "--config", "latin.toml"], 2, "latin.toml: is not UTF-8"),
    "settings file a folder": (["label", "--config", "folder"], 2, "folder: cannot be read"),
    # -- keys
    "label, no key": (["label", "--data", "tasks.jsonl"], 1, "LLM_API_KEY/OPENAI_API_KEY is not set"),
    "label, no URL": (["label", "--data", "tasks.jsonl", "--base-url", "api.x"], 2, "endpoint.base_url (--base-url)"),
    # -- outputs
    "label, output is a folder": (label("tasks.jsonl", "--output", "folder"), 1, "folder: is a folder"),
    "label, output below a file": (
        label("tasks.jsonl", "--output", "file/x.jsonl"),
        1,
        "file/x.jsonl: cannot be written",
    ),
    "label, output of another": (
        label("tasks.jsonl", "--output", "notes.txt"),
        1,
        "notes.txt: exists, but its journal",
    ),
    "infer, output is a folder": ([*OFFLINE, "--data", "tasks.jsonl", "--output", "folder"], 1, "folder: is a folder"),
    "infer, output below a file": ([*OFFLINE, "--data", "tasks.jsonl", "--output", "file/x"], 1, "file/x: cannot be"),
    "infer, output of another": ([*OFFLINE, "--data", "tasks.jsonl", "--output", "notes.txt"], 1, "notes.txt: exists"),
    "train, output below a file": (train("labels.jsonl", "--output-dir", "file/x"), 1, "file/x"),
    "train, output is a file": (train("labels.jsonl", "--output-dir", "file"), 1, "file"),
    "eval, output below a file": (
        evaluate("predictions.jsonl", "labels.jsonl", "--output-dir", "file/x"),
        1,
        "file/x",
    ),
    "quickstart, output below a file": (["quickstart", "--model", "./base", "--output-dir", "file/x"], 1, "file/x"),
    "quickstart, model folder missing": (["quickstart", "--model", "./nope"], 1, "./nope: no such model folder"),
}


@pytest.mark.parametrize(("argv", "code", "said"), CASES.values(), ids=CASES.keys())
def test_bad_input_is_one_line(argv: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(main(argv), code, said, capsys)


@pytest.mark.parametrize(
    ("name", "value", "argv", "said"),
    [
        (
            "ROUTER_TRAIN__LRR",
            "1",
            ["train"],
            "ROUTER_TRAIN__LRR: there is no such setting; did you mean 'ROUTER_TRAIN__LR'",
        ),
        ("ROUTER_TRIAN__LR", "1", ["config", "show"], "ROUTER_TRIAN__LR: there is no such setting"),
        ("ROUTER_TRAIN__LR", "fast", ["train"], "train.lr (ROUTER_TRAIN__LR): "),
        ("ROUTER_LABEL__LIMIT", "0", ["label"], "label.limit (ROUTER_LABEL__LIMIT): must be >= 1"),
        ("ROUTER_INFER__BACKEND", "x", ["infer", "hi"], "infer.backend (ROUTER_INFER__BACKEND): "),
        ("ROUTER_TRAIN__USE_4BIT", "perhaps", ["train"], "train.use_4bit (ROUTER_TRAIN__USE_4BIT): "),
        ("OPENAI_BASE_URL", "ftp://x", ["label", "--data", "tasks.jsonl"], "endpoint.base_url (OPENAI_BASE_URL): "),
    ],
)
def test_bad_variables_are_one_line(
    name: str,
    value: str,
    argv: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    check(main(argv), 2, said, capsys)


def test_a_key_with_odd_characters_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLM_API_KEY", "sk-tres secret")
    code = main(["label", "--data", "tasks.jsonl"])
    shown = capsys.readouterr().err
    assert code == 1 and shown.startswith("error: the API key from LLM_API_KEY") and "secret" not in shown


def test_an_output_of_other_settings_is_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OFFLINE, "--data", "tasks.jsonl", "--output", "p.jsonl", "-q"]) == 0
    before = Path("p.jsonl").read_bytes()
    capsys.readouterr()
    code = main([*OFFLINE, "--data", "tasks.jsonl", "--output", "p.jsonl", "--roles", "a,b"])
    check(code, 1, "p.jsonl: exists and was made with other settings (decision)", capsys)
    assert Path("p.jsonl").read_bytes() == before


def test_an_adapter_with_weights_cut_short_is_one_line(
    tiny_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("adapters/cut-weights")
    folder.mkdir()
    (folder / META).write_text(meta(base_model={"folder_or_id": str(tiny_folder())}))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes((500).to_bytes(8, "little") + b'{"a": {"dtype"')
    check(main(adapter("cut-weights")), 1, "adapters/cut-weights: its adapter does not load", capsys)
    (folder / "adapter_model.safetensors").unlink()
    check(main(adapter("cut-weights")), 1, "adapters/cut-weights: its adapter does not load", capsys)


def in_little_space(*argv: str, bytes_left: int = 400) -> subprocess.CompletedProcess[str]:
    """Run the program where no file may grow beyond `bytes_left`, which is a full disk to whoever writes."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from router_cli.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_left}, {bytes_left}))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-B", "-c", script, *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.skipif(sys.platform == "win32", reason="limits are Unix's")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (label("many.jsonl", "--output", "out.jsonl"), "out.jsonl"),
        ([*OFFLINE, "--data", "many.jsonl", "--output", "out.jsonl"], "out.jsonl"),
        (evaluate("predictions.jsonl", "labels.jsonl", "--output-dir", "out", "--resamples", "100"), "out"),
    ],
    ids=["label", "infer", "eval"],
)
def test_a_full_disk_is_one_line_and_the_rest_of_the_work_is_done_afterwards(argv: list[str], said: str) -> None:
    Path("many.jsonl").write_text("".join(json.dumps({"task": f"Write part {i}."}) + "\n" for i in range(20)))
    done = in_little_space(*argv)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr and [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert said in lines[-1] and "cannot be written: file too large" in lines[-1]
    assert main([*argv, "-q"]) == 0
    if Path("out.jsonl").exists():
        assert len(Path("out.jsonl").read_text().splitlines()) == 20


@pytest.mark.skipif(sys.platform != "linux", reason="root may write everywhere but into the kernel's own folders")
@pytest.mark.parametrize(
    "argv",
    [
        label("tasks.jsonl", "--output", "FOLDER/out.jsonl"),
        [*OFFLINE, "--data", "tasks.jsonl", "--output", "FOLDER/out.jsonl"],
        evaluate("predictions.jsonl", "labels.jsonl", "--output-dir", "FOLDER/out", "--resamples", "100"),
        train("labels.jsonl", "--output-dir", "FOLDER/out"),
        ["run", "Sort.", "--decision", "single", "--output-dir", "FOLDER/out", *NOBODY],
        ["quickstart", "--model", "./base", "--output-dir", "FOLDER/out"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_read_only_folder_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("/sys") if os.geteuid() == 0 else Path("folder")
    if folder.name == "folder":
        folder.chmod(0o500)
    check(main([word.replace("FOLDER", str(folder)) for word in argv]), 1, f"{folder}/", capsys)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_device_is_written_to_or_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("full.jsonl").symlink_to("/dev/full")
    full = ["--output", "full.jsonl"]
    check(main([*label("tasks.jsonl"), *full]), 1, "full.jsonl: is a device or pipe", capsys)
    check(main([*OFFLINE, "--data", "tasks.jsonl", *full]), 1, "full.jsonl: is a device", capsys)

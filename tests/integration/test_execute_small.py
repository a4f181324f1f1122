"""The whole executed path on a real small model: SmolLM2 behind `transformers serve`, on ten HumanEval tasks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from router_cli import models
from router_cli.cli import main
from router_cli.sections import SMALL_MODEL
from router_cli.settings import load
from tests.integration.test_model_server import served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the sandbox needs Linux or macOS"),
]


def test_a_small_model_works_in_every_formation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = models.resolve(SMALL_MODEL, load(environ={}))
    out = tmp_path / "out"
    command = ["eval", "--execute", "--allow-code-execution", "--data", "humaneval", "--limit", "10"]
    command += ["--output-dir", str(out), "--worker-model", str(base.folder), "--concurrency", "2", "--timeout", "300"]
    # Two roles and few tokens: what is proven is the path, and the machine may be slow.
    command += ["--roles", "planner,builder", "--set", "run.answer_tokens=16", "--resamples", "100"]
    with served(base.folder, tmp_path / "log.txt") as url:
        assert main([*command, "--base-url", url]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    rows = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()]
    calls = [json.loads(line) for line in (out / "calls.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and {row["topology"] for row in rows} == {"single", "chain", "centralized", "decentralized"}
    assert all(row["completion_tokens"] > 0 and row["reason"] for row in rows)
    assert len(calls) == sum(row["turns"] for row in rows) and len({call["key"] for call in calls}) == len(calls)
    assert "40 executions" in said.err and "oracle" in said.out

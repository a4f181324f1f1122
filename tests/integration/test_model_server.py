"""A real model server, `transformers serve`, asked by the teacher and the verb on the loopback interface.

A server of this kind ignores `response_format` with status 200, thinks aloud, and knows no `null` fields: what the fake
servers of other tests act out, it does by itself.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from router_cli import prompts
from router_cli.cli import main
from router_cli.errors import TeacherError
from router_cli.label import label
from router_cli.models import at_hand
from router_cli.progress import Silent
from router_cli.sections import SMALL_MODEL
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from tests.tiny import tiny_model

pytest.importorskip("fastapi", reason="transformers serve needs the extra transformers[serving]")
pytest.importorskip("uvicorn", reason="transformers serve needs the extra transformers[serving]")

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
SINGLE = {"topology": "single", "roles": ["builder"], "manager_role": None, "entry_role": "builder", "max_steps": 1}
CHAIN = SINGLE | {"topology": "chain", "roles": ["builder", "tester"], "max_steps": 2}
FENCED, PROSE = "Sort a list of integers.", "Document the module."
THOUGHT = "Build the service, then test it."
LEARNT = {
    FENCED: f"Here it is:\n```json\n{json.dumps(SINGLE)}\n```",
    THOUGHT: f"<think>two stages</think>{json.dumps(CHAIN)}",
    PROSE: "A builder should do it.",
}


class Notices(Silent):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)

    warn = notice


def taught_model(folder: Path) -> Path:
    """A tiny model that has learnt `LEARNT` by heart, as answers to the teacher's prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model(folder, layers=2, hidden=64)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = []
    for text, answer in LEARNT.items():
        asked = [message.model_dump() for message in prompts.teacher_messages(text, SPACE)]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        rows.append((prompt, [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    padded = [prompt + answer + [0] * (longest - len(prompt) - len(answer)) for prompt, answer in rows]
    wanted = [[-100] * len(prompt) + answer + [-100] * (longest - len(prompt) - len(answer)) for prompt, answer in rows]
    ids, labels = torch.tensor(padded), torch.tensor(wanted)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        if loss.item() < 0.01:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    return folder


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """`transformers serve` with one model; its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environ) as process:
        try:
            until = time.monotonic() + 180
            while not _healthy(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None and time.monotonic() < until, log.read_text(errors="replace")[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()  # it does not end while it generates


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_model(tmp_path_factory.mktemp("model") / "taught")


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(model, tmp_path_factory.mktemp("server") / "log.txt") as found:
        yield found


def settings(folder: Path, url: str, model: Path | str, *texts: str, **values: Any) -> Settings:
    data = folder / "tasks.jsonl"
    data.write_text("".join(json.dumps({"id": f"t{i}", "task": text}) + "\n" for i, text in enumerate(texts)))
    chosen: dict[str, Any] = {
        "label.data": str(data),
        "label.output": str(folder / "labels.jsonl"),
        "label.model": str(model),
        "label.concurrency": 1,
        "label.reask": 0,
        "endpoint.base_url": url,
        "endpoint.timeout": 300,
        "endpoint.retries": 0,
    }
    chosen |= {key.replace("__", "."): value for key, value in values.items()}
    return load({key: ("test", value) for key, value in chosen.items()}, environ={})


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_answer_ends_as_a_label_or_as_a_rejection_with_its_raw_text(
    url: str, model: Path, tmp_path: Path
) -> None:
    told = Notices()
    result = label(settings(tmp_path, url, model, FENCED, THOUGHT, PROSE), told)
    assert {row["origin_task_id"]: row["decision"] for row in rows(result.output)} == {"t0": SINGLE, "t1": CHAIN}
    [rejected] = rows(result.rejected_path)
    assert rejected["raw"] == LEARNT[PROSE] and rejected["violations"][0].startswith("no_json: ")
    assert result.usage.prompt_tokens > 2000 and result.usage.completion_tokens > 50
    # Neither form of structured output is kept to, and each is said once.
    ignored = [line for line in told.said if "ignores" in line]
    assert [line.split("ignores ")[1].split(":")[0] for line in ignored] == ["json_schema", "json_object"]


@pytest.mark.slow
def test_the_command_and_its_audit_run_against_it(url: str, model: Path, tmp_path: Path) -> None:
    made = settings(tmp_path, url, model, FENCED, THOUGHT)
    argv = ["label", "--model", str(model), "--base-url", url, "--reask", "0", "--timeout", "300", "-q"]
    argv += ["--output", made.label.output]
    assert main([*argv, "--data", made.label.data[0]]) == 0
    assert main([*argv, "--audit"]) == 0
    assert [row["decision"] for row in rows(tmp_path / "labels.jsonl.audit")] == [CHAIN, SINGLE]
    assert not (tmp_path / "labels.jsonl.audit.jsonl").exists()


@pytest.mark.slow
def test_a_model_that_is_not_served_is_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="other/model") as error:
        label(settings(tmp_path, url, "other/model", FENCED))
    assert "\n" not in str(error.value) and not (tmp_path / "labels.jsonl").exists()


@pytest.mark.slow
def test_a_small_chat_model_ends_every_task_one_way_or_the_other(tmp_path: Path) -> None:
    found = at_hand(SMALL_MODEL, load(environ={}))
    if found is None:
        pytest.skip(f"{SMALL_MODEL} is not on this machine: `router train --model {SMALL_MODEL} --download-model`")
    texts = (FENCED, THOUGHT, "Translate these ten README files, each on its own.")
    with served(found.folder, tmp_path / "log.txt") as url:
        # With examples it answers in their form, and ends.
        result = label(settings(tmp_path, url, found.folder, *texts, label__shots=4))
    ended = rows(result.output) + (rows(result.rejected_path) if result.rejected else [])
    assert sorted(row["origin_task_id"] for row in ended) == ["t0", "t1", "t2"]
    for row in ended:
        if "decision" in row:
            assert not SPACE.violations(row["decision"])
        else:
            assert row["violations"] and row["raw"]

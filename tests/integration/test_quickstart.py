"""The whole loop, as a user runs it, on a tiny model saved to disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from router_cli.jsonl import read_rows
from router_cli.schema import Decision
from router_cli.space import DecisionSpace
from tests import browser
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
FILES = ("labels.jsonl", "adapter/router_lora_meta.json", "predictions.jsonl", "report.json", "report.html")


def run(folder: Path, model: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, model, *more), capture_output=True, text=True, env=environment(), check=False)


def command(folder: Path, model: Path, *more: str) -> list[str]:
    words = ["quickstart", "--model", str(model), "--output-dir", str(folder), *more]
    return [sys.executable, "-m", "router_cli", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_model(tmp_path_factory.mktemp("model"), "smollm"))


@pytest.fixture(scope="module")
def first(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, run(folder, model, "--json")


@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.MISSING)
@pytest.mark.parametrize("dark", [False, True])
def test_the_report_opens_without_an_error_and_shows_every_picture(
    first: tuple[Path, subprocess.CompletedProcess[str]], dark: bool
) -> None:
    seen = browser.look(first[0] / "report.html", dark)
    assert (seen.console, seen.brightness < 60) == ([], dark) and seen.overflow <= 0
    assert all(picture.whole and picture.drawn > 0.01 for picture in seen.pictures)
    drawn = {picture.label.split()[0] for picture in seen.pictures}
    assert drawn == {"Confusion", "Reliability", "Risk-coverage", "Cost", "Loss"}
    (worth,) = browser.look(first[0] / "worth/report.html", dark).pictures
    assert worth.label.startswith("Solved share") and worth.whole and worth.drawn > 0.01


def test_the_loop_leaves_everything_it_promises_and_a_second_call_changes_nothing(
    model: Path, first: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    folder, done = first
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert all((folder / name).stat().st_size > 0 for name in FILES)
    systems = {system["name"] for system in document["report"]["systems"]}
    assert {"router", "untrained base", "majority", "length", "tf-idf + lr", "linear probe", "heuristic"} <= systems
    assert len(document["examples"]) == 3
    assert set(document["seconds"]) == {"base model", "label", "train", "infer", "eval", "worth"}
    rows = [row for _, row in read_rows(str(folder / "predictions.jsonl"))]
    assert len(rows) == document["report"]["counts"]["judged"] == 192
    # Trained or not, every decision is valid by construction.
    for name in ("predictions.jsonl", "untrained.jsonl"):
        for _, row in read_rows(str(folder / name)):
            assert SPACE.violations({**row["decision"]}) == ()
            Decision.model_validate_json(json.dumps(row["decision"]))
    (worth,) = document["worth"]["tables"]
    assert (worth["worker"], worth["counts"]["judged"], worth["policies"][0]["name"]) == ("gpt-4-turbo", 32, "router")
    meta = json.loads((folder / "adapter/router_lora_meta.json").read_text())
    tested = {row["task_id"] for row in rows}
    assert not tested & {*meta["split"]["train"], *meta["split"]["validation"]}

    before = (folder / "predictions.jsonl").read_bytes()
    again = run(folder, model)
    assert again.returncode == 0, again.stderr
    assert "already holds this very adapter" in again.stderr
    assert (folder / "predictions.jsonl").read_bytes() == before
    panel = " ".join(again.stdout.replace("│", " ").split())  # its lines are broken at the terminal's width
    assert "…" not in again.stdout  # nothing is cut at 80 columns
    assert "Three decisions" in panel and "Against a coin of its own mix: " in panel


def test_ctrl_c_in_training_continues_to_the_same_number_of_steps(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = subprocess.Popen(
        command(folder, model), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    deadline = time.monotonic() + 120
    while not list((folder / "adapter/checkpoints").glob("checkpoint-*/complete.json")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    assert started.wait(60) == 130
    assert not (folder / "adapter/router_lora_meta.json").exists()
    done = run(folder, model, "--json")
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stderr
    assert json.loads(done.stdout)["training"]["steps"] == 234


def test_the_rules_can_teach_while_the_rubric_judges(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(folder, model, "--teacher", "heuristic", "--json", "-q")
    assert done.returncode == 0 and done.stderr == ""
    labels = {row["provenance"]["teacher"] for _, row in read_rows(str(folder / "labels.jsonl"))}
    judged = {row["provenance"]["teacher"] for _, row in read_rows(str(folder / "rubric.jsonl"))}
    assert (labels, judged) == ({"heuristic"}, {"recorded"})

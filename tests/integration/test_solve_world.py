"""`--objective solve` with the small real model, in a world whose probabilities of solving are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_cli.backends.local import META, LocalBackend
from router_cli.train import train
from tests.training import Recorder, write_rows
from tests.unit.test_solve import TASKS, WORLD, by_value, rows, solve_settings


@pytest.mark.slow
def test_the_worlds_probabilities_are_found_and_decided_by(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "labels.jsonl", rows(20, "train", 1, 2) + rows(8, "validation", 2, 8))
    chosen = {"lora_last_layers": 10, "batch_size": 8, "lr": 2e-3, "lora_alpha": 32, "epochs": 4, "lora_dropout": 0.0}
    said = Recorder()
    train(solve_settings(data, Path("smollm2-135m"), tmp_path / "adapter", models__dtype="auto", **chosen), said)
    found = LocalBackend(by_value(tmp_path / "adapter", dtype="auto")).decide(TASKS)
    for choice, chances in zip(found, WORLD.values(), strict=True):
        assert choice.solving == pytest.approx(chances, abs=0.15)
    assert [choice.decision.topology for choice in found] == ["single", "chain", "single"]
    solving = json.loads((tmp_path / "adapter" / META).read_text())["solving"]
    # At the noise floor: what a perfectly calibrated router would show, and what that varies by.
    assert solving["ece_after"] <= solving["ece_floor"] + 0.05

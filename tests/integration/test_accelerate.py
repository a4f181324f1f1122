"""`accelerate launch` with two processes on CPUs (gloo): the same adapter as one process makes, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from router_cli.cli import main
from tests.training import ROLES, adapter_weights, label_rows, write_rows

pytestmark = pytest.mark.slow

CONFIGS = Path("configs/accelerate").resolve()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def words(data: Path, base: Path, output: Path, **values: Any) -> list[str]:
    options = {"data": data, "model": base, "output-dir": output, "roles": ROLES, "dtype": "float32", "lr": 5e-3}
    # Dropout would draw other numbers in each process.
    options |= {"epochs": 3, "batch-size": 2, "lora-dropout": 0, "save-steps": 2, "logging-steps": 1, **values}
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def launch(command: list[str], output: Path) -> subprocess.Popen[str]:
    """Two processes of the command, as docs/scaling.md starts them; what they say goes to `output`."""
    start = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.accelerate_cli", "launch"]
    start += ["--config_file", str(CONFIGS / "ddp.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    with output.open("w") as file:
        return subprocess.Popen(
            [*start, "-m", "router_cli", *command], stdout=file, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
        )


def logged(folder: Path, key: str) -> list[float]:
    return [entry[key] for entry in json.loads((folder / "loss.json").read_text()) if key in entry]


def alike(one: Path, other: Path) -> None:
    ours, theirs = adapter_weights(one), adapter_weights(other)
    assert ours.keys() == theirs.keys()
    # The same sums in another order: Adam turns the last bits of a tiny gradient into a little more.
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < 1e-4 < weight.abs().max(), name
    for key in ("loss", "topology_loss", "topology_accuracy", "learning_rate", "validation_macro_f1"):
        assert logged(other, key) == pytest.approx(logged(one, key), abs=1e-4), key


def test_two_processes_make_the_adapter_of_one_with_the_same_rows_in_a_step(tiny_folder: Any, tmp_path: Path) -> None:
    # The frozen layers are computed once in each process; all layers are trained in the test below.
    values = {"lora-last-layers": 1, "topology-passes": 1, "topology-weight": 1}
    data, base = write_rows(tmp_path / "data.jsonl", label_rows(16, 5)), tiny_folder("qwen3", 3)
    two = launch(words(data, base, tmp_path / "two", **values, **{"grad-accum": 2}), tmp_path / "said.txt")
    assert main([*words(data, base, tmp_path / "one", **values, **{"grad-accum": 4}), "--quiet"]) == 0
    assert two.wait() == 0, (tmp_path / "said.txt").read_text()
    alike(tmp_path / "one", tmp_path / "two")
    said = (tmp_path / "said.txt").read_text()
    # One of them speaks.
    assert said.count("adapter in ") == 1 and said.count("calibrated on") == 1 and said.count("epoch 3") == 1
    assert not (tmp_path / "two" / "checkpoints").exists()


def test_two_processes_that_are_stopped_go_on_together(tiny_folder: Any, tmp_path: Path) -> None:
    data, base, folder = write_rows(tmp_path / "data.jsonl", label_rows(16, 4)), tiny_folder("qwen3", 3), tmp_path / "a"
    command = words(data, base, folder, **{"grad-accum": 2, "epochs": 20})
    first = launch(command, tmp_path / "first.txt")
    while not list((folder / "checkpoints").glob("checkpoint-*/complete.json")):
        assert first.poll() is None, (tmp_path / "first.txt").read_text()
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    assert first.wait() != 0
    saved = [one.parent for one in (folder / "checkpoints").glob("checkpoint-*/complete.json")]
    newest = max(saved, key=lambda one: int(one.name.rpartition("-")[2]))
    step = int(newest.name.rpartition("-")[2])
    assert step < 40 and {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in newest.iterdir()}
    # Alone it would be another run.
    assert main(command) == 1
    second = launch(command, tmp_path / "second.txt")
    unbroken = words(data, base, tmp_path / "one", **{"grad-accum": 4, "epochs": 20})
    assert main(unbroken) == 0
    assert second.wait() == 0, (tmp_path / "second.txt").read_text()
    assert f"continuing from step {step}" in (tmp_path / "second.txt").read_text()
    alike(tmp_path / "one", folder)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_the_configurations_are_what_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert found.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}[name]
    # How many there are is the machine's own, and said on the command line.
    assert "num_processes" not in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())

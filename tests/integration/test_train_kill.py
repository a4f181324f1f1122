"""kill -9 at any moment of training, then the same command: the same number of steps, the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model
from tests.training import ROLES, adapter_weights, equal, label_rows, write_rows

pytestmark = pytest.mark.slow

KILLS = 10
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

# The programme is loaded before the parent is told, and every training runs in a child of its own: ten kills would
# otherwise be ten times the loading of torch. A child that is killed with -9 is killed for good all the same.
NURSERY = """
import os, sys
import trl, peft, datasets, transformers, torch
from router_cli import cli, train
from router_cli.training import trainer
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.close(0)
        os.dup2(2, 1)
        code = cli.main(line.rstrip("\\n").split("\\t"))
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    sys.stdin.readline()  # until it is asked for, even a child that has ended keeps its number
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts trainings, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._said, self._heard = (folder / "stderr.txt").open("w+"), 0
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=ENVIRONMENT,
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout

    def start(self, command: list[str]) -> int:
        self._heard = os.fstat(self._said.fileno()).st_size
        self._in.write("\t".join(command) + "\n")
        self._in.flush()
        return int(self._out.readline())

    def ended(self) -> int:
        """Wait for the training's end; its exit code, or minus the signal that ended it."""
        self._in.write("\n")
        self._in.flush()
        return int(self._out.readline())

    def said(self) -> str:
        """What the newest training said on standard error and standard output."""
        return Path(self._said.name).read_bytes()[self._heard :].decode()

    def close(self) -> None:
        self._in.close()
        self._process.wait()
        self._out.close()
        self._said.close()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


def command(data: Path, base: Path, output: Path) -> list[str]:
    options = {"data": data, "model": base, "output-dir": output, "roles": ROLES, "dtype": "float32", "lr": 5e-3}
    options |= {"epochs": 4, "batch-size": 1, "grad-accum": 4, "save-steps": 2, "logging-steps": 1}
    options |= {"lora-last-layers": 1}
    return ["train", "--quiet", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def steps_of(folder: Path) -> list[int]:
    log = json.loads((folder / "loss.json").read_text())
    return [entry["step"] for entry in log if "loss" in entry]


def test_ten_kills_end_in_the_weights_of_an_unbroken_run(tmp_path: Path, nursery: Nursery) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    moments = random.Random(seed)
    base = tiny_model(tmp_path / "base", layers=2, hidden=32)
    data = write_rows(tmp_path / "data.jsonl", label_rows(24, 8))
    # The first training of a machine pays for caches: its time says nothing.
    for name in ("unbroken", "second"):
        nursery.start(command(data, base, tmp_path / name))
        started = time.monotonic()
        assert nursery.ended() == 0, nursery.said()
        took = time.monotonic() - started
    whole, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert equal(adapter_weights(whole), adapter_weights(tmp_path / "second"))

    killed = 0
    while killed < KILLS:
        child = nursery.start(command(data, base, broken))
        time.sleep(moments.uniform(0.02, 0.8 * took))
        os.kill(child, signal.SIGKILL)
        killed += nursery.ended() == -9
        if (broken / "router_lora_meta.json").exists():  # it came to its end: once more from the start
            same(broken, whole)
            shutil.rmtree(broken)
    nursery.start(command(data, base, broken))
    assert nursery.ended() == 0, nursery.said()
    same(broken, whole)
    assert not (broken / "checkpoints").exists()


def same(broken: Path, whole: Path) -> None:
    assert equal(adapter_weights(broken), adapter_weights(whole))
    # Each step once, in order, however often the run broke off.
    assert steps_of(broken) == steps_of(whole) == list(range(1, 25))
    one, other = (json.loads((folder / "router_lora_meta.json").read_text())["metrics"] for folder in (broken, whole))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_who_is_asked_to_end_saves_and_the_same_command_goes_on(
    sent: signal.Signals, tmp_path: Path, nursery: Nursery
) -> None:
    base = tiny_model(tmp_path / "base", layers=2, hidden=32)
    data, broken, whole = (
        write_rows(tmp_path / "data.jsonl", label_rows(24, 8)),
        tmp_path / "broken",
        tmp_path / "whole",
    )
    words = [*command(data, base, broken), "--save-steps", "7"]
    child = nursery.start(words)
    # Between two regular checkpoints.
    while not (broken / "checkpoints" / "checkpoint-7" / "complete.json").exists():
        time.sleep(0.001)
    os.kill(child, sent)
    assert nursery.ended() == 130, nursery.said()
    assert "interrupted; the same command again goes on from here" in nursery.said()
    saved = sorted(int(folder.name.split("-")[1]) for folder in (broken / "checkpoints").glob("checkpoint-*"))
    assert 7 <= saved[-1] < 24 and (broken / "checkpoints" / f"checkpoint-{saved[-1]}" / "complete.json").exists()
    nursery.start([word for word in words if word != "--quiet"])
    assert nursery.ended() == 0, nursery.said()
    assert f"continuing from step {saved[-1]}" in nursery.said()
    nursery.start(command(data, base, whole))
    assert nursery.ended() == 0, nursery.said()
    same(broken, whole)


def test_checkpoints_with_missing_files_are_passed_over(tmp_path: Path, nursery: Nursery) -> None:
    base = tiny_model(tmp_path / "base", layers=2, hidden=32)
    data, broken, whole = (
        write_rows(tmp_path / "data.jsonl", label_rows(24, 8)),
        tmp_path / "broken",
        tmp_path / "whole",
    )
    child = nursery.start(command(data, base, broken))
    newest = broken / "checkpoints" / "checkpoint-8"
    while not (newest / "complete.json").exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    nursery.ended()
    # As a kill in the middle of writing leaves it: no mark, files missing or cut.
    for folder in (broken / "checkpoints").glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) >= 8:
            (folder / "complete.json").unlink(missing_ok=True)
            (folder / "optimizer.pt").unlink(missing_ok=True)
            os.truncate(folder / "adapter_model.safetensors", 100)
    nursery.start([word for word in command(data, base, broken) if word != "--quiet"])
    assert nursery.ended() == 0, nursery.said()
    assert "continuing from step 6" in nursery.said()
    nursery.start(command(data, base, whole))
    assert nursery.ended() == 0, nursery.said()
    same(broken, whole)


def test_sigterm_before_the_first_step_and_after_the_last_exits_alike(tmp_path: Path, nursery: Nursery) -> None:
    base = tiny_model(tmp_path / "base", layers=2, hidden=32)
    data, broken = write_rows(tmp_path / "data.jsonl", label_rows(24, 8)), tmp_path / "broken"
    for there in (broken / "checkpoints" / "run.json", broken / "adapter_config.json"):
        child = nursery.start(command(data, base, broken))
        while not there.exists():
            time.sleep(0.001)
        os.kill(child, signal.SIGTERM)
        assert nursery.ended() == 130, nursery.said()
        assert not (broken / "router_lora_meta.json").exists()
    nursery.start(command(data, base, broken))
    assert nursery.ended() == 0, nursery.said()

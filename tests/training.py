"""What tests of training share: label files, settings and a progress that remembers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from router_cli.settings import Settings, load
from router_cli.training.checkpoints import Run

ROLES = "planner,builder,tester,refractor"

# One easy rule a topology, so that a tiny model has something to learn.
_TASKS = {
    "single": ("Write the function f{}.", ["builder"], None, "builder", 1),
    "chain": ("Plan stage {}, then build it, then test it.", ["planner", "builder", "tester"], None, "planner", 3),
    "decentralized": ("Write module {} and, apart from it, its guide.", ["planner", "builder"], None, "builder", 2),
    "centralized": (
        "Lead the migration of service {}; find out what breaks.",
        ["planner", "tester"],
        "planner",
        "planner",
        4,
    ),
}


def label_rows(count: int = 16, held_out: int = 4) -> list[dict[str, Any]]:
    """`count` training rows and `held_out` validation rows, the topologies in turn."""
    rows = []
    for i in range(count + held_out):
        topology = list(_TASKS)[i % 4]
        text, roles, manager, entry, steps = _TASKS[topology]
        decision = {"topology": topology, "roles": roles, "manager_role": manager}
        decision |= {"entry_role": entry, "max_steps": steps}
        split = "train" if i < count else "validation"
        rows.append({"id": f"t{i}", "task": text.format(i), "decision": decision, "split": split})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def begun(folder: Path) -> Run:
    """A run that has just begun, below `folder`."""
    run = Run(folder / "begun", {})
    run.begin()
    return run


def train_settings(data: Path | str, model: Path | str, output: Path, **values: Any) -> Settings:
    """Settings as a command line would give them; `lr=1e-3` is `train.lr`, `decision__roles=...` another section's."""
    chosen: dict[str, Any] = {
        "train.data": str(data),
        "train.model": str(model),
        "train.output_dir": str(output),
        "train.batch_size": 2,
        "train.grad_accum": 2,
        "train.lr": 5e-3,
        "train.logging_steps": 1,
        "models.dtype": "float32",
        "decision.roles": ROLES,
    }
    chosen |= {key.replace("__", ".") if "__" in key else f"train.{key}": value for key, value in values.items()}
    return load({key: (f"--{key.split('.')[1]}", value) for key, value in chosen.items()}, environ={})


class Recorder:
    """A progress that keeps what it is told; `each` is called after every step of the bar `train`."""

    def __init__(self, each: Callable[[int], None] = lambda step: None) -> None:
        self.notices: list[str] = []
        self.warnings: list[str] = []
        self.bars: list[str] = []
        self._each = each

    @contextmanager
    def bar(self, title: str, total: int | None, done: int = 0) -> Iterator[_Bar]:
        self.bars.append(title)
        yield _Bar(done, self._each if title == "train" else lambda step: None)

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class _Bar:
    def __init__(self, done: int, each: Callable[[int], None]) -> None:
        self._done, self._each = done, each

    def advance(self, steps: int = 1, status: str = "") -> None:
        self._done += steps
        self._each(self._done)


def adapter_weights(folder: Path) -> dict[str, Any]:
    """The tensors of an adapter."""
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(str(folder / "adapter_model.safetensors"))
    return found


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

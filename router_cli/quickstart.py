"""`router quickstart`: the whole loop on one machine, through the same code as the verbs.

Tasks and labels, training, decisions of the trained router and of the untrained base, the comparison. Every stage
continues where an earlier call was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router_cli import models
from router_cli.backends import make_backend
from router_cli.evaluate import evaluate
from router_cli.infer import infer, predict
from router_cli.jsonl import read_json
from router_cli.label import label
from router_cli.progress import SILENT, Progress
from router_cli.replay import replay, write_tasks
from router_cli.schema import Prediction, Task
from router_cli.scoring.results import Report
from router_cli.scoring.worth_results import WorthReport
from router_cli.sections import DecisionSettings
from router_cli.settings import Settings
from router_cli.tasks import OWN_TASKS
from router_cli.train import TrainResult, train

EXAMPLES = (
    "Write a function that returns the n-th prime.",
    "Check twelve unrelated shell scripts for unquoted variables; each is its own report.",
    "Move user sessions from cookies to Redis while the web servers, the mobile API and the admin tool stay in step.",
)

WORTH: dict[str, Any] = {"eval__outcomes": "humaneval-mapcoder", "eval__worker": "gpt-4-turbo"}
WORTH_TASKS = 32
"""Of its 164 tasks: as many as are decided in a few seconds, evenly spread. They tell little, and the panel says so."""

TRAINING: dict[str, Any] = {
    "train__epochs": 1,
    "train__batch_size": 4,
    "train__grad_accum": 1,
    "train__lr": 2e-3,
    "train__lora_r": 16,
    "train__lora_alpha": 32,
    "train__lora_dropout": 0.0,
    "train__topology_weight": 1.0,
    "train__topology_passes": 2,
    "train__save_steps": 20,
}
"""What suits 312 short tasks and a small model on two cores; `router train` has other defaults."""


@dataclass
class Quickstart:
    """What the loop made, and how long each stage took (seconds)."""

    folder: Path
    base: models.BaseModel
    seconds: dict[str, float] = field(default_factory=dict)
    trained: TrainResult | None = None
    report: Report | None = None
    worth: WorthReport | None = None
    examples: list[tuple[str, Prediction]] = field(default_factory=list)


def quickstart(settings: Settings, progress: Progress = SILENT) -> Quickstart:
    """Run label, train, infer and eval into `quickstart.output_dir`; a second call continues.

    Raises what the verbs raise.
    """
    folder, wanted = settings.quickstart.output_dir, settings.quickstart
    seconds: dict[str, float] = {}
    with _timed("base model", seconds):
        base = models.resolve(wanted.model, settings, progress)
    run = Quickstart(folder, base, seconds)
    labels, gold = str(folder / "labels.jsonl"), str(folder / "labels.jsonl")
    defaults = DecisionSettings()
    settings = settings.with_values(
        # The tasks' written decisions are for the default roles.
        decision__roles=defaults.roles,
        decision__topologies=defaults.topologies,
        decision__step_bound=defaults.step_bound,
        label__data=[OWN_TASKS],
        label__teacher=wanted.teacher,
        label__output=labels,
        **TRAINING,
        train__data=[labels],
        train__model=wanted.model,
        train__output_dir=folder / "adapter",
        train__lora_last_layers=max(1, _layers(base) // 3),
        infer__data=[OWN_TASKS],
        infer__split="test",
        eval__split="test",
        eval__output_dir=folder,
        eval__probe=wanted.model,
    )
    with _timed("label", seconds):
        label(settings, progress)
        if wanted.teacher != "recorded":
            # Whoever taught, the judge is the written rubric.
            gold = str(folder / "rubric.jsonl")
            label(settings.with_values(label__teacher="recorded", label__output=gold), progress)
    with _timed("train", seconds):
        run.trained = train(settings, progress)
    outputs = {name: str(folder / f"{name}.jsonl") for name in ("predictions", "untrained")}
    with _timed("infer", seconds):
        trained = settings.with_values(infer__adapter=folder / "adapter", infer__output=outputs["predictions"])
        infer(trained, progress=progress)
        backend = make_backend(trained, progress)
        asked = [Task(id=f"example-{i}", text=text) for i, text in enumerate(EXAMPLES, start=1)]
        run.examples = list(zip(EXAMPLES, predict(backend, asked), strict=True))
        untrained = settings.with_values(infer__base=wanted.model, infer__output=outputs["untrained"])
        infer(untrained, progress=progress)
    with _timed("eval", seconds):
        judged = settings.with_values(
            eval__predictions=outputs["predictions"],
            eval__labels=[gold],
            eval__compare=[f"untrained base={outputs['untrained']}"],
        )
        run.report = evaluate(judged, progress, _features(judged, progress), folder / "adapter" / "loss.json")
    with _timed("worth", seconds):
        run.worth = _worth(trained, folder / "worth", progress)
    return run


def _worth(settings: Settings, folder: Path, progress: Progress) -> WorthReport:
    """What the trained router's decisions would have been worth where two formations' runs are recorded."""
    settings = settings.with_values(
        **WORTH,
        eval__output_dir=folder,
        eval__split="all",
        eval__predictions=str(folder / "predictions.jsonl"),
        infer__split="all",
        infer__output=str(folder / "predictions.jsonl"),
    )
    infer(
        settings.with_values(infer__data=[write_tasks(settings, folder / "tasks.jsonl", WORTH_TASKS)]), None, progress
    )
    return replay(settings)  # in silence: of so few tasks it would warn, and the panel says how few there are


def _features(settings: Settings, progress: Progress) -> Any:
    from router_cli.backends.local import features

    return lambda texts: features(texts, str(settings.eval.probe), settings, progress)


def _layers(base: models.BaseModel) -> int:
    return int(read_json(base.folder / "config.json").get("num_hidden_layers", 1))


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - started, 1)

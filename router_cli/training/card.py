"""What a trained adapter's folder tells people: the log, its curves, the model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from router_cli.backends.local import META
from router_cli.jsonl import replacing, writing
from router_cli.training.watch import SCORE

CURVES = "curves.png"


def write_card(folder: Path, meta: dict[str, Any], log: Sequence[dict[str, Any]]) -> None:
    """Write loss.json, curves.png and README.md of the adapter that `meta` describes; `log` is the trainer's."""
    from router_cli.scoring.pictures import curves

    with replacing(folder / "loss.json") as file:
        json.dump(log, file, indent=1)

    def points(key: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[key]) for entry in log if key in entry]

    right = {"training": points("topology_accuracy"), "validation macro-F1": points(SCORE)}
    losses = {"answer": points("loss"), "topology": points("topology_loss")}
    beside = folder / f".{CURVES}"
    picture = curves({"loss": losses, "topology": right}, across="step")
    with writing(folder / CURVES):
        beside.write_bytes(picture)
        beside.replace(folder / CURVES)
    with replacing(folder / "README.md") as file:
        file.write(_card(meta))


def _card(meta: dict[str, Any]) -> str:
    metrics = meta["metrics"]
    score = metrics["validation_macro_f1"]
    held_out = "no validation rows" if score is None else f"topology macro-F1 {score:.3f} on the validation split"
    return f"""---
base_model: {meta["base_model"]["hub_id"] or meta["base_model"]["name"]}
library_name: peft
tags: [router, lora, trl]
---
# A router for agent formations

Decides which formation of LLM agents ({", ".join(meta["topologies"])}) with which of the roles
{", ".join(meta["roles"])} a coding task needs. LoRA adapter of `{meta["base_model"]["name"]}`, trained by
`router train` {meta["router"]} on {metrics["train_examples"]} labelled tasks in {metrics["steps"]} steps; {held_out}.

    router infer --adapter THIS_FOLDER "Sort a list of integers"

![Loss and topology accuracy by step]({CURVES})

`{META}` says everything about how it was made.
"""

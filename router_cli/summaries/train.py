"""What `router train` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from router_cli.summaries.shown import Shown, document, number

if TYPE_CHECKING:
    from router_cli.train import TrainResult


def trained(result: TrainResult) -> Shown:
    """What `train` made."""
    if result.adapter is None:
        return Text(f"{result.base.name} is at {result.base.folder}"), document(result)
    if result.already_done:
        made = [f"adapter in {result.adapter} (made before)", *(f"exported to {path}" for path in result.exported)]
        return Text("\n".join(made)), document(result)
    score = result.validation_macro_f1
    lines = [
        f"adapter in {result.adapter}: {result.train_examples} examples, {result.steps} steps, {result.seconds:.0f} s",
        f"loss {number(result.first_loss)} -> {number(result.last_loss)}; "
        + (
            f"topology macro-F1 {score:.3f} on {result.validation_examples} validation tasks"
            if score is not None
            else "no validation tasks"
        ),
        f'next: router infer --adapter {result.adapter} "Sort a list of integers"',
    ]
    lines[2:2] = [f"exported to {path}" for path in result.exported]
    return Text("\n".join(lines)), document(result)

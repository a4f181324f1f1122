"""What a trained router's probabilities are worth, measured on the validation tasks as `infer` will serve them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router_cli import models, ranks
from router_cli.backends.activated import activated
from router_cli.backends.adapters import adapted
from router_cli.backends.decoding import Decoder
from router_cli.backends.device import out_of_memory
from router_cli.backends.local import load, serving_dtype
from router_cli.backends.packed import packed
from router_cli.errors import ModelError
from router_cli.progress import Progress
from router_cli.schema import Example
from router_cli.scoring.calibration import Calibration, fit
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.training import qlora


def calibrated(
    settings: Settings,
    space: DecisionSpace,
    validation: Sequence[Example],
    base: models.BaseModel,
    model: Any,
    tokenizer: Any,
    progress: Progress,
) -> tuple[Calibration | None, Calibration | None]:
    """The calibration on the validation tasks, measured as `infer` serves: the adapter merged, in the type it takes.

    And that of how likely topologies are to solve them. Merges the trained model, whose adapter is saved. None without
    validation tasks (with runs) or the memory for it.
    """
    import numpy as np

    if not validation or min(len(space.topologies), len(space.roles)) < 2:  # one role alone cannot form a team
        return None, None
    try:
        plain = not (ranks.sharded() or qlora.is_quantised(model.get_base_model()))
        if plain and model.dtype == serving_dtype(settings):
            served = model.eval() if activated(model) else model.merge_and_unload().eval()
        else:  # trained in another type: probabilities differ between types
            served = adapted(load(base, settings)[0], settings.train.output_dir)
        decoder = Decoder(packed(served), tokenizer, space, max_length=settings.train.max_length)
        encoded = [decoder.prompt(example.text) for example in validation]
        with progress.bar("calibrate", len(encoded)) as bar:
            shares = decoder.distributions(encoded)
            chances = decoder.solving(encoded) if settings.train.objective == "solve" else []
            bar.advance(len(encoded))
    except (RuntimeError, MemoryError, ModelError) as error:
        if not out_of_memory(error):
            raise
        progress.warn("no calibration: there is no memory left to load the base as `router infer` does")
        return None, None
    names, dtype = space.topologies, str(served.dtype).removeprefix("torch.")
    gold = np.array([names.index(example.decision.topology) for example in validation])
    found = fit(
        np.array([[one[name] for name in names] for one in shares]),
        gold,
        names,
        dtype,
    )
    progress.notice(
        f"calibrated on {found.n} validation tasks: temperature {found.temperature:.2f}, ECE {found.ece_before:.3f} -> "
        f"{found.ece_after:.3f} (a perfectly calibrated router shows {found.ece_floor:.3f})"
    )
    return found, _solving(validation, chances, dtype, progress)


def _solving(
    validation: Sequence[Example], chances: Sequence[dict[str, float]], dtype: str, progress: Progress
) -> Calibration | None:
    """The calibration of how likely topologies are to solve tasks, on the runs of the validation tasks."""
    import numpy as np

    runs = [
        (chance[name], ended)
        for example, chance in zip(validation, chances, strict=False)
        for name, (solved, count) in example.solved.items()
        if name in chance
        for ended in [1] * solved + [0] * (count - solved)
    ]
    if not runs:
        return None
    chance, ended = np.array(runs).T
    found = fit(np.stack([chance, 1 - chance], 1), 1 - ended.astype(int), ("solved", "unsolved"), dtype)
    progress.notice(
        f"P(solved) calibrated on {found.n} runs of validation tasks: temperature {found.temperature:.2f}, ECE "
        f"{found.ece_before:.3f} -> {found.ece_after:.3f} (a perfectly calibrated router shows {found.ece_floor:.3f})"
    )
    return found

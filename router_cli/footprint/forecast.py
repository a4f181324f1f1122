"""What a training run will take, said before it starts: memory by component, time, and money if an hour has a price.

Everything comes from the model's configuration (`shapes`), a step without content (`dryrun`), the lengths of the real
examples and a probe of the device of a few milliseconds (`demand`). A run that cannot fit is refused with the settings
that help.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from router_cli import ranks
from router_cli.backends.device import best_device
from router_cli.errors import TrainingError
from router_cli.footprint.demand import free_memory, measure, peak, setup_of, speed, work
from router_cli.footprint.shapes import shape_of
from router_cli.schema import Example
from router_cli.settings import Settings
from router_cli.space import DecisionSpace

EFFICIENCY = {"cpu": 0.5, "cuda": 0.4, "mps": 0.4}
"""The share of a plain product's speed that training reaches. Rough: the bar's own time is right after some steps."""
WORTH_SAYING = 0.05e9
"""Bytes below which a saving is not worth a word of advice."""


class NoForecast(Exception):
    """The dry run does not get through a model: nothing can be said of it. Training may work all the same."""


@dataclass(frozen=True)
class Footprint:
    """What a run takes. `memory`: bytes by component at the peak, in the phase of that name; `free` is what is here.

    `seconds` and `flops` are of the whole training, all processes together; `dollars` None without a price.
    """

    model: str
    shape_from: str
    device: str
    phase: str
    memory: dict[str, int]
    free: int | None
    examples: int
    longest: int
    mean: float
    counted_by: str
    steps: int
    flops: float
    seconds: float
    dollars: float | None

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the memory that is free suffices."""
        return self.free is None or self.total <= self.free

    def __str__(self) -> str:
        """One line for people."""
        free = "" if self.free is None else f" of {gb(self.free)} free"
        money = "" if self.dollars is None else f", about ${self.dollars:.2f}"
        return (
            f"estimate: {gb(self.total)}{free} on the {self.device.upper()} ({self.phase}), {self.steps:,} steps, "
            f"very roughly {spell(self.seconds)}{money}"
        )


def gb(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB"


def spell(seconds: float) -> str:
    """A rough time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Forecast:
    """The estimate of one run.

    Raises ModelError where the configuration cannot be had, and NoForecast, here and in `footprint`, for a model
    or tokenizer that cannot be tried out like this.
    """

    def __init__(
        self, settings: Settings, space: DecisionSpace, train: Sequence[Example], validation: Sequence[Example]
    ) -> None:
        self._settings, shape = settings, shape_of(settings.train.model, settings)
        self._config, self._source = shape.config, shape.source
        with self._guarded():
            self.lengths = measure(shape, settings, space, train, validation)

    def footprint(self) -> Footprint:
        """What the run takes on this machine."""
        with self._guarded():
            return self._footprint()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # an architecture may do on the way what tensors without content cannot
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise NoForecast(f"{self._settings.train.model} cannot be tried out without content ({first})") from error

    def _footprint(self) -> Footprint:
        settings, lengths = self._settings, self.lengths
        setup = setup_of(self._config, settings, lengths)
        phase, memory = peak(self._config, settings, lengths)
        steps, flops = work(self._config, settings, lengths)
        # Several processes share the work; each of their devices costs money.
        seconds = flops / (speed(setup, self._config) * EFFICIENCY[setup.device] * ranks.count())
        price = settings.train.price_per_hour
        return Footprint(
            model=settings.train.model,
            shape_from=self._source,
            device=setup.device,
            phase=phase,
            memory={name: round(size) for name, size in memory.items() if size},
            free=free_memory(setup.device),
            examples=lengths.examples,
            longest=lengths.longest,
            mean=round(lengths.mean, 1),
            counted_by=lengths.counted_by,
            steps=steps,
            flops=flops,
            seconds=seconds,
            dollars=None if price is None else price * ranks.count() * seconds / 3600,
        )

    def advice(self) -> str:
        """The settings that save most memory, at most three, with the bytes that each saves alone, in words."""
        saved = [(flags, size) for flags, size in self._savings().items() if size > WORTH_SAYING]
        best = [f"{flags} (saves {gb(size)})" for flags, size in sorted(saved, key=lambda one: -one[1])[:3]]
        return "what helps: " + ", ".join([*best, "a smaller --model"])

    def _savings(self) -> dict[str, float]:
        train, lengths, layers = self._settings.train, self.lengths, self._config.num_hidden_layers
        product, third, half = train.batch_size * train.grad_accum, max(1, layers // 3), lengths.longest // 2
        tries: dict[str, dict[str, Any]] = {}
        if train.batch_size > 1:
            tries[f"--batch-size 1 --grad-accum {product}"] = {"train__batch_size": 1, "train__grad_accum": product}
        if not train.gradient_checkpointing:
            tries["--gradient-checkpointing"] = {"train__gradient_checkpointing": True}
        if not train.use_4bit and best_device() == "cuda":
            tries["--use-4bit"] = {"train__use_4bit": True}
        if (train.lora_last_layers or layers) > third:
            tries[f"--lora-last-layers {third}"] = {"train__lora_last_layers": third}
        if train.lora_r > 4:
            tries["--lora-r 4"] = {"train__lora_r": 4}
        if half >= max(64, lengths.shared + 2 * lengths.answer):  # a row is more than what all have in common
            tries[f"--max-length {half}"] = {"train__max_length": half}
        whole = self._total(self._settings)
        return {flags: whole - self._total(self._settings.with_values(**values)) for flags, values in tries.items()}

    def _total(self, settings: Settings) -> float:
        limit, lengths = settings.train.max_length, self.lengths
        cut = replace(lengths, mean=min(limit, lengths.mean), longest=min(limit, lengths.longest))
        return sum(peak(self._config, settings, cut)[1].values())

    def check(self, found: Footprint) -> None:
        """Raise TrainingError where the run cannot fit and `train.check_memory` minds, with what helps."""
        if not found.fits and self._settings.train.check_memory:
            raise TrainingError(
                f"{found.model} needs about {gb(found.total)} on this {found.device.upper()} ({found.phase}), "
                f"{gb(found.free or 0)} are free; {self.advice()}; --no-check-memory tries all the same"
            )

"""The training loop around TRL's SFTTrainer: what is computed once, less memory, interruptions, the best adapter.

Which trainer it is says `recipe`, what it minimises `loss`, and `watch` looks on: after every epoch the validation
tasks are decided by the decoder that serves, and the best adapter is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from router_cli import prompts, ranks
from router_cli.backends.activated import activated
from router_cli.backends.device import best_device, give_back, out_of_memory
from router_cli.backends.lean import lean
from router_cli.backends.library import quiet
from router_cli.errors import OutputError, TrainingError
from router_cli.jsonl import read_json, reason, write_json
from router_cli.progress import Progress
from router_cli.schema import Example
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.training.checkpoints import Run
from router_cli.training.figures import Figures
from router_cli.training.frozen import FrozenLayers
from router_cli.training.kept import Prompts
from router_cli.training.recipe import make_trainer, topology_choice, until_topology
from router_cli.training.watch import HeldOut, interruptible, make_watch, stale

MICRO_BATCH = "micro_batch.json"
"""The file among a run's checkpoints that says how many examples at a time memory was found to hold."""


class OutOfRoom(Exception):
    """Memory ran out in a training step; `train` turns it into a TrainingError with advice."""


@dataclass
class Fitted:
    """A trained model and how it got there. `log` has a dict for every logged step or evaluation.

    `weights` are gathered from all processes where each holds a part of the model alone. `earlier` seconds had been
    trained before the run broke off.
    """

    model: Any
    steps: int
    log: list[dict[str, Any]]
    best_score: float | None
    best_epoch: float | None
    weights: dict[str, Any] | None = None
    earlier: float = 0.0

    @property
    def losses(self) -> list[float]:
        """The logged training losses, in order."""
        return [entry["loss"] for entry in self.log if "loss" in entry]


def fit(
    model: Any,
    tokenizer: Any,
    space: DecisionSpace,
    rows: Sequence[prompts.Encoded],
    validation: Sequence[Example],
    settings: Settings,
    run: Run,
    progress: Progress,
) -> Fitted:
    """Train a LoRA adapter on `rows`, continuing from the newest complete checkpoint of `run`.

    Out of memory, it goes on from there with smaller micro-batches and as many examples a step.
    Raises OutOfRoom where not even one example at a time fits, TrainingError where the loss is no number, OutputError
    where a checkpoint cannot be written, and KeyboardInterrupt after writing a checkpoint on Ctrl-C.
    """
    earlier = run.seconds()
    while True:
        settings = _within_memory(settings, run)
        try:
            fitted = _attempt(model, tokenizer, space, rows, validation, settings, run, progress)
            return replace(fitted, earlier=earlier)
        except OutOfRoom:
            size, several = settings.train.batch_size, ranks.count() > 1
            if size == 1 or several:  # the other processes have not run out, and wait in the middle of a step
                raise
        # Outside the handler: until here the exception keeps the step's tensors alive.
        give_back()
        smaller = max(part for part in range(1, size) if size % part == 0)
        product = size * settings.train.grad_accum
        write_json(run.checkpoints / MICRO_BATCH, {"batch_size": smaller})
        progress.warn(
            f"out of memory with --batch-size {size}: going on with --batch-size {smaller} --grad-accum "
            f"{product // smaller}, the same {product} examples a step, from the last complete checkpoint"
        )


def _within_memory(settings: Settings, run: Run) -> Settings:
    """The settings with the micro-batch that an earlier lack of memory led to."""
    file, options = run.checkpoints / MICRO_BATCH, settings.train
    product = options.batch_size * options.grad_accum
    size = min(options.batch_size, read_json(file)["batch_size"]) if file.is_file() else options.batch_size
    if size == options.batch_size or product % size:
        return settings
    return settings.with_values(train__batch_size=size, train__grad_accum=product // size)


def _attempt(
    model: Any,
    tokenizer: Any,
    space: DecisionSpace,
    rows: Sequence[prompts.Encoded],
    validation: Sequence[Example],
    settings: Settings,
    run: Run,
    progress: Progress,
) -> Fitted:
    """Train with the micro-batches of `settings`. Raises OutOfRoom, the model as it was, where memory runs out."""
    from transformers import PrinterCallback, TrainerState, set_seed

    options = settings.train
    layers = list(range(model.config.num_hidden_layers))
    if options.lora_last_layers:
        layers = layers[-options.lora_last_layers :]
    if ranks.sharded() and validation:
        progress.notice("no process holds the whole model: nothing is validated between epochs, the last one is kept")
    # How sure a router is of solving is measured once, at the end: the last epoch is kept.
    looked_at = () if ranks.sharded() or options.objective == "solve" else validation
    held_out = HeldOut(tokenizer, space, looked_at, options.max_length)
    # Older versions of TRL draw the adapter's first weights before they set the seed.
    set_seed(options.seed)
    with quiet():
        trainer = make_trainer(model, tokenizer, space, rows, layers, settings, run)
        # It prints every log to stdout, which carries results only.
        trainer.remove_callback(PrinterCallback)
        watch = make_watch(held_out, run, options, progress)
        trainer.add_callback(watch)
        if options.report_to == "tensorboard" and ranks.first():
            trainer.add_callback(_event_files(options.output_dir))
    resume = ranks.shared(run.newest(progress) if ranks.first() else None)
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    watch.figures = Figures(tokens, options.price_per_hour, run.seconds())
    if resume is not None:
        progress.notice(f"continuing from step {resume.name.rpartition('-')[2]}")
        state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
        if stale(state.log_history, options.patience):  # it had stopped early, and broke off after that
            return _fitted(trainer, state, watch)
    if adapter := activated(trainer.model):
        trainer.prompts = Prompts(adapter, trainer.shared, tokenizer.pad_token_id, layers[0])
        if _computed(trainer.prompts, rows, progress):
            watch.frozen = trainer.prompts
    else:
        watch.frozen = _frozen(model, layers[0], rows, tokenizer, trainer.shared, progress)
    if watch.frozen and options.topology_passes:
        choice = topology_choice(space, tokenizer)
        for row in (one for one in rows if not one.verdict):
            watch.frozen.share(row.input_ids, len(until_topology(row, choice)[0]))
    trainer.first_layer = layers[0] if watch.frozen else 0
    short = False
    # Everything that needs the whole model (validation) steps out of the frozen layers' place by itself.
    with interruptible(watch), lean(trainer.model), watch.training():
        try:
            with quiet():
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except OSError as error:
            raise OutputError(f"{run.checkpoints}: cannot be written: {reason(error)}") from None
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            short = True
    if short:
        trainer.model.unload()
        raise OutOfRoom(f"out of memory with --batch-size {options.batch_size}")
    if watch.failure:
        raise TrainingError(watch.failure)
    if watch.interrupted:
        raise KeyboardInterrupt
    return _fitted(trainer, trainer.state, watch)


def _fitted(trainer: Any, state: Any, watch: Any) -> Fitted:
    best = watch.load_best(trainer.model)
    return Fitted(
        trainer.model,
        state.global_step,
        state.log_history,
        best.get("score"),
        best.get("epoch"),
        trainer.accelerator.get_state_dict(trainer.model_wrapped) if ranks.sharded() else None,
    )


def _event_files(folder: Path) -> Any:
    """TensorBoard's event files beside the adapter; the trainer's own place for them goes with the checkpoints."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder / "runs")))


def _frozen(
    model: Any, first: int, rows: Sequence[prompts.Encoded], tokenizer: Any, shared: int, progress: Progress
) -> FrozenLayers | None:
    """The states below the first adapted layer, computed once; None where there is nothing to gain or no room."""
    ids = _distinct(rows)
    if first == 0 or best_device() != "cpu" or ranks.sharded() or not FrozenLayers.fits(model, ids):
        return None
    frozen = FrozenLayers(model, first, tokenizer.pad_token_id, shared)
    with progress.bar(f"compute {first} frozen layers once", len(ids)) as bar:
        frozen.compute(ids, bar.advance)
    return frozen


def _distinct(rows: Sequence[prompts.Encoded]) -> list[list[int]]:
    """The rows' tokens, each row once: several runs of a topology teach the same."""
    return [list(one) for one in dict.fromkeys(tuple(row.input_ids) for row in rows)]


def _computed(found: Prompts, rows: Sequence[prompts.Encoded], progress: Progress) -> bool:
    """Whether the prompts of an activated adapter are computed once: on a CPU, where there is room to keep them."""
    ids = _distinct(rows)
    if best_device() != "cpu" or not found.fits(ids):
        return False
    with progress.bar("compute the prompts once", len(ids)) as bar:
        found.compute(ids, bar.advance)
    return True

"""The training loop: TRL's SFTTrainer, with what its defaults get wrong here done otherwise.

- Rows come tokenised by `prompts`, the prompt masked, never cut: TRL's own preparation is skipped.
- On a CPU the loss is computed at the answer's positions only (TRL scores every position there), and the constant
  start of the prompts is encoded once a micro-batch.
- The topology is measured, and can be weighed, apart: its cross-entropy among the tokens that may stand there, which is
  what serving renormalises over. A falling total loss hides a router that learned nothing but JSON.
- After every epoch the validation tasks are decided by the decoder that serves, and the best adapter is kept.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_cli import prompts, qlora, ranks
from router_cli.backends.activated import Prompts, activated, invocation
from router_cli.backends.device import best_device
from router_cli.backends.local import quiet
from router_cli.backends.tree import DecisionTree
from router_cli.checkpoints import Run
from router_cli.errors import OutputError, TrainingError
from router_cli.figures import Figures
from router_cli.frozen import FrozenLayers, hidden_states
from router_cli.jsonl import read_json, reason, write_json
from router_cli.lean import lean
from router_cli.progress import Progress
from router_cli.schema import Example
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.watch import HeldOut, interruptible, make_watch, stale

IGNORED = -100
"""The label of positions without loss, torch's own."""

MICRO_BATCH = "micro_batch.json"
"""The file among a run's checkpoints that says how many examples at a time memory was found to hold."""


class OutOfRoom(Exception):
    """Memory ran out in a training step; `train` turns it into a TrainingError with advice."""


@dataclass
class Fitted:
    """A trained model and how it got there. `log` has a dict for every logged step or evaluation.

    `weights` are gathered from all processes where each holds a part of the model alone.
    """

    model: Any
    steps: int
    log: list[dict[str, Any]]
    best_score: float | None
    best_epoch: float | None
    weights: dict[str, Any] | None = None

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
    while True:
        settings = _within_memory(settings, run)
        try:
            return _attempt(model, tokenizer, space, rows, validation, settings, run, progress)
        except OutOfRoom:
            size, several = settings.train.batch_size, ranks.count() > 1
            if size == 1 or several:  # the other processes have not run out, and wait in the middle of a step
                raise
        # Outside the handler: until here the exception keeps the step's tensors alive.
        _give_back()
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


def _no_room(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or a CPU."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def _give_back() -> None:
    """Return what nobody holds any more to the device."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


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
    held_out = HeldOut(tokenizer, space, () if ranks.sharded() else validation)
    # Older versions of TRL draw the adapter's first weights before they set the seed.
    set_seed(options.seed)
    with quiet():
        trainer = _make_trainer(model, tokenizer, space, rows, layers, settings, run)
        # It prints every log to stdout, which carries results only.
        trainer.remove_callback(PrinterCallback)
        watch = make_watch(held_out, run, options, progress)
        trainer.add_callback(watch)
        if options.report_to == "tensorboard" and ranks.first():
            trainer.add_callback(_event_files(options.output_dir))
    watch.figures = Figures(sum(map(len, trainer.train_dataset["input_ids"])), options.price_per_hour)
    resume = ranks.shared(run.newest(progress) if ranks.first() else None)
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
        choice = _topology_choice(space, tokenizer)
        for row in rows:
            watch.frozen.share(row.input_ids, len(_until_topology(row, choice)[0]))
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
            if not _no_room(error):
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


def _make_trainer(
    model: Any,
    tokenizer: Any,
    space: DecisionSpace,
    rows: Sequence[prompts.Encoded],
    layers: list[int],
    settings: Settings,
    run: Run,
) -> Any:
    import torch
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from peft import LoraConfig
    from transformers.training_args import OptimizerNames
    from trl import SFTConfig

    options = settings.train
    disable_progress_bar()
    on_cuda = best_device() == "cuda"
    targets: Any = options.target_modules
    if targets == ["all-linear"]:
        # PEFT takes layers_to_transform only with a list of names.
        targets = sorted(
            {name.rpartition(".")[2] for name, part in model.get_decoder().named_modules() if _is_linear(part)}
        )
    elif unknown := [name for name in targets if not any(part.endswith(name) for part, _ in model.named_modules())]:
        raise TrainingError(f"--target-modules: the model has no module named {', '.join(unknown)}")
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        layers_to_transform=layers if options.lora_last_layers else None,
        task_type="CAUSAL_LM",
        alora_invocation_tokens=invocation(space, tokenizer) if options.activated else None,
    )
    choice = None if options.train_on_inputs else _topology_choice(space, tokenizer)
    lessons = [(row.input_ids, 0 if options.train_on_inputs else row.prompt_length) for row in rows]
    lessons += [_until_topology(row, choice) for row in rows for _ in range(options.topology_passes)]
    arguments = SFTConfig(
        output_dir=str(run.checkpoints),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        # A float below 1 is a share of all steps.
        warmup_steps=options.warmup_ratio,
        weight_decay=options.weight_decay,
        lr_scheduler_type=options.lr_scheduler,
        seed=options.seed,
        bf16=on_cuda and qlora.compute_dtype(model) == torch.bfloat16,
        fp16=on_cuda and qlora.compute_dtype(model) == torch.float16,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        save_steps=options.save_steps,
        # The trainer would drop older checkpoints before the new one is marked as complete, and pass over a NaN loss.
        save_total_limit=None,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none" if options.report_to == "tensorboard" else options.report_to,
        project="router",
        run_name=options.output_dir.name,
        dataloader_pin_memory=on_cuda,
        use_cpu=best_device() == "cpu",  # several processes meet over gloo there
        ddp_find_unused_parameters=False,
    )
    if on_cuda and qlora.is_quantised(model):
        # States of 8 bits that move out of the GPU's memory when a long row needs it, as QLoRA has it.
        arguments.optim = OptimizerNames.PAGED_ADAMW_8BIT
    trainer = _router_trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [ids for ids, _ in lessons],
                "labels": [[IGNORED] * start + ids[start:] for ids, start in lessons],
            }
        ),
        processing_class=tokenizer,
        peft_config=config,
        choice=choice,
        topology_weight=options.topology_weight,
        run=run,
        # What is fed in a pass: with an activated adapter, the prompt is not.
        lengths=[len(ids) - start if options.activated else len(ids) for ids, start in lessons],
        class_weights=_class_weights(lessons, choice) if options.class_weights == "balanced" else None,
        own_loss=options.topology_weight + options.topology_passes > 0 or options.class_weights != "none",
        # A recomputed forward would find the cache already filled, a sharded model runs once a step, and with loss on
        # the prompt nothing is shared.
        shared=0
        if options.train_on_inputs or options.gradient_checkpointing or ranks.sharded()
        else _shared([r.input_ids for r in rows]),
    )
    if qlora.is_quantised(model):
        # TRL narrows the adapter of a 4-bit base to bfloat16, where a step of a small rate is lost in rounding.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def _event_files(folder: Path) -> Any:
    """TensorBoard's event files beside the adapter; the trainer's own place for them goes with the checkpoints."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder / "runs")))


def _is_linear(part: Any) -> bool:
    import torch

    # bitsandbytes' quantised layers are subclasses of Linear.
    return isinstance(part, torch.nn.Linear)


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with: the constant start of the prompt."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)


def _until_topology(row: prompts.Encoded, choice: tuple[int, list[int]] | None) -> tuple[list[int], int]:
    """A row that ends with the topology's first token, and where its labels start: at that token."""
    assert choice is not None  # topology passes and loss on the prompt exclude each other
    end = row.prompt_length + choice[0]
    return row.input_ids[: end + 1], end


def _topology_choice(space: DecisionSpace, tokenizer: Any) -> tuple[int, list[int]]:
    """Where in the answer the first choice is made (0 is the answer's first token), and the tokens to choose from."""
    root = DecisionTree(space, tokenizer).root
    return len(root.run), list(root.groups)


def _class_weights(lessons: Sequence[tuple[list[int], int]], choice: tuple[int, list[int]] | None) -> list[float]:
    """A weight for each token of the choice: rows / (tokens that occur * rows with this one), 0 where it has none.

    Their mean over the rows is 1, so that the whole loss keeps its size (scikit-learn's "balanced").
    """
    assert choice is not None  # class weights and loss on the prompt exclude each other
    # A lesson that ends at the topology has its label there, and no other.
    right = Counter(ids[min(start + choice[0], len(ids) - 1)] for ids, start in lessons)
    return [right.total() / (len(right) * right[token]) if right[token] else 0.0 for token in choice[1]]


WINDOW = 8
"""Batches of rows that are sorted by length together: enough to pad little, few enough to mix well."""


class _ByLength:
    """The rows of an epoch in random order, those of a batch of like length.

    Drawn from seed and epoch alone: the trainer's own sampler draws from torch's global generator, so that a run
    continued in the middle of a later epoch would see some rows twice and others never. It also sorts fifty batches at
    a time: a small set would run from its longest task to its shortest in every epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed}:{self._epoch()}")
        rows = list(range(len(self)))
        draw.shuffle(rows)
        size, window = self._batch_size, self._batch_size * WINDOW
        near = [sorted(rows[i : i + window], key=self._lengths.__getitem__) for i in range(0, len(rows), window)]
        rows = [row for part in near for row in part]
        whole, rest = len(rows) // size * size, len(rows) % size
        batches = [rows[i : i + size] for i in range(0, whole, size)]
        draw.shuffle(batches)
        # The batch that is not full comes last, or it would shift the others.
        return iter([row for batch in batches for row in batch] + rows[len(rows) - rest :])


def _router_trainer_class() -> Any:
    """SFTTrainer with the loss at labelled positions, made here because trl is imported only when training."""
    import torch
    from trl import SFTTrainer
    from trl.models.utils import _ForwardRedirection

    class RouterTrainer(SFTTrainer):  # type: ignore[misc]  # trl's class is untyped
        def __init__(
            self,
            *args: Any,
            choice: tuple[int, list[int]] | None,
            topology_weight: float,
            lengths: list[int],
            class_weights: list[float] | None,
            run: Run,
            own_loss: bool,
            shared: int,
            **kwargs: Any,
        ) -> None:
            super().__init__(*args, **kwargs)
            self._choice, self._topology_weight, self._own_loss = choice, topology_weight, own_loss
            self._lengths, self._class_weights, self._run = lengths, class_weights, run
            self.prompts: Prompts | None = None
            self.shared, self.first_layer = shared, 0

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            # Micro-batches are dealt to the processes in turn: a step's rows are those of one process that makes all.
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps * ranks.count()
            return _ByLength(self._lengths, size, self.args.seed, lambda: int(self.state.epoch or 0))

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # TRL's own loss is the fast one on a GPU, but it knows no choices.
            if return_outputs or (self.args.device.type != "cpu" and not self._own_loss):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            with self.accelerator.autocast():
                if ranks.count() == 1:
                    return self._loss(model, inputs, num_items_in_batch)
                # Several processes exchange weights and gradients around the wrapper's forward: nothing runs past it.
                inner = self.accelerator.unwrap_model(model)
                return _ForwardRedirection()(model, inner, self._loss, inner, inputs, num_items_in_batch)

        def _loss(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
            ids, mask, labels = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            if self.prompts:
                states, labels = self.prompts.states(ids, mask, labels, IGNORED)
            else:
                states = hidden_states(base.get_decoder(), ids, mask, self.shared, self.first_layer)
                labels = labels[:, self.shared :]
            states, labels = states[:, :-1], labels[:, 1:]
            scored = labels != IGNORED
            logits = base.get_output_embeddings()(states[scored]).float()
            targets = labels[scored]
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            self._total_train_tokens += int(inputs["attention_mask"].sum())
            # The count is that of all processes, whose gradients are averaged.
            total = scored.sum() if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
            if self._choice is None or not self._choice[1]:
                return each.sum() / total
            offset, choices = self._choice
            counts = scored.sum(1)
            whole = counts > 1
            places = counts.cumsum(0) - counts + torch.where(whole, offset, 0)
            among = torch.tensor(choices, device=logits.device)
            right = (targets[places][:, None] == among).int().argmax(1)
            topology = torch.nn.functional.cross_entropy(logits[places][:, among], right, reduction="none")
            found = logits[places][:, among].argmax(1) == right
            self._metrics["train"]["topology_loss"].append(topology.mean().item())
            self._metrics["train"]["topology_accuracy"].append(found.float().mean().item())
            if self._class_weights is not None:
                share = torch.tensor(self._class_weights, device=logits.device)[right]
                topology, each = topology * share, each * torch.ones_like(each).index_put((places,), share)
            # Rows that end at the topology teach the choice alone; in whole rows it weighs beside the other tokens.
            tokens = each[whole.repeat_interleave(counts)].sum() / total
            weights = torch.where(whole, self._topology_weight, 1.0)
            return tokens + (weights * topology).mean() / self.current_gradient_accumulation_steps

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            with self._run.saving(self.state.global_step):
                super()._save_checkpoint(model, trial)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            for name in ("topology_loss", "topology_accuracy"):
                if found := self._metrics["train"].get(name):
                    found[:] = ranks.gathered(sum(found) / len(found))
            super().log(logs, start_time)

    return RouterTrainer


def _frozen(
    model: Any, first: int, rows: Sequence[prompts.Encoded], tokenizer: Any, shared: int, progress: Progress
) -> FrozenLayers | None:
    """The states below the first adapted layer, computed once; None where there is nothing to gain or no room."""
    ids = [row.input_ids for row in rows]
    if first == 0 or best_device() != "cpu" or ranks.sharded() or not FrozenLayers.fits(model, ids):
        return None
    frozen = FrozenLayers(model, first, tokenizer.pad_token_id, shared)
    with progress.bar(f"compute {first} frozen layers once", len(ids)) as bar:
        frozen.compute(ids, bar.advance)
    return frozen


def _computed(found: Prompts, rows: Sequence[prompts.Encoded], progress: Progress) -> bool:
    """Whether the prompts of an activated adapter are computed once: on a CPU, where there is room to keep them."""
    ids = [row.input_ids for row in rows]
    if best_device() != "cpu" or not found.fits(ids):
        return False
    with progress.bar("compute the prompts once", len(ids)) as bar:
        found.compute(ids, bar.advance)
    return True

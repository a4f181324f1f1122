"""The training loop: TRL's SFTTrainer, with what its defaults get wrong here done otherwise.

- Rows come tokenised by `prompts`, the prompt masked, never cut: TRL's own preparation is skipped.
- On a CPU the loss is computed at the answer's positions only (TRL scores every position there), and the constant
  start of the prompts is encoded once a micro-batch.
- The topology is measured, and can be weighed, apart: its cross-entropy among the tokens that may stand there, which is
  what serving renormalises over. A falling total loss hides a router that learned nothing but JSON.
- After every epoch the validation tasks are decided by the decoder that serves, and the best adapter is kept.
"""

from __future__ import annotations

import math
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from router_cli import prompts
from router_cli.backends.decoding import Decoder
from router_cli.backends.device import best_device
from router_cli.backends.local import quiet
from router_cli.backends.tree import DecisionTree
from router_cli.checkpoints import Run
from router_cli.errors import OutputError, TrainingError
from router_cli.frozen import FrozenLayers, hidden_states
from router_cli.jsonl import read_json, reason, write_json
from router_cli.progress import Bar, Progress
from router_cli.schema import Example
from router_cli.scoring import metrics
from router_cli.scoring.results import LossPoint
from router_cli.settings import Settings
from router_cli.space import DecisionSpace

IGNORED = -100
"""The label of positions without loss, torch's own."""

SCORE = "validation_macro_f1"
"""The log's name for what an epoch's validation gave."""


@dataclass
class Fitted:
    """A trained model and how it got there. `log` has a dict for every logged step or evaluation."""

    model: Any
    steps: int
    log: list[dict[str, Any]]
    best_score: float | None
    best_epoch: float | None

    @property
    def losses(self) -> list[float]:
        """The logged training losses, in order."""
        return [entry["loss"] for entry in self.log if "loss" in entry]

    @property
    def curve(self) -> list[LossPoint]:
        """The log as points of the loss curve."""
        return [LossPoint(step=entry["step"], loss=entry["loss"]) for entry in self.log if "loss" in entry]


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

    Raises TrainingError where the loss is no number, OutputError where a checkpoint cannot be written, and
    KeyboardInterrupt after writing a checkpoint on Ctrl-C.
    """
    from transformers import PrinterCallback

    options = settings.train
    layers = list(range(model.config.num_hidden_layers))
    if options.lora_last_layers:
        layers = layers[-options.lora_last_layers :]
    held_out = _HeldOut(tokenizer, space, validation)
    with quiet():
        trainer = _make_trainer(model, tokenizer, space, rows, layers, settings, run)
        # It prints every log to stdout, which carries results only.
        trainer.remove_callback(PrinterCallback)
        watch = _watch(held_out, run, options.save_total_limit, progress)
        trainer.add_callback(watch)
    resume = run.newest()
    if resume is not None:
        progress.notice(f"continuing from step {resume.name.rpartition('-')[2]}")
    watch.frozen = _frozen(model, layers[0], rows, tokenizer, trainer.shared, progress)
    trainer.first_layer = layers[0] if watch.frozen else 0
    # Everything that needs the whole model (validation) steps out of the frozen layers' place by itself.
    with _interruptible(watch), watch.training():
        try:
            with quiet():
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except OSError as error:
            raise OutputError(f"{run.checkpoints}: cannot be written: {reason(error)}") from None
    if watch.failure:
        raise TrainingError(watch.failure)
    if watch.interrupted:
        raise KeyboardInterrupt
    best = watch.load_best(trainer.model)
    return Fitted(
        trainer.model, trainer.state.global_step, trainer.state.log_history, best.get("score"), best.get("epoch")
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
    )
    labels = [
        row.input_ids if options.train_on_inputs else [IGNORED] * row.prompt_length + row.input_ids[row.prompt_length :]
        for row in rows
    ]
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
        bf16=on_cuda and model.dtype == torch.bfloat16,
        fp16=on_cuda and model.dtype == torch.float16,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        save_steps=options.save_steps,
        # The trainer would drop older checkpoints before the new one is marked as complete, and pass over a NaN loss.
        save_total_limit=None,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=on_cuda,
    )
    return _router_trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": labels}),
        processing_class=tokenizer,
        peft_config=config,
        choice=None if options.train_on_inputs else _topology_choice(space, tokenizer),
        topology_weight=options.topology_weight,
        # A recomputed forward would find the cache already filled; and with loss on the prompt nothing is shared.
        shared=0 if options.train_on_inputs or options.gradient_checkpointing else _shared([r.input_ids for r in rows]),
    )


def _is_linear(part: Any) -> bool:
    import torch

    # bitsandbytes' quantised layers are subclasses of Linear.
    return isinstance(part, torch.nn.Linear)


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with: the constant start of the prompt."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)


def _topology_choice(space: DecisionSpace, tokenizer: Any) -> tuple[int, list[int]]:
    """Where in the answer the first choice is made (0 is the answer's first token), and the tokens to choose from."""
    root = DecisionTree(space, tokenizer).root
    return len(root.run), list(root.groups)


WINDOW = 8
"""Batches of rows that are sorted by length together: enough to pad little, few enough to mix well."""


class _ByLength:
    """The rows of an epoch in random order, those of a batch of like length.

    Drawn from seed and epoch alone: the trainer's own sampler draws from torch's global generator, so that a run
    continued in the middle of a later epoch would see some rows twice and others never. It also sorts fifty batches at
    a time: a small set would run from its longest task to its shortest in every epoch, which learns worse.
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

    class RouterTrainer(SFTTrainer):  # type: ignore[misc]  # trl's class is untyped
        def __init__(
            self, *args: Any, choice: tuple[int, list[int]] | None, topology_weight: float, shared: int, **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)
            self._choice, self._topology_weight = choice, topology_weight
            self.shared, self.first_layer = shared, 0

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows = self.train_dataset["input_ids"]
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return _ByLength([len(row) for row in rows], size, self.args.seed, lambda: int(self.state.epoch or 0))

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # TRL's own loss is the fast one on a GPU, but it knows no choices.
            if return_outputs or (self.args.device.type != "cpu" and self._topology_weight == 0):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"][:, self.shared + 1 :]
            scored = labels != IGNORED
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            states = hidden_states(
                base.get_decoder(), inputs["input_ids"], inputs["attention_mask"], self.shared, self.first_layer
            )[:, :-1]
            logits = base.get_output_embeddings()(states[scored]).float()
            targets = labels[scored]
            each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            self._total_train_tokens += int(inputs["attention_mask"].sum())
            total = scored.sum() if num_items_in_batch is None else num_items_in_batch
            if self._choice is None or not self._choice[1]:
                return each.sum() / total
            offset, choices = self._choice
            counts = scored.sum(1)
            places = counts.cumsum(0) - counts + offset
            among = torch.tensor(choices, device=logits.device)
            right = (targets[places][:, None] == among).int().argmax(1)
            topology = torch.nn.functional.cross_entropy(logits[places][:, among], right, reduction="none")
            found = logits[places][:, among].argmax(1) == right
            self._metrics["train"]["topology_loss"].append(topology.mean().item())
            self._metrics["train"]["topology_accuracy"].append(found.float().mean().item())
            # The mean over examples; a step's examples are its tokens over the tokens of one.
            return (each.sum() + self._topology_weight * topology.sum() * counts.float().mean()) / total

    return RouterTrainer


class _HeldOut:
    """The validation tasks, decided by the decoder that serves."""

    def __init__(self, tokenizer: Any, space: DecisionSpace, examples: Sequence[Example]) -> None:
        self._tokenizer, self._space, self._examples = tokenizer, space, examples

    @cached_property
    def _prompts(self) -> list[list[int]]:
        return [prompts.encode_prompt(example.text, self._space, self._tokenizer) for example in self._examples]

    def score(self, model: Any) -> float | None:
        """Macro-F1 of the topology over the validation tasks; None where there are none."""
        import numpy as np

        if not self._examples:
            return None
        found = Decoder(model, self._tokenizer, self._space).decide(self._prompts)
        names = self._space.topologies
        gold = np.array([names.index(example.decision.topology) for example in self._examples])
        predicted = np.array([names.index(one.decision.topology) for one in found])
        return float(metrics.macro_f1(gold, predicted, len(names)))


def _frozen(
    model: Any, first: int, rows: Sequence[prompts.Encoded], tokenizer: Any, shared: int, progress: Progress
) -> FrozenLayers | None:
    """The states below the first adapted layer, computed once; None where there is nothing to gain or no room."""
    ids = [row.input_ids for row in rows]
    if first == 0 or best_device() != "cpu" or not FrozenLayers.fits(model, ids):
        return None
    frozen = FrozenLayers(model, first, tokenizer.pad_token_id, shared)
    with progress.bar(f"compute {first} frozen layers once", len(ids)) as bar:
        frozen.compute(ids, bar.advance)
    return frozen


@contextmanager
def _interruptible(watch: Any) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into `watch.interrupted`, so that the running step ends and is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if watch.interrupted:
            raise KeyboardInterrupt
        watch.interrupted = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(held_out: _HeldOut, run: Run, keep: int, progress: Progress) -> Any:
    """The callback that reports, marks checkpoints, keeps the best adapter and stops on bad news."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def __init__(self) -> None:
            self.frozen: FrozenLayers | None = None
            self.interrupted, self.failure = False, ""
            self._place: Any = nullcontext()
            self._bar: Bar | None = None
            self._open_bar: Any = None
            self._loss = math.nan

        @contextmanager
        def training(self) -> Iterator[None]:
            """Open while the trainer runs: the frozen layers stand aside."""
            self._enter()
            try:
                yield
            finally:
                self._place.__exit__(None, None, None)
                if self._open_bar is not None:
                    self._open_bar.__exit__(None, None, None)

        def _enter(self) -> None:
            self._place = self.frozen.in_place() if self.frozen else nullcontext()
            self._place.__enter__()

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._open_bar = progress.bar("train", state.max_steps, state.global_step)
            self._bar = self._open_bar.__enter__()
            # A kill between an epoch's last checkpoint and its validation: the epoch is validated now.
            whole = state.global_step == state.max_steps or float(state.epoch or 0).is_integer()
            scored = any(entry["step"] == state.global_step for entry in state.log_history if SCORE in entry)
            if state.global_step and whole and not scored:
                self.on_epoch_end(args, state, control, **kwargs)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._bar:
                self._bar.advance(status=f"loss {self._loss:.3f}" if math.isfinite(self._loss) else "")
            if self.interrupted and not self.failure:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            # The mean over all steps comes at the end, and shows what no step's log did.
            if logs and (found := logs.get("loss", logs.get("train_loss"))) is not None:
                self._loss = float(found)
                if not math.isfinite(self._loss):
                    self.failure = (
                        f"the loss is {self._loss} at step {state.global_step}: lower --lr, or drop --fp16 for --bf16; "
                        "the checkpoints before it are kept"
                    )
                    control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.mark(state.global_step, keep)

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            # The first half of several epochs never holds the best one, and on a CPU a look costs a tenth of an epoch.
            if self.interrupted or self.failure or state.epoch < args.num_train_epochs / 2:
                return
            self._place.__exit__(None, None, None)
            model.eval()
            try:
                score = held_out.score(model)
            finally:
                model.train()
                self._enter()
            if score is None:
                return
            state.log_history.append({"step": state.global_step, "epoch": state.epoch, SCORE: score})
            progress.notice(f"epoch {state.epoch:.0f}: topology macro-F1 {score:.3f} on the validation tasks")
            if score > self._best().get("score", -1.0):
                self._keep(model, {"score": score, "epoch": state.epoch, "step": state.global_step})

        def _best(self) -> dict[str, Any]:
            file = run.checkpoints / "best" / "best.json"
            return read_json(file) if file.is_file() else {}

        def _keep(self, model: Any, facts: dict[str, Any]) -> None:
            beside = run.checkpoints / "best.part"
            shutil.rmtree(beside, ignore_errors=True)
            model.save_pretrained(beside)
            write_json(beside / "best.json", facts)
            shutil.rmtree(run.checkpoints / "best", ignore_errors=True)
            beside.rename(run.checkpoints / "best")

        def load_best(self, model: Any) -> dict[str, Any]:
            """Put the best adapter's weights into the model, and say how good it was; without one leave the last."""
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            best = self._best()
            if best:
                weights = load_file(str(run.checkpoints / "best" / "adapter_model.safetensors"))
                set_peft_model_state_dict(model, weights)
            return best

    return Watch()

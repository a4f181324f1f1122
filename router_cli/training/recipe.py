"""Settings and lessons to a trainer that is ready to go: the LoRA and SFT configurations that QLoRA here takes.

Rows come tokenised by `prompts`, the prompt masked, never cut: TRL's own preparation is skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from router_cli import prompts, ranks
from router_cli.backends.activated import invocation
from router_cli.backends.device import best_device
from router_cli.backends.tree import DecisionTree
from router_cli.errors import TrainingError
from router_cli.sections import TrainSettings
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.training import qlora
from router_cli.training.checkpoints import Run
from router_cli.training.loss import IGNORED, trainer_class

COARSE = 16
"""Tokens that rows may differ by and still count as of like length, where lessons come in many alike."""


def make_trainer(
    model: Any,
    tokenizer: Any,
    space: DecisionSpace,
    rows: Sequence[prompts.Encoded],
    layers: list[int],
    settings: Settings,
    run: Run,
) -> Any:
    """The trainer of `settings` for these lessons, its adapter on `layers` of the base; checkpoints belong to `run`.

    Raises TrainingError for modules that the model does not have.
    """
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
    elif unknown := [name for name in targets if not _has(model, name)]:
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
    choice = None if options.train_on_inputs else topology_choice(space, tokenizer)
    decisions = [row for row in rows if not row.verdict]
    lessons = [(row.input_ids, 0 if options.train_on_inputs else row.prompt_length) for row in decisions]
    lessons += [until_topology(row, choice) for row in decisions for _ in range(options.topology_passes)]
    class_weights = _class_weights(lessons, choice) if options.class_weights == "balanced" else None
    lessons += [(row.input_ids, row.prompt_length) for row in rows if row.verdict]
    verdict = prompts.encode_verdict(space.topologies[0], tokenizer) if options.objective == "solve" else None
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
    trainer = trainer_class()(
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
        # Of one task come many verdicts of nearly one length: coarse lengths keep them from filling whole batches.
        lengths=[
            (len(ids) - start if options.activated else len(ids)) // (COARSE if verdict else 1)
            for ids, start in lessons
        ],
        class_weights=class_weights,
        verdict=[verdict.solved, verdict.unsolved] if verdict else [],
        own_loss=own_loss(options),
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


def _has(model: Any, name: str) -> bool:
    """Whether PEFT finds modules by this name: whole parts of theirs, from the end."""
    return any(f".{part}".endswith(f".{name}") for part, _ in model.named_modules())


def weighed(options: TrainSettings) -> bool:
    """Whether the topology's choice counts apart from the other tokens."""
    return options.topology_weight + options.topology_passes > 0 or options.class_weights != "none"


def own_loss(options: TrainSettings) -> bool:
    """Whether the loss is one that TRL's own, the fast one on a GPU, does not know."""
    return weighed(options) or options.objective == "solve"


def _is_linear(part: Any) -> bool:
    import torch

    # bitsandbytes' quantised layers are subclasses of Linear.
    return isinstance(part, torch.nn.Linear)


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with: the constant start of the prompt."""
    first, last = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)


def until_topology(row: prompts.Encoded, choice: tuple[int, list[int]] | None) -> tuple[list[int], int]:
    """A row that ends with the topology's first token, and where its labels start: at that token."""
    assert choice is not None  # topology passes and loss on the prompt exclude each other
    end = row.prompt_length + choice[0]
    return row.input_ids[: end + 1], end


def topology_choice(space: DecisionSpace, tokenizer: Any) -> tuple[int, list[int]]:
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

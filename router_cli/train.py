"""`router train`: labels in, a LoRA adapter out, through TRL's SFTTrainer.

The folder it writes:

    adapter_config.json, adapter_model.safetensors    the adapter, as PeftModel.from_pretrained reads it
    tokenizer.json, tokenizer_config.json, ...        the tokenizer
    router_lora_meta.json                             written last: a folder that has it is a finished router
    loss.json, curves.png, README.md                  the log, its picture, the model card
    merged/, gguf/                                    with --export: the router as a model of its own
    runs/                                             with --report-to tensorboard: its event files
    checkpoints/                                      what a continued run needs
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from router_cli import __version__, dataset, models, prompts, ranks
from router_cli.backends import space_from
from router_cli.backends.device import best_device, fast_dtype, out_of_memory
from router_cli.backends.library import quiet
from router_cli.backends.local import META, load, serving_dtype
from router_cli.errors import ModelError, OutputError, RouterError, TrainingError, UsageError
from router_cli.footprint.forecast import Footprint, Forecast, NoForecast
from router_cli.jsonl import alone, read_json, write_json
from router_cli.models import file_sha256
from router_cli.progress import SILENT, Progress
from router_cli.settings import Settings
from router_cli.space import DecisionSpace
from router_cli.tasks import locate
from router_cli.training import export, lessons, qlora
from router_cli.training.calibrate import calibrated
from router_cli.training.card import write_card
from router_cli.training.checkpoints import Run, saving
from router_cli.training.recipe import weighed
from router_cli.training.watch import terminable

LOCK = ".train.lock"
"""The file in the output folder that is locked while a run writes there."""

FOR_LESS = "what helps: --gradient-checkpointing, a smaller --max-length, a smaller --model"
"""Advice for a model that cannot be foreseen."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run made. `steps` is the number of optimizer steps; `adapter` None after a mere download."""

    adapter: Path | None
    base: models.BaseModel
    steps: int = 0
    seconds: float = 0.0
    train_examples: int = 0
    validation_examples: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    validation_macro_f1: float | None = None
    already_done: bool = False
    exported: tuple[Path, ...] = ()


@terminable()
def train(settings: Settings, progress: Progress = SILENT) -> TrainResult:
    """Fine-tune the router that `settings.train` describes; continue an unfinished run of the same settings.

    Raises TrainingError for data or settings that cannot work, ModelError for the base model, InputError for label
    files. Ctrl-C and SIGTERM write a checkpoint and raise KeyboardInterrupt.
    """
    options = settings.train
    if options.bf16 and options.fp16:
        raise UsageError("--bf16 and --fp16 exclude each other")
    if options.train_on_inputs and weighed(options):
        raise UsageError(
            "--train-on-inputs learns all tokens alike: it excludes --topology-passes, --topology-weight and "
            "--class-weights"
        )
    if options.objective == "solve" and (options.train_on_inputs or options.patience or options.eval_steps):
        raise UsageError("--objective solve excludes --train-on-inputs, --patience and --eval-steps")
    if options.objective == "solve" and min(len(settings.decision.topologies), len(settings.decision.roles)) < 2:
        raise UsageError("--objective solve needs two topologies and two roles, or there is nothing to choose")
    if options.activated and (options.train_on_inputs or options.gradient_checkpointing or options.export):
        raise UsageError("--activated excludes --train-on-inputs, --gradient-checkpointing and --export")
    if options.activated and ranks.sharded():
        raise UsageError("--activated needs the whole model in each process: it excludes FSDP and ZeRO-3")
    if not options.data:
        if not options.download_model:
            raise UsageError("nothing to train on: pass --data FILE with labels (`router label` makes them)")
        return TrainResult(None, models.resolve(options.model, settings, progress))
    if options.report_to != "none" and importlib.util.find_spec(options.report_to) is None:
        raise UsageError(f"--report-to {options.report_to} needs a package: pip install {options.report_to}")
    progress = progress if ranks.first() else SILENT
    space = _space(settings)
    data = dataset.build(settings, space)
    for warning in data.warnings:
        progress.warn(warning)
    if options.objective == "solve" and not any(example.solved for example in data.train):
        raise TrainingError(
            f"{', '.join(options.data)}: no training row holds evidence, which --objective solve learns from: "
            "make such rows with `router label --from-outcomes`"
        )
    ranks.join()
    run = Run(options.output_dir, _fingerprint(settings, space))
    done = run.finished()
    # Before the base is fetched: what cannot fit costs no download.
    forecast = None if done else _foreseen(settings, space, data, progress)
    with ranks.first_goes_ahead():
        base = models.resolve(options.model, settings, progress)
    export.check(base, options.export)
    content = models.content(base)
    if done:
        run.compare_base(done["base_model"].get("content"), content, base.name)
        progress.notice(f"{options.output_dir} already holds this very adapter; nothing to do")
        made = _exported(settings, progress)
        return replace(_result(done["metrics"], options.output_dir, base, already_done=True), exported=made)
    ranks.wait()  # until all have seen that nothing is finished here
    with _held(options.output_dir, run):
        with ranks.first_goes_ahead():
            run.begin()
            begun_on = run.pinned("base", lambda: content)
        run.compare_base(begun_on, content, base.name)
        result = _fit(settings, space, data, base, run, progress, forecast)
        return replace(result, exported=_exported(settings, progress))


@contextmanager
def _held(folder: Path, run: Run) -> Iterator[None]:
    """Hold the folder against another `router train`, whose checkpoints this one would clear away as unfinished.

    The first process does it for all. Raises OutputError in each where another command has the folder, or has finished
    in it meanwhile.
    """
    taken = f"{folder}: another `router train` is writing it; choose another --output-dir"
    failure: RouterError | None = None
    with ExitStack() as stack:
        if ranks.first():
            try:
                stack.enter_context(alone(folder, folder / LOCK, taken))
                if run.finished() is not None:
                    failure = OutputError(f"{folder}: another `router train` has finished it meanwhile")
            except RouterError as error:
                failure = error
        if failure := ranks.shared(failure):
            raise failure
        yield
        if ranks.first():
            with suppress(OSError):  # Windows unlinks nothing that is open
                (folder / LOCK).unlink()


def estimate(settings: Settings, progress: Progress = SILENT) -> Footprint:
    """What `train` would take with these settings on this machine; nothing is fetched but a configuration.

    Raises as `train` does for settings and data, and ModelError where nothing is known of the model.
    """
    if not settings.train.data:
        raise UsageError("nothing to estimate: pass --data FILE with labels (`router label` makes them)")
    space = _space(settings)
    data = dataset.build(settings, space)
    try:
        return Forecast(settings, space, data.train, data.validation).footprint()
    except NoForecast as error:
        raise TrainingError(f"no estimate: {error}") from None


def _foreseen(settings: Settings, space: DecisionSpace, data: dataset.Dataset, progress: Progress) -> Forecast | None:
    """Say what training will take, and refuse what cannot fit; None, with a warning, for too strange a model."""
    try:
        forecast = Forecast(settings, space, data.train, data.validation)
        found = forecast.footprint()
    except NoForecast as error:
        progress.warn(f"no estimate: {error}")
        return None
    progress.notice(str(found))
    forecast.check(found)
    return forecast


def _exported(settings: Settings, progress: Progress) -> tuple[Path, ...]:
    kinds = settings.train.export if ranks.first() else ()
    return tuple(export.export(settings.train.output_dir, kinds, settings, progress)) if kinds else ()


def _space(settings: Settings) -> DecisionSpace:
    """The settings' space; the roles are the data's own unless the user named some."""
    space = space_from(settings)
    if settings.origin("decision.roles") != "default":
        return space
    roles = dataset.roles_of(settings.train.data)
    return DecisionSpace(roles or space.roles, space.topologies, space.step_bound)


# What may change between a run and its continuation without making it another run.
_NEUTRAL = {"output_dir", "data", "logging_steps", "save_steps", "save_total_limit", "download_model", "export"}
_NEUTRAL |= {"report_to", "preset", "estimate", "check_memory", "price_per_hour", "gradient_checkpointing"}
# Micro-batches may change, for want of memory, as long as a step has the same examples.
_NEUTRAL |= {"batch_size", "grad_accum"}


def _fingerprint(settings: Settings, space: DecisionSpace) -> dict[str, Any]:
    """Everything that makes two runs the same: settings, the bytes of the data, the prompt."""
    chosen = settings.train.model_dump(mode="json", exclude=_NEUTRAL)
    hashes = [sha for _, sha in _hashes(settings)]
    return {
        **{f"train.{key}": value for key, value in chosen.items()},
        "train.batch_size x grad_accum": settings.train.batch_size * settings.train.grad_accum,
        "data": hashes,
        "roles": list(space.roles),
        "topologies": list(space.topologies),
        "step_bound": space.step_bound,
        "prompt_version": prompts.PROMPT_VERSION,
        "models.dtype": settings.models.dtype,
        **({"processes": ranks.count()} if ranks.count() > 1 else {}),
    }


def _hashes(settings: Settings) -> list[tuple[str, str]]:
    """Each data file, as it was named, with its SHA-256."""
    return [(path, file_sha256(Path(locate(path)))) for path in settings.train.data]


def _result(metrics: dict[str, Any], adapter: Path, base: models.BaseModel, already_done: bool) -> TrainResult:
    known = {field.name for field in fields(TrainResult)}
    return TrainResult(adapter, base, **{k: v for k, v in metrics.items() if k in known}, already_done=already_done)


def _fit(
    settings: Settings,
    space: DecisionSpace,
    data: dataset.Dataset,
    base: models.BaseModel,
    run: Run,
    progress: Progress,
    forecast: Forecast | None,
) -> TrainResult:
    """Load, train, keep the best, write the folder."""
    from router_cli.training import trainer

    started, options = time.perf_counter(), settings.train
    less = forecast.advice() if forecast else FOR_LESS
    with ranks.first_goes_ahead():
        # Which type is fast is measured: a busy machine could say otherwise when the run goes on.
        settings = settings.with_values(models__dtype=run.pinned("dtype", lambda: _name(serving_dtype(settings))))
    try:
        model, tokenizer = _load(settings, base, run, progress)
    except ModelError as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"out of memory while {base.name} is loaded; {less}") from None
    lessons.check_model(model, tokenizer, space, base.name, progress)
    rows = lessons.encode(data.train, space, tokenizer, options.max_length, progress, options.augment, options.seed)
    if options.objective == "solve":
        lessons.check_verdicts(space, tokenizer, base.name)
        rows += lessons.verdicts(data.train, rows[: len(data.train)], space, tokenizer)
    try:
        fitted = trainer.fit(model, tokenizer, space, rows, data.validation, settings, run, progress)
    except (trainer.OutOfRoom, RuntimeError, MemoryError) as error:
        if not isinstance(error, trainer.OutOfRoom) and not out_of_memory(error):
            raise
        what = str(error) if isinstance(error, trainer.OutOfRoom) else "out of memory beside the training steps"
        raise TrainingError(f"{what}; {less}") from None
    metrics = {
        "steps": fitted.steps,
        "seconds": round(fitted.earlier + time.perf_counter() - started, 1),
        "train_examples": len(data.train),
        "validation_examples": len(data.validation),
        "first_loss": fitted.losses[0] if fitted.losses else None,
        "last_loss": fitted.losses[-1] if fitted.losses else None,
        "validation_macro_f1": fitted.best_score,
        "best_epoch": fitted.best_epoch,
    }
    ranks.leave()
    if ranks.first():
        _write(settings, space, data, base, run, fitted, tokenizer, metrics, progress)
        run.clean()
    return _result(metrics, options.output_dir, base, already_done=False)


def _load(settings: Settings, base: models.BaseModel, run: Run, progress: Progress) -> tuple[Any, Any]:
    """The base model in the type and quantisation that this run was begun in."""
    import torch

    device, options = best_device(), dict[str, Any]()
    with ranks.first_goes_ahead():
        # A busy machine measures otherwise, and one with less free memory: a run goes on in what it was begun in.
        found = run.pinned("precision", lambda: _precision(settings, base, device, progress))
    if found["dtype"]:
        options["dtype"] = getattr(torch, found["dtype"])
    if found["four_bit"]:
        computed = options.get("dtype") or serving_dtype(settings)
        place = torch.cuda.current_device() if device == "cuda" else "cpu"
        quantised = qlora.configuration(computed)
        options |= {"quantization_config": quantised, "dtype": computed, "device_map": {"": place}}
    elif ranks.sharded() and not settings.train.use_4bit:
        options["device_map"] = None  # no GPU takes the whole model: its parts are dealt out from the CPU
    model, tokenizer = load(base, settings, **options)
    if "quantization_config" in options:
        model = qlora.prepared(model, settings.train.gradient_checkpointing)
    return model, tokenizer


def _precision(settings: Settings, base: models.BaseModel, device: str, progress: Progress) -> dict[str, Any]:
    """The number type, None for the one that serves, and whether the base is quantised: as asked, or as can be."""
    train, dtype = settings.train, None
    if train.bf16 or train.fp16:
        name, dtype = ("bf16", "bfloat16") if train.bf16 else ("fp16", "float16")
        if device == "cpu" and (train.fp16 or fast_dtype("cpu") == "float32"):
            # The old guide's command lines say --bf16 for GPUs; on such a CPU it would cost up to ten times the time.
            progress.warn(f"--{name} is slow on this CPU: training in float32 instead")
            dtype = "float32"
    computed = dtype or _name(serving_dtype(settings))
    import torch

    four_bit = train.use_4bit and qlora.wanted(base, device, getattr(torch, computed), progress)
    if computed == "float16" and str(read_json(base.folder / "config.json").get("model_type")).startswith("qwen"):
        progress.warn("float16 is too narrow for some of Qwen's activations: watch the loss, or train where bf16 is")
    return {"dtype": dtype, "four_bit": four_bit}


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _write(
    settings: Settings,
    space: DecisionSpace,
    data: dataset.Dataset,
    base: models.BaseModel,
    run: Run,
    fitted: Any,
    tokenizer: Any,
    metrics: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the finished adapter's folder, the description last."""
    folder = settings.train.output_dir
    with saving(folder), quiet():
        fitted.model.save_pretrained(folder, **({} if fitted.weights is None else {"state_dict": fitted.weights}))
        tokenizer.save_pretrained(folder)
    # What PEFT looks for where nobody names a base. Told before, it would ask the Hub about it while it saves.
    revision = base.revision if base.source in ("cache", "hub") else None
    known = {"base_model_name_or_path": models.hub_id(base) or _portable(base), "revision": revision}
    write_json(folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), **known})
    calibration, solving = calibrated(settings, space, data.validation, base, fitted.model, tokenizer, progress)
    meta = {
        "router": __version__,
        "base_model": {
            "name": base.name,
            "folder_or_id": _portable(base),
            "hub_id": models.hub_id(base),
            "source": base.source,
            "revision": base.revision,
            "content": run.pinned("base", lambda: models.content(base)),
        },
        "prompt_version": prompts.PROMPT_VERSION,
        "roles": list(space.roles),
        "topologies": list(space.topologies),
        "step_bound": space.step_bound,
        "data": [{"file": path, "sha256": sha} for path, sha in _hashes(settings)],
        "split": {
            "train": [example.task_id for example in data.train],
            "validation": [example.task_id for example in data.validation],
        },
        "settings": settings.train.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        "metrics": metrics,
        # None without validation rows: probabilities are then the model's own.
        "calibration": None if calibration is None else calibration.model_dump(mode="json"),
        "fingerprint": run.fingerprint,
    }
    if settings.train.objective == "solve":
        meta["solving"] = None if solving is None else solving.model_dump(mode="json")
    write_card(folder, meta, fitted.log)
    write_json(folder / META, meta)


def _portable(base: models.BaseModel) -> str:
    """What finds the base again: an alias or Hub id stays one, a folder or file is kept with its whole path."""
    return base.name if base.source in ("cache", "hub", "package") else str(Path(base.name).expanduser().resolve())

"""A router on this machine: transformers for the base model, PEFT for the adapter."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from router_cli import models, prompts
from router_cli.backends import Choice, space_from
from router_cli.backends.adapters import adapted
from router_cli.backends.decoding import Decoder
from router_cli.backends.device import ROWS_AT_ONCE, best_device, fast_dtype, out_of_memory
from router_cli.backends.library import quiet
from router_cli.backends.packed import packed
from router_cli.backends.search import SEARCHED, Decoded
from router_cli.backends.value import value_of
from router_cli.errors import InputError, ModelError, UsageError
from router_cli.jsonl import read_json
from router_cli.progress import SILENT, Progress
from router_cli.schema import Alternative, Decision, Usage
from router_cli.scoring.calibration import Calibration
from router_cli.sections import DecisionSettings
from router_cli.settings import Settings
from router_cli.space import DecisionSpace

if TYPE_CHECKING:
    import numpy as np

META = "router_lora_meta.json"
"""What a trained adapter's folder says of itself: base model, roles, topologies, prompt version, metrics."""


class LocalBackend:
    """Decides with a base model, with or without a trained adapter (merged: unmerged LoRA is three times slower)."""

    name = "local"

    def __init__(self, settings: Settings, progress: Progress = SILENT) -> None:
        adapter = settings.infer.adapter
        meta = read_meta(adapter) if adapter else {}
        if adapter is None and settings.infer.base is None:
            raise UsageError("no router: pass --adapter FOLDER, or --base MODEL to ask an untrained model")
        self.space = space_of(meta) if meta else space_from(settings)
        self._value = value_of(settings, meta, self.space, calibration_of(meta, "solving"))
        # An exported router is a whole model, which its description finds beside itself.
        whole = str(adapter / meta["merged"]) if adapter and "merged" in meta else None
        base = models.resolve(whole or settings.infer.base or meta["base_model"]["folder_or_id"], settings, progress)
        known = meta["base_model"].get("content") if meta and not (whole or settings.infer.base) else None
        if known is not None and known != models.content(base):
            progress.warn(
                f"{base.name} has other weights than {adapter} was trained on: its decisions may be worthless"
            )
        self.model_name = str(adapter) if adapter else base.name
        self._base = base
        self.model, self.tokenizer = load(base, settings)
        with _enough_memory(base, self.model.dtype):
            if adapter is not None and whole is None:
                self.model = adapted(self.model, adapter)
            self.model = packed(self.model)
        calibration = calibration_of(meta)
        measured, type_here = calibration.dtype if calibration else None, str(self.model.dtype).removeprefix("torch.")
        if settings.infer.fallback is not None and measured not in (None, type_here):
            progress.warn(
                f"calibrated in {measured}, but computed in {type_here}: --dtype {measured} is as it was measured"
            )
        self._alternatives, self._progress, self._said = settings.infer.alternatives or 0, progress, set[str]()
        self._calibrate: Callable[[dict[str, float]], dict[str, float]] = calibration.apply if calibration else dict
        self._batch_size = settings.infer.batch_size
        # Longer prompts than it was trained with would be as foreign to a router as other words.
        self._max_length = meta.get("settings", {}).get("max_length", settings.train.max_length)
        self._decoder = self._decoder_over(self.space)

    def decide(self, texts: Sequence[str]) -> list[Choice]:
        """A valid decision for each text, with its probabilities, in the order of the texts.

        Fewer are decided at once where memory is short; raises ModelError where it does not hold a single one.
        """
        started = time.perf_counter()
        asked = [self._decoder.prompt(text) for text in texts]
        if self._decoder.cut:
            limit = self._decoder.limit
            why = "as in training" if limit == self._max_length else "all that the model sees at once"
            self._say_once(f"tasks that take more than {limit} tokens, {why}, are shortened in their middle")
        with _enough_memory(self._base, self.model.dtype):
            found = self._decoder.decide(asked, self._alternatives, self._value.best if self._value else None)
        if (held := self._decoder.batch_size) < self._batch_size:
            self._say_once(f"memory holds {held} tasks at once, not --batch-size {self._batch_size}")
        each = (time.perf_counter() - started) * 1000 / max(1, len(texts))
        if not all(one.exact for one in found):
            self._say_once(f"the search for alternatives ends after {SEARCHED} branches a task: some rows have fewer")
        return [
            Choice(
                one.decision,
                one.topologies,
                each,
                alternatives=self._listed(one),
                usage=self._usage(prompt, one.decision),
                solving=self._value.solving(one.solving) if self._value and one.solving is not None else None,
                decision_probability=min(1.0, one.probability),
            )
            for prompt, one in zip(asked, found, strict=True)
        ]

    def _usage(self, prompt: Sequence[int], decision: Decision) -> Usage:
        """The tokens that a decision stands for; most of an answer's are forced and cost no step."""
        answer = len(prompts.encode_answer(decision, self.tokenizer))
        return Usage(prompt_tokens=len(prompt), completion_tokens=answer)

    def _say_once(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            self._progress.warn(words)

    def close(self) -> None:
        """Nothing is open: the model goes with the object."""

    def over(self, space: DecisionSpace) -> LocalBackend:
        """The same model over another decision space: what a prompt with other roles would have got."""
        other = copy.copy(self)
        other.space = space
        other._decoder = self._decoder_over(space)
        return other

    def _decoder_over(self, space: DecisionSpace) -> Decoder:
        return Decoder(self.model, self.tokenizer, space, self._batch_size, self._calibrate, self._max_length)

    def _listed(self, found: Decoded) -> tuple[Alternative, ...] | None:
        if not self._alternatives:
            return None
        return tuple(Alternative(decision=one, probability=min(1.0, share)) for one, share in found.alternatives)


def space_of(meta: dict[str, Any]) -> DecisionSpace:
    """The decision space that an adapter was trained for."""
    return DecisionSpace(tuple(meta["roles"]), tuple(meta["topologies"]), meta["step_bound"])


def calibration_of(meta: dict[str, Any], name: str = "calibration") -> Calibration | None:
    """The calibration that `train` stored with an adapter (its `meta` as `read_meta` gives it); None without one.

    That of the topology's choice, or with the name `solving` that of how likely topologies are to solve a task.
    """
    return None if meta.get(name) is None else Calibration.model_validate(meta[name])


def read_meta(adapter: Path) -> dict[str, Any]:
    """An adapter's own description. Raises ModelError where the folder holds no finished adapter of this program."""
    if not adapter.is_dir():
        raise ModelError(f"{adapter}: no such adapter folder")
    if not (adapter / META).is_file():
        hint = (
            "; its training is unfinished: run the same `router train` again"
            if (adapter / "checkpoints").is_dir()
            else ""
        )
        raise ModelError(f"{adapter}: holds no trained router (it has no {META}){hint}")
    try:
        meta = read_json(adapter / META)
    except InputError as error:
        raise ModelError(str(error)) from None
    missing = [key for key in ("base_model", "roles", "topologies", "step_bound", "prompt_version") if key not in meta]
    if missing:
        raise ModelError(f"{adapter / META}: lacks {', '.join(missing)}; train the adapter again")
    base, described = meta["base_model"], {key: meta[key] for key in DecisionSettings.model_fields}
    try:
        DecisionSettings(**described)
        kept = meta.get("settings", {})
        sound = all(isinstance(meta[key], list) for key in ("roles", "topologies")) and isinstance(kept, dict)
        sound = sound and isinstance(kept.get("max_length", 0), int)
    except ValueError:
        sound = False
    if not sound or not isinstance(base, dict) or not isinstance(base.get("folder_or_id"), str):
        raise ModelError(f"{adapter / META}: is damaged; train the adapter again")
    try:
        calibration = calibration_of(meta)
        calibration_of(meta, "solving")
        if calibration and not set(calibration.biases) <= set(meta["topologies"]):
            raise ValueError("biases")
    except ValueError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else str(error)
        raise ModelError(
            f"{adapter / META}: its calibration is damaged ({where or 'no object'}); train the adapter again, or set "
            "calibration to null to serve uncalibrated"
        ) from None
    if meta["prompt_version"] != prompts.PROMPT_VERSION:
        raise ModelError(
            f"{adapter}: was trained with prompt version {meta['prompt_version']}, this program asks with "
            f"{prompts.PROMPT_VERSION}: its answers would be worthless; train it again"
        )
    return meta


def load(base: models.BaseModel, settings: Settings, **options: Any) -> tuple[Any, Any]:
    """Load (model, tokenizer) of a base model onto the best device, in the type that the machine is fast in.

    Raises ModelError where the folder's files cannot be loaded, or there is no memory for them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = best_device()
    dtype = options.pop("dtype", None) or serving_dtype(settings)
    kept_in = None if "quantization_config" in options else dtype
    try:
        with _enough_memory(base, kept_in), quiet():
            tokenizer = AutoTokenizer.from_pretrained(base.folder)
            model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype, **options)
    except ModelError:
        raise
    except Exception as error:  # damaged files raise whatever their reader raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{base.folder}: cannot be loaded as a model: {first}") from None
    if tokenizer.chat_template is None:
        raise ModelError(f"{base.name}: has no chat template; take an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{base.name}: its tokenizer has no end token")
    if "device_map" not in options:
        with _enough_memory(base, kept_in):
            model = model.to(device)
    return model.eval(), tokenizer


@contextmanager
def _enough_memory(base: models.BaseModel, dtype: Any) -> Iterator[None]:
    """While open, memory that runs out is a ModelError that says what helps, and what the weights take in `dtype`."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        # Whoever keeps the error below must not keep the tensors of the pass that failed.
        traceback.clear_frames(error.__traceback__)
        width: int = getattr(dtype, "itemsize", 0)  # none of a quantised base, or of one in whatever type its files say
        size, wide = models.weight_bytes(base, width), width > 2
        takes = f": its weights alone take {size / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}" if size else ""
        raise ModelError(
            f"{base.name}: out of memory on the {best_device().upper()}{takes}; what helps: a smaller base, "
            f"{'--dtype bfloat16, ' * wide}or a server that holds it, in fewer bits if need be (vLLM, or llama.cpp "
            "with what --export gguf wrote), asked with --backend remote"
        ) from None


def serving_dtype(settings: Settings) -> Any:
    """The torch type that models are served in here: `models.dtype`, or what this machine is fast in."""
    import torch

    wanted = settings.models.dtype
    return getattr(torch, fast_dtype(best_device()) if wanted == "auto" else wanted)


def features(texts: Sequence[str], name: str, settings: Settings, progress: Progress = SILENT) -> np.ndarray:
    """Mean hidden state of the frozen base's middle layer for each text: float32 [len(texts), hidden size].

    The input of the linear-probe baseline. Text alone, without the prompt; mean over its tokens.
    """
    import numpy as np
    import torch
    from torch.nn.utils.rnn import pad_sequence

    model, tokenizer = load(models.resolve(name, settings, progress), settings)
    layers = model.get_decoder().layers
    middle = len(layers) // 2
    caught: list[Any] = []
    hook = layers[middle - 1].register_forward_hook(
        lambda module, args, output: caught.append(output[0] if isinstance(output, tuple) else output)
    )
    # The layers above are not needed: the model's loop runs over as many as its config says.
    model.config.num_hidden_layers = middle
    rows = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    try:
        with torch.inference_mode(), progress.bar("encode for the linear probe", len(texts)) as bar:
            for start in range(0, len(order), ROWS_AT_ONCE):
                part = order[start : start + ROWS_AT_ONCE]
                ids = [tokenizer(texts[i], return_tensors="pt", truncation=True, max_length=1024) for i in part]
                ids = [one["input_ids"][0] for one in ids]
                caught.clear()
                # Padded on the right, where causal attention never looks: no mask is needed.
                model.get_decoder()(pad_sequence(ids, batch_first=True).to(model.device), use_cache=False)
                for i, own, states in zip(part, ids, caught[0], strict=True):
                    rows[i] = states[: len(own)].float().mean(0).cpu().numpy()
                bar.advance(len(part))
    finally:
        hook.remove()
    return rows

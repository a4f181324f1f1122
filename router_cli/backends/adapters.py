"""A trained adapter and the base model that it changes: put into the weights, or beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from router_cli.backends.activated import activated
from router_cli.backends.lean import streamline
from router_cli.backends.library import quiet
from router_cli.errors import InputError, ModelError
from router_cli.jsonl import read_json


def adapted(model: Any, adapter: Path) -> Any:
    """The base `model` with the adapter: in its weights, or beside them where it is active on the answer alone.

    Raises ModelError where the adapter does not load.
    """
    if _add(model, adapter):
        return model.eval()
    loaded = _with_adapter(model, adapter)
    if activated(loaded) is None:
        return loaded.merge_and_unload().eval()
    streamline(loaded)
    return loaded.eval()


def merged(model: Any, adapter: Path) -> Any:
    """The base `model` with the adapter in its weights. Raises ModelError where it does not load or cannot merge."""
    loaded = _with_adapter(model, adapter)
    if activated(loaded) is not None:
        raise ModelError(
            f"{adapter}: is active on the answer alone (--activated), and cannot be merged into the base's weights; "
            "serve it with `router infer`, or train it without --activated"
        )
    return loaded.merge_and_unload().eval()


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    try:
        with quiet():
            return PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:  # truncated or foreign weights raise whatever their reader raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{adapter}: its adapter does not load: {first}") from None


# What a configuration may hold without its adapter being anything but scale * B A added to linear weights.
_HARMLESS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
_HARMLESS |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"}
_HARMLESS |= {"megatron_core", "qalora_group_size"}  # the companions of settings that are off
_BEFORE, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def _add(model: Any, adapter: Path) -> bool:
    """Add an ordinary LoRA adapter to the weights of a model in floats, as PEFT's merge does, to the last bit.

    PEFT itself takes two seconds to come (with bitsandbytes and more), a third of what `infer` needs
    for its first decision. Whether it was done: anything but ordinary, or damaged, is left to PEFT.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = read_json(adapter / "adapter_config.json")
        found = load_file(adapter / "adapter_model.safetensors", device=str(model.device))
    except (InputError, OSError, SafetensorError):
        return False
    ordinary = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False)}
    rest = config.keys() - ordinary.keys() - _HARMLESS - {"r", "lora_alpha"}
    if any(config.get(key) not in values for key, values in ordinary.items()) or any(config[key] for key in rest):
        return False
    try:
        scale = config["lora_alpha"] / config["r"]
        names = {key.removesuffix(_A) for key in found if key.endswith(_A)}
        if not names or {name + end for name in names for end in (_A, _B)} != found.keys():
            return False
        parts = {name: model.get_submodule(name.removeprefix(_BEFORE)) for name in names}
    except (AttributeError, KeyError, TypeError, ZeroDivisionError):
        return False
    pairs = {name: (found[name + _A].float(), found[name + _B].float()) for name in names}
    for name, part in parts.items():
        a, b = pairs[name]
        fits = type(part) is torch.nn.Linear and part.weight.is_floating_point()
        if not fits or part.weight.shape != (b.shape[0], a.shape[1]) or not a.shape[0] == b.shape[1] == config["r"]:
            return False
    with torch.no_grad():
        for name, part in parts.items():
            a, b = pairs[name]
            part.weight += (b @ a) * scale  # summed in float32, then rounded
    return True

"""QLoRA (Dettmers et al. 2023): the frozen base in 4-bit NF4, doubly quantised, below an adapter in float32.

What stays outside the 4 bits (embeddings, norms, head) keeps the number type that it is computed in. PEFT's
`prepare_model_for_kbit_training` widens it to float32, which costs Qwen3-8B 2.5 GB for embeddings and head alone and
doubles every activation; in bfloat16 nothing is won by it, since these parts are frozen and the norms of Qwen and Llama
compute in float32 by themselves. The authors' own script narrows them again, too. In float16 it is needed.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from router_cli.backends.device import available_memory
from router_cli.models import BaseModel, weight_bytes
from router_cli.progress import Progress

ROOM = 0.8
"""The share of a CPU's free memory that a base may take in its own number type before it is quantised."""


def wanted(base: BaseModel, device: str, dtype: Any, progress: Progress) -> bool:
    """Whether `base`, asked for in 4 bits, is loaded so on `device`, to be computed in the torch type `dtype`.

    Not, with a warning, where plain LoRA serves better: without bitsandbytes, and on a CPU that has the memory (NF4 is
    unpacked for every product there: many times slower).
    """
    if importlib.util.find_spec("bitsandbytes") is None or device == "mps":
        progress.warn("--use-4bit needs bitsandbytes and a CUDA GPU: going on with plain LoRA")
        return False
    if device == "cpu":
        needed = weight_bytes(base, dtype.itemsize)
        if fits(needed):
            progress.warn("--use-4bit is slow on a CPU, and the base fits as it is: going on with plain LoRA")
            return False
        progress.warn(
            f"--use-4bit on a CPU is slow, but {base.name} takes {needed / 1e9:.1f} GB otherwise: more than is free"
        )
    return True


def configuration(dtype: Any) -> Any:
    """The BitsAndBytesConfig to load a base with, computing in the torch type `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def fits(needed: float) -> bool:
    """Whether a CPU's free memory takes a base of so many bytes without quantisation."""
    return bool(needed < ROOM * available_memory())


def prepared(model: Any, checkpointing: bool) -> Any:
    """The quantised `model`, frozen, and with what float16 is too narrow for in float32."""
    import torch

    if model.dtype == torch.float16:
        from peft import prepare_model_for_kbit_training

        return prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return model.requires_grad_(False)


def is_quantised(model: Any) -> bool:
    """Whether a transformers model, or the one below an adapter, holds its weights in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def compute_dtype(model: Any) -> Any:
    """The torch type that a model's products are computed in."""
    if not is_quantised(model):
        return model.dtype
    import torch

    found = model.config.quantization_config.bnb_4bit_compute_dtype
    return getattr(torch, found) if isinstance(found, str) else found

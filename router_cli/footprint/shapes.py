"""The shape of a base model from its configuration alone: no weight is read, nothing big is fetched.

Looked for in this order: what is on this machine (folder, .gguf header, cache), the table below, the Hub's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from router_cli import models
from router_cli.errors import ModelError
from router_cli.settings import Settings


def _qwen3(hidden: int, layers: int, heads: int, inner: int, tied: bool = True) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


def _smollm2(hidden: int, layers: int, heads: int, shared: int, inner: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "intermediate_size": inner,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(2560, 36, 32, 9728),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 12288, tied=False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _smollm2(576, 30, 9, 3, 1536),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _smollm2(960, 32, 15, 5, 2560),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _smollm2(2048, 24, 32, 32, 8192),
}
"""What the config.json of well-known models says of their size, for machines that reach no hub."""


@dataclass(frozen=True)
class Shape:
    """A model's configuration (transformers' object), where it comes from, and where its tokenizer is, if here."""

    config: Any
    source: str
    tokenizer: Any = None


def shape_of(name: str, settings: Settings) -> Shape:
    """The shape of the base model `name`. Raises ModelError where its configuration cannot be had."""
    from transformers import AutoConfig

    from router_cli.backends.library import quiet

    found = models.at_hand(name, settings)
    if found is None:
        known = models.RENAMED.get(name, name)
        known = models.ALIASES[known].hub_id if known in models.ALIASES else known
        if known in KNOWN:
            fields = dict(KNOWN[known])
            return Shape(AutoConfig.for_model(fields.pop("model_type"), **fields), "table")
        found = models.hub_description(known, settings)
    place: dict[str, Any] = {"pretrained_model_name_or_path": found.folder}
    if found.source == "gguf":
        place = {"pretrained_model_name_or_path": found.folder.parent, "gguf_file": found.folder.name}
    with quiet():
        try:
            return Shape(AutoConfig.from_pretrained(**place), found.source, _tokenizer(place))
        except Exception as error:  # damaged files raise whatever their reader raises
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"{found.folder}: its configuration cannot be read: {first}") from None


def _tokenizer(place: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(**place)
        # Without files it is made all the same, and knows no word.
        return found if found.chat_template is not None else None
    except Exception:  # training itself says what is wrong with it; here lengths are then counted in characters
        return None

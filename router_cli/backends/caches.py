"""How a model is handed its keys and values: transformers names that argument anew."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


def filling(model: Any, kept: Any) -> dict[str, Any]:
    """The arguments with which a forward pass of `model` attends to the keys and values in `kept` and adds its own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind: Any = type(base)
    return {_name(kind): kept, "use_cache": True}


@cache
def _name(kind: Any) -> str:
    # `past_key_values` up to transformers 5.23; from 5.24 on that warns, and 5.40 takes it no more.
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"

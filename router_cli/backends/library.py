"""How transformers is spoken to: its own bars and advice kept quiet, keys and values by the name that it takes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any


def below(model: Any) -> Any:
    """The model below an adapter; one without stays itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def filling(model: Any, kept: Any) -> dict[str, Any]:
    """The arguments with which a forward pass of `model` attends to the keys and values in `kept` and adds its own."""
    kind: Any = type(below(model))
    return {_name(kind): kept, "use_cache": True}


@cache
def _name(kind: Any) -> str:
    # `past_key_values` up to transformers 5.23; from 5.24 on that warns, and 5.40 takes it no more.
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the terminal, which is the console's."""
    import logging as standard
    import warnings

    from transformers.utils import logging

    # On a machine without its optional kernels it says so with every import, 4-bit or not.
    standard.getLogger("bitsandbytes").setLevel(standard.ERROR)
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Advice to the libraries' own authors about names that change with their next version.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

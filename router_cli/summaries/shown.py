"""What all summaries share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import RenderableType

Shown = tuple[RenderableType, dict[str, Any]]
"""What people see, and the same as a JSON document."""


def number(value: float | None) -> str:
    """Three digits, or a question mark."""
    return "?" if value is None else f"{value:.3f}"


def document(value: Any) -> Any:
    """A result object as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: document(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [document(one) for one in value]
    return str(value) if isinstance(value, Path) else value

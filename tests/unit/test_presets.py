"""`train.preset` fills what is set nowhere else, says so, and is documented value by value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router_cli.errors import SettingsError
from router_cli.sections import PRESETS
from router_cli.settings import KEYS, Settings, load


def with_options(**options: Any) -> Settings:
    given = {f"train.{name}": (f"--{name}", value) for name, value in options.items()}
    return load(given, environ={"ROUTER_TRAIN__LORA_R": "4"})


def test_it_beats_the_defaults_and_everything_set_beats_it() -> None:
    settings = with_options(preset="cpu-fast", lr="5e-4")
    assert settings.train.activated and settings.train.topology_weight == 1.0
    assert settings.origin("train.activated") == "preset cpu-fast"
    assert (settings.train.lr, settings.origin("train.lr")) == (5e-4, "--lr")
    assert (settings.train.lora_r, settings.origin("train.lora_r")) == (4, "ROUTER_TRAIN__LORA_R")
    assert settings.train.lora_alpha == 32
    # What code sets afterwards keeps the rest.
    assert settings.with_values(train__seed=1).train.activated


def test_without_it_nothing_is_filled_and_a_wrong_name_is_refused() -> None:
    assert not with_options().train.activated
    with pytest.raises(SettingsError, match=r"train\.preset"):
        with_options(preset="cpu-fats")


def test_every_value_of_a_preset_is_a_setting_and_stands_in_the_docs() -> None:
    page = Path("docs/train.md").read_text(encoding="utf-8")
    for name, values in PRESETS.items():
        rows = page.split(f"| `--preset {name}` sets |")[1].split("\n\n")[0]
        assert values.keys() <= KEYS
        assert rows.count("| `train.") == len(values)
        for key, value in values.items():
            assert f"| `{key}` | `{json.dumps(value)}` |" in rows

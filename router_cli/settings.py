"""The typed settings object and where each of its values comes from.

An option beats the environment, which beats the TOML file, which beats the default that `sections` declares. Unknown
names are refused with the nearest known one.

pydantic-settings does the same job but passes over a missing file and a mistyped variable in silence, and keeps no
origins; hence the loader here.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError

from router_cli.errors import SettingsError
from router_cli.sections import (
    PRESETS,
    DecisionSettings,
    EndpointSettings,
    EvalSettings,
    InferSettings,
    LabelSettings,
    ModelSettings,
    QuickstartSettings,
    RunSettings,
    Section,
    ServeSettings,
    TrainSettings,
)

PREFIX = "ROUTER_"
CONFIG_FILE = "router.toml"


class Settings(Section):
    """Everything that can be set. Made by `load`."""

    decision: DecisionSettings = DecisionSettings()
    endpoint: EndpointSettings = EndpointSettings()
    models: ModelSettings = ModelSettings()
    label: LabelSettings = LabelSettings()
    train: TrainSettings = TrainSettings()
    infer: InferSettings = InferSettings()
    serve: ServeSettings = ServeSettings()
    eval: EvalSettings = EvalSettings()
    run: RunSettings = RunSettings()
    quickstart: QuickstartSettings = QuickstartSettings()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def origin(self, key: str) -> str:
        """Where the value of `section.field` comes from: an option, a variable, a file, or `default`."""
        return self._origins.get(key, "default")

    def options(self, section: str) -> list[str]:
        """The fields of a section that the command line gave."""
        keys = [key for key, origin in self._origins.items() if origin.startswith("--")]
        return [key.split(".")[1] for key in keys if key.split(".")[0] == section]

    def with_values(self, **values: Any) -> Settings:
        """A copy with other values, given as `train__lr=1e-4`; used where code, not a user, sets something."""
        changed = {key.replace("__", "."): value for key, value in values.items()}
        return _build({**_given(self), **changed}, {**self._origins, **dict.fromkeys(changed, "set by router")})


def _given(settings: Settings) -> dict[str, Any]:
    return {key: getattr(getattr(settings, key.split(".")[0]), key.split(".")[1]) for key in settings._origins}


def fields() -> Iterator[tuple[str, Any]]:
    """Every (`section.field`, pydantic FieldInfo), in the order of declaration."""
    for section, info in Settings.model_fields.items():
        kind: Any = info.annotation
        for name, field in kind.model_fields.items():
            yield f"{section}.{name}", field


KEYS: frozenset[str] = frozenset(key for key, _ in fields())

# Names that users already have in their environment, strongest first; below ROUTER_*.
_KNOWN_VARIABLES = {
    "endpoint.api_key": ("LLM_API_KEY", "OPENAI_API_KEY"),
    "endpoint.base_url": ("LLM_API_BASE", "OPENAI_BASE_URL", "OPENAI_API_BASE"),
    "models.hf_token": ("HF_TOKEN",),
}


def variable(key: str) -> str:
    """The environment variable of `section.field`."""
    return PREFIX + key.replace(".", "__").upper()


def load(
    options: Mapping[str, tuple[str, Any]] | None = None,
    config: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read the settings.

    `options` maps `section.field` to (how the user wrote it, value) and is strongest; then come the environment, the
    TOML file `config` (or `router.toml` in this folder, if there is one), what `train.preset` stands for, and the
    defaults.
    Raises SettingsError naming the key, its origin, what was expected and what came.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source in (_from_file(config), _from_environment(os.environ if environ is None else environ), options or {}):
        for key, (origin, value) in source.items():
            if key not in KEYS:
                raise SettingsError(f"{origin}: there is no setting {key!r}{nearest(key, KEYS)}")
            values[key], origins[key] = value, origin
    preset = values.get("train.preset")
    for key, value in PRESETS.get(preset, {}).items() if isinstance(preset, str) else ():
        if key not in values:
            values[key], origins[key] = value, f"preset {preset}"
    return _build(values, origins)


def _from_file(config: str | None) -> dict[str, tuple[str, Any]]:
    path = Path(CONFIG_FILE if config is None else config).expanduser()
    named = str(path) if config is None else f"--config {config}"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if config is None:
            return {}
        raise SettingsError(f"{named}: no such file") from None
    except UnicodeError:
        raise SettingsError(f"{named}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{named}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: is not TOML: {error}") from None
    found: dict[str, tuple[str, Any]] = {}
    for section, content in table.items():
        if section not in Settings.model_fields:
            raise SettingsError(f"{path}: there is no section {section!r}{nearest(section, Settings.model_fields)}")
        if not isinstance(content, dict):
            raise SettingsError(f"{path}: {section} must be a table, [{section}]")
        found |= {f"{section}.{name}": (str(path), value) for name, value in content.items()}
    return found


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    for key, names in _KNOWN_VARIABLES.items():
        for name in reversed(names):
            if environ.get(name):
                found[key] = (name, environ[name])
    by_name = {variable(key): key for key in KEYS}
    for name, value in environ.items():
        if name.upper() in by_name:
            if value:  # an empty variable is an unset one, as for the names above
                found[by_name[name.upper()]] = (name, value)
        elif _meant_for_us(name.upper(), value, by_name):
            raise SettingsError(f"{name}: there is no such setting{nearest(name.upper(), by_name)}")
    return found


# What Kubernetes and Docker set for services called router, router-serve and the like.
_SERVICE = re.compile(r"_SERVICE_(HOST|PORT)(_\w+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?$")


def _meant_for_us(name: str, value: str, known: Iterable[str]) -> bool:
    if not name.startswith(PREFIX) or "__" in name:
        return name.startswith(PREFIX)
    if _SERVICE.search(name) or re.match("(tcp|udp|sctp)://", value):
        return False
    section = name.removeprefix(PREFIX).split("_")[0].lower()
    return section in Settings.model_fields or bool(difflib.get_close_matches(name, known, n=1, cutoff=0.85))


def _build(values: Mapping[str, Any], origins: dict[str, str]) -> Settings:
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    try:
        settings = Settings(**nested)  # pydantic makes the sections
    except ValidationError as error:
        raise SettingsError(_explain(error, origins)) from None
    settings._origins.update(origins)
    return settings


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"][:2])
    words = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    for pydantics, ours in (
        ("should be greater than or equal to", "must be >="),
        ("should be less than or equal to", "must be <="),
        ("should be greater than", "must be >"),
        ("should be less than", "must be <"),
        ("should be", "must be"),
        ("Value should have", "must have"),
        (" after validation", ""),
        (" for <class 'pathlib.Path'>", ""),
    ):
        words = words.replace(pydantics, ours)
    got = "" if any(word in key for word in ("key", "token")) else f", got {first['input']!r}"
    return f"{key} ({origins.get(key, 'default')}): {words[:1].lower()}{words[1:]}{got}"


def nearest(name: str, known: Any) -> str:
    """`; did you mean 'x'?` where something known is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""

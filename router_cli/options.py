"""Settings fields become Typer options.

`with_settings("train", ...)` gives a command one option for every field of its section, and for the shared fields that
it names. An option's value is None unless the user gave it, so that the settings know where each value comes from.
Values stay text here: the settings check them, and speak of `train.lr (--lr)`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from router_cli.console import Console
from router_cli.errors import SettingsError
from router_cli.sections import SMALL_MODEL, File, Files, Folder
from router_cli.settings import Settings, fields, load

FIELDS = dict(fields())


@dataclass(frozen=True)
class Call:
    """What a command gets: the settings, and where to speak."""

    settings: Settings
    console: Console


class State:
    """How the running command wants its failures shown; set before anything can fail."""

    verbosity = 0


GLOBAL = "Everywhere"
SHARED = {"decision": "What a decision may be", "endpoint": "The endpoint", "models": "The base model"}
"""Headings in --help of what several commands share; a command's own options stand under none."""


def with_settings(section: str | None, *shared: str) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Turn `command(call, ...)` into a Typer command with the options of `section` and of the `shared` keys.

    The command returns its exit code (None is 0): Typer itself ignores what a command returns.
    """
    keys = [key for key in FIELDS if key.split(".")[0] == section] + list(shared)
    names = {key: key.split(".")[1] for key in keys}
    flags = [key for key in keys if FIELDS[key].annotation is bool]

    def decorate(command: Callable[..., int | None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            quiet, verbose = given.pop("quiet"), given.pop("verbose")
            State.verbosity = -1 if quiet else verbose
            as_json = given.pop("as_json")
            chosen = {
                key: (_spelling(names[key]), _text(value))
                for key in keys
                if (value := given.pop(names[key])) is not None
            }
            for key in flags:
                if given.pop(f"no_{names[key]}"):
                    chosen[key] = (_spelling(f"no_{names[key]}"), False)
            settings = load({**chosen, **_set(given.pop("assignments") or [])}, given.pop("config"))
            code = command(Call(settings, Console(State.verbosity, as_json)), **given)
            if code:
                raise typer.Exit(code)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "call"]
        made = [_option(key, names[key]) for key in keys] + [_negation(names[key]) for key in flags]
        run.__signature__ = inspect.Signature([*own, *made, *_globals()])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *made, *_globals())}
        run.keys = tuple(keys)  # type: ignore[attr-defined]  # what its options set, for the docs
        return run

    return decorate


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _spelling(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option(key: str, name: str) -> inspect.Parameter:
    info = FIELDS[key]
    kind, spelling = info.annotation, _spelling(name)
    default = info.default
    text = info.description or ""
    if default not in (None, [], False) and "default" not in text:
        shown = ", ".join(default) if isinstance(default, list) else default
        text += f" Default: {shown}."
    choices = _choices(kind)
    if choices:
        text += f" One of: {', '.join(choices)}."
    annotation: Any = str | None
    if kind is bool:
        annotation = bool | None
    elif _is_path(key):
        annotation = Path | None
    option = typer.Option(
        spelling,
        help=text.replace("[", r"\["),
        show_default=False,
        metavar="" if kind is bool else _metavar(key, kind),
        autocompletion=_completion(key, info.examples or choices, get_origin(kind) is list),
        rich_help_panel=SHARED.get(key.partition(".")[0]),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def _negation(name: str) -> inspect.Parameter:
    """`--no-use-4bit`. Hidden, because beside it a terminal of 80 columns has no room for the names themselves."""
    option = typer.Option(_spelling(f"no_{name}"), hidden=True, help=f"Undoes {_spelling(name)}.")
    annotation = Annotated[bool | None, option]
    return inspect.Parameter(f"no_{name}", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _completion(key: str, names: list[str], many: bool) -> Callable[[str], list[str]] | None:
    if not names:
        return None
    return _completer(names, many, _is_path(key) or SMALL_MODEL in names)


def _beginning(incomplete: str) -> list[Path]:
    folder, _, last = incomplete.rpartition("/")
    try:
        there = Path(folder or ("/" if incomplete[:1] == "/" else ".")).iterdir()
        return [path for path in there if path.name.startswith(last) and (last or not path.name.startswith("."))]
    except OSError:
        return []


def _completer(names: list[str], many: bool, files: bool) -> Callable[[str], list[str]]:
    """Completes names, the last of several too; where they stand for files, the files themselves beside them."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",") if many else ("", "", incomplete)
        taken = before.split(",")
        offered = [one for one in names if one.startswith(last) and one not in taken]
        if files:
            offered += sorted(str(path) + "/" * path.is_dir() for path in _beginning(last))
        return [before + comma + one for one in offered]

    return complete


def _choices(kind: Any) -> list[str]:
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            return [str(one) for one in get_args(part)]
        if inner := [one for arg in get_args(part) for one in ([arg] if get_origin(arg) is Literal else [])]:
            return [str(one) for one in get_args(inner[0])]
    return []


def _is_path(key: str) -> bool:
    annotation = _declared(key)
    return annotation in (File, Files, Folder) or any(part in (File, Files, Folder) for part in get_args(annotation))


def _declared(key: str) -> Any:
    """A field's annotation as written, with its marks, which pydantic takes apart."""
    section, name = key.split(".")
    return _hints(section)[name]


@functools.cache
def _hints(section: str) -> dict[str, Any]:
    kind: Any = Settings.model_fields[section].annotation
    return get_type_hints(kind, include_extras=True)


def _metavar(key: str, kind: Any) -> str:
    if _is_path(key):
        return "PATH"
    plain = [part for part in (get_args(kind) or (kind,)) if part is not type(None)]
    first = plain[0]
    return {int: "INTEGER", float: "NUMBER"}.get(first, "NAMES" if get_origin(kind) is list else "TEXT")


def _globals() -> list[inspect.Parameter]:
    def one(name: str, annotation: Any, default: Any, option: Any) -> inspect.Parameter:
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
        )

    return [
        one(
            "config",
            str | None,
            None,
            typer.Option(
                "--config",
                help="TOML settings file. Default: router.toml here, if there is one.",
                metavar="PATH",
                rich_help_panel=GLOBAL,
            ),
        ),
        one(
            "assignments",
            list[str] | None,
            None,
            typer.Option(
                "--set",
                help="Any setting, as section.field=value; repeatable.",
                metavar="KEY=VALUE",
                autocompletion=_complete_key,
                rich_help_panel=GLOBAL,
            ),
        ),
        one(
            "as_json",
            bool,
            False,
            typer.Option("--json", help="One JSON document on stdout.", metavar="", rich_help_panel=GLOBAL),
        ),
        one(
            "quiet",
            bool,
            False,
            typer.Option(
                "--quiet",
                "-q",
                help="No progress, notices or warnings: errors and the result alone.",
                metavar="",
                rich_help_panel=GLOBAL,
            ),
        ),
        one(
            "verbose",
            int,
            0,
            typer.Option(
                "--verbose",
                "-v",
                count=True,
                help="Say more; -vv shows tracebacks.",
                show_default=False,
                metavar="",
                rich_help_panel=GLOBAL,
            ),
        ),
    ]


def _complete_key(incomplete: str) -> list[str]:
    return [f"{key}=" for key in FIELDS if key.startswith(incomplete)]


def _set(assignments: list[str]) -> dict[str, tuple[str, Any]]:
    chosen: dict[str, tuple[str, Any]] = {}
    for entry in assignments:
        key, equals, value = entry.partition("=")
        if not equals:
            raise SettingsError(f"--set {entry}: expected section.field=value, such as train.lr=1e-4")
        chosen[key.strip().replace("-", "_")] = (f"--set {key.strip()}", value)
    return chosen


def dashed(argv: list[str]) -> list[str]:
    """Spell options with dashes: the old guide's `--output_dir` is `--output-dir`. Values stay as they are.

    Raises SettingsError for an option that takes a path and gets an empty one: to Python that is this folder.
    """
    spelled: list[str] = []
    options = True
    paths = {_spelling(key.split(".")[1]) for key in FIELDS if _is_path(key)}
    for word in argv:
        before = spelled[-1] if spelled and options else ""
        if (before in paths and not word) or (options and word.endswith("=") and word[:-1].replace("_", "-") in paths):
            raise SettingsError(f"{before if not word else word[:-1]}: expected a path, got nothing")
        options = options and word != "--"
        if options and word.startswith("--"):
            name, equals, value = word.partition("=")
            # The option of that name takes a key, which has underscores.
            word = name.replace("_", "-") + equals + value
        spelled.append(word)
    return spelled

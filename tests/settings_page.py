"""docs/settings.md, made from the settings' own declarations: `python -m tests.settings_page` writes it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import typer

from router_cli.cli import app
from router_cli.options import FIELDS, GLOBAL
from router_cli.settings import Settings, variable

FILE = Path(__file__).parents[1] / "docs" / "settings.md"
REGENERATE = "python -m tests.settings_page"

HEAD = f"""# Settings

Every setting can be given in four ways; the first that is there counts:

1. `--set section.field=value` or its own option, on the command line;
2. `ROUTER_SECTION__FIELD`, in the environment, before the names that other tools use (below);
3. `section.field`, in the TOML file of `--config`, or else in `router.toml` in this folder;
4. the default.

Options are spelled with dashes or underscores. One that switches something on has a twin that switches it off:
`--no-use-4bit`. `router config show` prints every value and where it comes from; an unknown name is refused.

| also read | for, strongest first |
|---|---|
| `LLM_API_KEY`, `OPENAI_API_KEY` | `endpoint.api_key` |
| `LLM_API_BASE`, `OPENAI_BASE_URL`, `OPENAI_API_BASE` | `endpoint.base_url` |
| `HF_TOKEN` | `models.hf_token` |

Made from the code by `{REGENERATE}`.

## Options of every command

| option | |
|---|---|
{{everywhere}}

`router --version` names the version, `router --show-completion` prints what `router --install-completion` puts into the
shell's own start file.
"""


@cache
def commands() -> dict[str, Any]:
    """Every command by its words, `config show` too, without Typer's own groups."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: str) -> None:
        found[words] = command
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{words} {name}".strip())

    walk(typer.main.get_command(app), "")
    return found


def page() -> str:
    """The whole page."""
    parts = [HEAD.replace("{everywhere}", "\n".join(_everywhere()))]
    for section, info in Settings.model_fields.items():
        kind: Any = info.annotation
        parts.append(
            f"\n## {section}\n\n{kind.__doc__}\n\n| setting | option | variable | default | |\n|---|---|---|---|---|"
        )
        for key in (key for key in FIELDS if key.split(".")[0] == section):
            name, text = key.split(".")[1], FIELDS[key].description
            own = [words for words, one in commands().items() if key in getattr(one.callback, "keys", ())]
            option = f"`--{name.replace('_', '-')}` of {', '.join(own)}" if own else "only `--set`"
            parts.append(f"| `{key}` | {option} | `{variable(key)}` | {_default(key)} | {text} |")
    return "\n".join(parts) + "\n"


def _everywhere() -> list[str]:
    """A row for each option that every command takes and that is no setting."""
    shared = [one for one in commands()["label"].params if getattr(one, "rich_help_panel", None) == GLOBAL]
    return [f"| {', '.join(f'`{one}`' for one in option.opts)} | {option.help} |" for option in shared]


def _default(key: str) -> str:
    default = FIELDS[key].default
    if default is None or default == []:
        return ""
    return f"`{','.join(default) if isinstance(default, list) else default}`"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")

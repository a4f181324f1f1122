"""The import rules of the house, held by walking the syntax trees: one way only, and heavy ones inside functions."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "router_cli"

# Every module stands in one layer and imports from its own or lower ones. A package stands for its modules, unless
# they are named apart.
LAYERS = {
    1: "errors schema progress ranks",
    2: "jsonl space costs sections settings scoring.metrics scoring.intervals",
    3: "prompts tasks badlines",
    4: "dataset splits examples labelling teachers teams backends scoring models machine footprint training fallback "
    "serving",
    5: "label train infer evaluate flip replay from_outcomes run execute doctor",
    6: "quickstart judging executing audit serve bulk shards ray_engine summaries console options cli api __main__",
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names.split()}
VERBS = ("label", "train", "infer", "evaluate", "replay", "from_outcomes", "run", "execute", "doctor")
COMPOSERS = ("quickstart", "judging", "executing", "audit", "serve", "bulk", "shards", "summaries", "cli", "api")

# Packages that only some modules may import, and only inside functions.
ALLOWED = {
    "trl": ("training.*",),
    "bitsandbytes": ("training.*",),
    "transformers": ("backends.*", "models", "footprint.*", "training.*"),
    "peft": ("backends.*", "footprint.*", "training.*"),
    "openai": ("teachers.connection", "teachers.batch", "doctor"),
    "gguf": ("training.export",),
    "matplotlib": ("scoring.pictures",),
    "genai_prices": ("costs",),
    "starlette": ("serving.app",),
    "uvicorn": ("serve",),
    "prometheus_client": ("serving.metrics",),
    "ray": ("ray_engine",),
    "typer": ("cli", "options"),
    "rich": ("console", "summaries.*"),
}
LIGHT = {"typer", "rich", "pydantic"}  # the only third parties of module level


@dataclass(frozen=True)
class Import:
    """One import: who, what (without `router_cli.`), whether when the module loads, or for type checkers alone."""

    module: str
    target: str
    own: bool
    at_load: bool
    typing: bool
    line: int


def modules() -> dict[str, Path]:
    found = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in found.items()}


def imports_of(module: str, source: str, known: frozenset[str]) -> Iterator[Import]:
    """Every import of a module, relative ones aside (there are none: a test below)."""

    def walk(node: ast.AST, at_load: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, False, typing)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from walk(child, at_load, True)
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    yield made(alias.name, at_load, typing, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    yield made("." * child.level + base, at_load, typing, child.lineno)
                for alias in child.names:
                    # `from router_cli import prompts` means the module.
                    whole = f"{base}.{alias.name}"
                    yield made(
                        whole if whole.removeprefix("router_cli.") in known else base, at_load, typing, child.lineno
                    )
            else:
                yield from walk(child, at_load, typing)

    def made(name: str, at_load: bool, typing: bool, line: int) -> Import:
        own = name == "router_cli" or name.startswith("router_cli.")
        return Import(module, name.removeprefix("router_cli").lstrip(".") if own else name, own, at_load, typing, line)

    yield from walk(ast.parse(source), True, False)


def layer_of(module: str) -> int | None:
    while module:
        if module in LAYER:
            return LAYER[module]
        module = module.rpartition(".")[0]
    return None


def problems(found: list[Import]) -> list[str]:
    """What breaks the rules, one line each."""
    said = []
    for one in found:
        where = f"{one.module}:{one.line} imports {one.target or 'router_cli'}"
        if one.target.startswith("."):
            said.append(f"{where}: relative")
        elif one.own:
            # `from router_cli import __version__` is of no layer.
            mine, theirs = layer_of(one.module), layer_of(one.target)
            if one.target and not one.typing and mine is not None and (theirs is None or theirs > mine):
                said.append(f"{where}: upwards")
            apart = one.module in VERBS and one.target in VERBS
            if apart and one.module != one.target:
                said.append(f"{where}: verbs know nothing of each other")
        else:
            top = one.target.partition(".")[0]
            if top in ALLOWED and not one.typing and not any(_matches(one.module, name) for name in ALLOWED[top]):
                said.append(f"{where}: only {', '.join(ALLOWED[top])} may")
            if one.at_load and not one.typing and not (top in LIGHT or _standard(top)):
                said.append(f"{where}: at module level")
    return said


def _matches(module: str, pattern: str) -> bool:
    base = pattern.removesuffix(".*")
    return module == base or (pattern.endswith(".*") and module.startswith(f"{base}."))


def _standard(top: str) -> bool:
    import sys

    return top in sys.stdlib_module_names


def everything() -> list[Import]:
    known = modules()
    return [one for name, file in known.items() for one in imports_of(name, file.read_text(), frozenset(known))]


def test_every_module_stands_in_a_layer() -> None:
    homeless = [name for name in modules() if name and name != "__init__" and layer_of(name) is None]
    assert homeless == []
    names = modules()
    assert [name for name in LAYER if name not in names] == []


def test_the_page_names_every_module_and_the_layers_that_are_held() -> None:
    page = (ROOT.parent / "ARCHITECTURE.md").read_text()
    unnamed = [name for name in modules() if name and not re.search(rf"\b{name.rpartition('.')[2]}(\.py|/|\b)", page)]
    assert [name for name in unnamed if not name.startswith("__")] == []
    written = {
        int(number): set(re.sub(r"\band\b", ",", names).replace("\n", " ").replace(" ", "").split(","))
        for number, names in re.findall(r"^(\d)\. ((?:.+\n)(?: {3}.+\n)*)", page, flags=re.M)
    }
    held = {layer: set(names.split()) - {"__main__"} for layer, names in LAYERS.items()}
    assert written == held
    composing = page.partition("Only `quickstart`")[2].partition(" compose")[0]
    assert {"quickstart", *re.findall(r"`(\w+)`", composing)} == set(COMPOSERS)


def test_every_folder_of_the_package_is_installed() -> None:
    # Tests import from the checkout and would never miss one.
    listed = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(file.parent.relative_to(ROOT.parent).parts) for file in ROOT.rglob("*.py")}
    assert set(listed) == folders | {"router_cli.data"}


def test_imports_point_one_way_and_heavy_ones_stay_in_functions() -> None:
    found = everything()
    assert len(found) > 300, "the walk finds hardly anything"
    assert problems(found) == []


def test_only_composers_import_verbs() -> None:
    wrong = [
        f"{one.module}:{one.line} imports {one.target}"
        for one in everything()
        if one.own and one.target in VERBS and not one.typing and one.module not in (*COMPOSERS, *VERBS)
    ]
    assert wrong == []


def test_importing_the_package_does_nothing() -> None:
    body = ast.parse((ROOT / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.Expr | ast.Assign) for node in body)


def test_nobody_prints_but_the_console() -> None:
    printers = {
        name
        for name, file in modules().items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printers <= {"console", "cli"}  # cli: the eager --version


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("label", "from router_cli.infer import infer", "verbs know nothing"),
        ("label", "def f():\n    from router_cli import train", "verbs know nothing"),
        ("evaluate", "from router_cli.console import Console", "upwards"),
        ("evaluate", "def f():\n    import rich.table", "only console, summaries.* may"),
        ("prompts", "from router_cli.teachers.openai import OpenAITeacher", "upwards"),
        ("scoring.metrics", "from router_cli.scoring.judge import judge", "upwards"),
        ("train", "import torch", "at module level"),
        ("train", "try:\n    import torch\nexcept ImportError:\n    pass", "at module level"),
        ("backends.local", "class A:\n    from transformers import B", "at module level"),
        ("infer", "def f():\n    from transformers import AutoModel", "only backends.*"),
        ("backends.local", "def f():\n    from trl import SFTTrainer", "only training.* may"),
        ("label", "from . import infer", "relative"),
        ("label", "import router_cli.nowhere", "upwards"),
    ],
)
def test_the_walk_sees_what_breaks_the_rules(module: str, source: str, said: str) -> None:
    found = problems(list(imports_of(module, source, frozenset(modules()))))
    assert any(said in line for line in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training.recipe", "def f():\n    import torch, trl, bitsandbytes"),
        ("train", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy as np"),
        ("train", "def f():\n    from router_cli.training import trainer"),
        ("summaries.label", "from router_cli.label import LabelResult\nfrom rich.text import Text"),
        ("train", "from router_cli import __version__, models"),
    ],
)
def test_the_walk_lets_pass_what_keeps_the_rules(module: str, source: str) -> None:
    assert problems(list(imports_of(module, source, frozenset(modules())))) == []

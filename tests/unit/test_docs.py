"""The pages against the program: every command parses, every option is told of, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from router_cli.options import dashed
from router_cli.settings import load
from tests.settings_page import commands

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data" / "README.md"])
BEGINS = re.compile(r"\s*(\w+=\S+ |.*(&&|\||;) )?router ")
ENDS = {"|", "||", "&&", ";", ">", ">>", "<", "&"}


def blocks(text: str) -> Iterator[str]:
    """The lines of code blocks, fenced or indented, with continued lines in one."""
    fenced = False
    for line in re.sub(r"\s[\\`]\n[ \t]+", " ", text).splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line


def told(page: Path) -> Iterator[list[str]]:
    """Every `router ...` of a page's code blocks as words, without what a shell does around it."""
    for line in blocks(page.read_text(encoding="utf-8")):
        if not BEGINS.match(line):
            continue
        line = re.sub(r"\$\(\(.*?\)\)", "$sum", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for at in (at for at, word in enumerate(words) if word == "router"):
            rest = words[at + 1 :]
            if rest[0][0].isdigit() or (at and words[at - 1] not in ENDS and "=" not in words[at - 1]):
                continue  # a row of printed figures, or a value
            yield rest[: next((i for i, word in enumerate(rest) if word in ENDS), len(rest))]


COMMANDS = [(page.name, words) for page in PAGES for words in told(page)]


def test_the_pages_are_read() -> None:
    assert len(COMMANDS) > 40 and {"README.md", "label.md", "train.md", "infer.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}-{' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_every_command_of_the_docs_is_one(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = dashed(words)
    if words[0].startswith("-"):
        assert words[0] in {spelling for option in commands()[""].params for spelling in option.opts}
        return
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in commands())
    command = commands()[name]
    context = command.make_context(name, words[len(name.split()) :])
    given = {key: context.params.get(key.split(".")[1]) for key in command.callback.keys}
    config = context.params["config"]
    monkeypatch.chdir(tmp_path)
    load(
        # A loop's variable has no value here.
        {key: (key, str(value)) for key, value in given.items() if value is not None and "$" not in str(value)},
        str(ROOT / config) if config else None,
        {},
    )


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_options_beside_a_command_are_its_own(page: Path) -> None:
    for quoted in re.findall(r"`router ([^`]+)`", page.read_text(encoding="utf-8")):
        words = quoted.split()
        name = next((name for name in (" ".join(words[:2]), words[0]) if name in commands()), "")
        own = {spelling for one in commands()[name].params for spelling in one.opts} | {"--help"}
        for word in re.findall(r"(?<![\w-])--[\w-]+", quoted):
            assert word.replace("_", "-") in own, quoted


def test_every_option_stands_in_the_docs() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name, command in commands().items():
        for option in (one for one in command.params if not one.hidden and one.name != "help"):
            for spelling in (one for one in option.opts if one.startswith("-")):
                assert re.search(rf"(?<![\w-]){spelling}(?![\w-])", text), f"{name} {spelling}"


def test_every_command_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    leaves = [name for name, command in commands().items() if not getattr(command, "commands", None)]
    assert [name for name in leaves if f"| `router {name}` |" not in readme] == []


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_tables_are_whole(page: Path) -> None:
    lines = ["", *page.read_text(encoding="utf-8").splitlines(), ""]
    for at, line in enumerate(lines):
        if line.startswith("|") and not lines[at - 1].startswith("|"):
            assert re.fullmatch(r"\|[\s:|-]+\|", lines[at + 1]), f"{page.name}:{at}: a row without a table: {line[:60]}"

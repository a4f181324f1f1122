"""Tasks with tests: what is shown, what is hidden, and what the text gives away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router_cli.errors import InputError
from router_cli.teams.problems import examples_in, read_problems


def read(tmp_path: Path, *rows: dict[str, object]):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_problems([str(tmp_path / "rows.jsonl")])


def test_humaneval_shows_its_prompt_and_hides_its_tests() -> None:
    problems = read_problems(["humaneval"])
    assert len(problems) == 164 and len(read_problems(["humaneval"], 3)) == 3
    assert all("check(candidate)" not in one.task.text and one.benchmark == "humaneval" for one in problems)
    assert sum(bool(one.examples) for one in problems) >= 100


def test_examples_are_what_the_docstring_says(tmp_path: Path) -> None:
    prompt = (
        'def f(x, y=2):\n    """Do it. f(x) is fine.\n    f(1) == 3, as said\n    f(2) ➞ [4]\n    f([1]) => None.\n'
        "    f(a) == 1\n    f(5) returns a list\n    >>> f(1, 2)\n    3\n    >>> sorted(f(3))\n    [5]\n    >>> g(1)\n"
        "    2\n"
        '    """\n'
    )
    [found] = read(tmp_path, {"task_id": "a", "prompt": prompt, "entry_point": "f", "test": "def check(c): pass"})
    assert found.examples.splitlines() == [
        "assert (f(1, 2)) == (3)",
        "assert (sorted(f(3))) == ([5])",
        "assert (f(2)) == ([4])",
        "assert (f([1])) == (None)",
    ]


@pytest.mark.parametrize(
    ("text", "examples"),
    [
        ("Add one.\nIt has to satisfy: assert g(1) == 2", ["assert (g(1)) == (2)"]),
        (
            "Add one: `assert g(1) == 2`; assert g([2], 1) == [3].",
            ["assert (g(1)) == (2)", "assert (g([2], 1)) == ([3])"],
        ),
        ('def g(x):\n    """Add one. g(1) returns 2.\n    h(1) == 2\n    """', ["assert (g(1)) == (2)"]),
        ("Write g so that g(1) == 2.", []),
        ("Sort. assert g(a) == b", []),
    ],
)
def test_a_text_alone_shows_its_asserts_and_what_it_says_of_what_it_defines(text: str, examples: list[str]) -> None:
    assert examples_in(text).splitlines() == examples


def test_a_text_alone_shows_what_a_problem_shows() -> None:
    problems = read_problems(["humaneval"])
    assert [examples_in(one.task.text) for one in problems] == [one.examples for one in problems]


def test_mbpp_shows_one_test_and_hides_the_others(tmp_path: Path) -> None:
    tests = ["assert g(1) == 2", "assert g(2) == 3", "assert g(5) == 6"]
    [found] = read(tmp_path, {"task_id": 3, "text": "Add one.", "test_list": tests, "test_setup_code": "import math"})
    assert "assert g(1) == 2" in found.task.text and "g(2)" not in found.task.text
    assert found.tests == "import math\nassert g(2) == 3\nassert g(5) == 6"
    assert found.examples == "import math\nassert g(1) == 2"


def test_code_is_made_whole_with_what_the_task_gives(tmp_path: Path) -> None:
    prompt = 'from typing import List\n\ndef h(x):\n    return x\n\ndef f(x: List[int]):\n    """F."""\n'
    [found] = read(tmp_path, {"task_id": "a", "prompt": prompt, "entry_point": "f", "test": "def check(c): pass"})
    whole = found.program("def f(x: List[int]):\n    return h(x)")
    assert whole.startswith("from typing") and whole.count("def f(") == 1 and "def h(" in whole
    assert found.program("    return x").startswith(prompt)


@pytest.mark.parametrize("row", [{"task": "a"}, {"task": "a", "test_list": []}, {"prompt": "a", "test": "b"}])
def test_a_row_without_tests_is_named(tmp_path: Path, row: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl:1: has no tests"):
        read(tmp_path, row)

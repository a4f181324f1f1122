"""`label --audit`: the sample, what it costs, the figures, the candidates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from router_cli.audit import AuditResult, audit, estimate, kappa
from router_cli.cli import main
from router_cli.errors import InputError, RouterError, TeacherError, UsageError
from router_cli.label import label
from router_cli.scoring.metrics import NONE
from router_cli.settings import Settings, load
from router_cli.tasks import read_tasks
from tests.fake_teacher import Call, FakeTeacher, Reply

SINGLE = {"topology": "single", "roles": ["builder"], "manager_role": None, "entry_role": "builder", "max_steps": 1}
TESTER = SINGLE | {"roles": ["tester"], "entry_role": "tester"}
CHAIN = SINGLE | {"topology": "chain", "roles": ["builder", "tester"], "max_steps": 2}


def settings(folder: Path, url: str = "", **values: Any) -> Settings:
    chosen: dict[str, Any] = {"label.data": str(folder / "tasks.jsonl"), "label.output": str(folder / "labels.jsonl")}
    chosen |= {"endpoint.base_url": url} if url else {"label.teacher": "heuristic"}
    chosen |= {key.replace("__", "."): value for key, value in values.items()}
    return load({key: ("test", value) for key, value in chosen.items()}, environ={})


def again(folder: Path, url: str = "", **values: Any) -> Settings:
    """The settings of the audit: the same command without --data and with --audit."""
    return settings(folder, url, **{"label__data": [], "label__audit": True, **values})


def write_tasks(folder: Path, count: int) -> None:
    rows = [{"id": f"t{i}", "task": f"Write part {i}."} for i in range(count)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def part(call: Call) -> int:
    return int(call.messages[-1]["content"].split()[-1].rstrip(".")) if len(call.messages) == 2 else -1


def says(first: Callable[[int], Any], second: Callable[[int], Any], switch: list[bool]) -> Callable[[Call], Reply]:
    def behave(call: Call) -> Reply:
        said = (second if switch else first)(part(call))
        return Reply(said if isinstance(said, str) else json.dumps(said))

    return behave


def labelled_then_audited(folder: Path, count: int, second: Callable[[int], Any], **values: Any) -> AuditResult:
    """Label `count` parts as single and chain in turn, then audit against a teacher that says `second`."""
    write_tasks(folder, count)
    switch: list[bool] = []
    with FakeTeacher(behave=says(lambda i: CHAIN if i % 2 else SINGLE, second, switch)) as server:
        label(settings(folder, server.url))
        switch.append(True)
        return audit(again(folder, server.url, label__reask=0, **values))


# -- the figures ------------------------------------------------------------------------------------------------


def test_kappa_is_scikit_learns_and_an_unusable_answer_is_a_class_of_its_own() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(4, size=60)
    second = np.where(rng.random(60) < 0.6, first, rng.integers(-1, 4, size=60))
    assert (second == NONE).any()
    got = kappa(first, second, 4, np.ones(60))
    assert float(got) == pytest.approx(cohen_kappa_score(first, second))
    counts = np.bincount(rng.integers(60, size=60), minlength=60).astype(float)
    repeated = np.repeat(np.arange(60), counts.astype(int))
    both = kappa(first, second, 4, np.stack([np.ones(60), counts]))
    assert both[1] == pytest.approx(cohen_kappa_score(first[repeated], second[repeated]))
    assert np.isnan(kappa(np.zeros(5, int), np.zeros(5, int), 4, np.ones(5)))


def test_figures_and_candidates_of_a_teacher_that_changes_its_mind(tmp_path: Path) -> None:
    def second(i: int) -> Any:
        return {0: CHAIN, 2: TESTER, 3: "no idea"}.get(i, CHAIN if i % 2 else SINGLE)

    result = labelled_then_audited(tmp_path, 10, second)
    assert (result.labels, result.asked, result.answered, result.rejected) == (10, 10, 10, 1)
    assert result.topology.value == 0.8 and result.decision.value == 0.7 and result.complete
    assert result.topology.low < 0.8 < result.topology.high
    # Singles and chains, five each; again four singles, five chains and one of no use.
    chance = 0.5 * 0.4 + 0.5 * 0.5
    assert result.kappa is not None and result.kappa.value == pytest.approx((0.8 - chance) / (1 - chance))
    assert result.kappa.low < result.kappa.value < result.kappa.high
    assert result.changes == {"single -> chain": 1, "chain -> no usable answer": 1}
    assert result.balance == {"balanced": {"single": 5, "chain": 5, "decentralized": 0, "centralized": 0}}
    assert result.candidates == {"another topology": 1, "no usable answer": 1, "another decision": 1}
    found = rows(result.candidates_path)
    assert [(row["id"], row["why"], row["again"]) for row in found] == [
        ("t0", ["another topology"], CHAIN),
        ("t3", ["no usable answer"], None),
        ("t2", ["another decision"], TESTER),
    ]
    # A person puts `decision` right and hands the file on.
    assert [task.decision for task in read_tasks([str(result.candidates_path)])] == [SINGLE, CHAIN, SINGLE]
    assert result.candidates_path == tmp_path / "labels.jsonl.audit.jsonl"


def test_a_teacher_of_one_mind_leaves_no_candidates_and_an_interval_that_admits_doubt(tmp_path: Path) -> None:
    result = labelled_then_audited(tmp_path, 6, lambda i: CHAIN if i % 2 else SINGLE)
    assert result.topology.value == result.decision.value == 1.0 and result.topology.low < 0.7
    assert result.kappa is not None and result.kappa.value == 1.0
    assert result.candidates == {} and not result.candidates_path.exists()


def test_one_topology_alone_has_no_kappa(tmp_path: Path) -> None:
    write_tasks(tmp_path, 4)
    with FakeTeacher(behave=lambda call: Reply(json.dumps(SINGLE))) as server:
        label(settings(tmp_path, server.url))
        assert audit(again(tmp_path, server.url)).kappa is None


def test_balance_is_told_for_every_strategy_that_was_tried(tmp_path: Path) -> None:
    write_tasks(tmp_path, 4)
    lean = {"label__strategy": "prefer-teams"}

    def behave(call: Call) -> Reply:
        return Reply(json.dumps(CHAIN if "Lean towards teams" in call.messages[0]["content"] else SINGLE))

    with FakeTeacher(behave=behave) as server:
        label(settings(tmp_path, server.url))
        label(settings(tmp_path, server.url, **lean))
        found = audit(again(tmp_path, server.url, **lean)).balance
    assert {strategy: counts["chain"] for strategy, counts in found.items()} == {"balanced": 0, "prefer-teams": 4}
    assert found["balanced"]["single"] == 4


def test_split_votes_and_ties_are_candidates_whether_sampled_or_not(tmp_path: Path) -> None:
    write_tasks(tmp_path, 6)
    votes = {"label__votes": 4, "label__temperature": 0.7}
    asked: dict[int, int] = {}

    def behave(call: Call) -> Reply:
        number = part(call)
        asked[number] = asked.get(number, 0) + 1
        chain = {1: 1, 2: 2}.get(number, 0)  # of four votes on each: part 1 splits, part 2 ties
        return Reply(json.dumps(CHAIN if asked[number] <= chain else SINGLE))

    with FakeTeacher(behave=behave) as server:
        label(settings(tmp_path, server.url, label__concurrency=1, **votes))
        result = audit(again(tmp_path, server.url, label__audit_sample=2, **votes))
    assert result.candidates == {"tie": 1, "votes split": 1} and result.labels == 5
    tie, split = rows(result.candidates_path)
    assert (tie["id"], tie["decision"], sorted(tie["votes"])) == ("t2", None, ["chain", "chain", "single", "single"])
    assert (split["id"], split["decision"], split["agreement"]) == ("t1", SINGLE, 0.75)


# -- what is asked, and what it costs ---------------------------------------------------------------------------


def test_the_sample_is_the_same_every_time_and_nothing_is_paid_for_twice(tmp_path: Path) -> None:
    write_tasks(tmp_path, 12)
    with FakeTeacher() as server:
        label(settings(tmp_path, server.url))
        before = (tmp_path / "labels.jsonl").read_bytes()
        paid = [len(server.calls)]
        results = []
        for sample in (5, 5, 8, 100):
            results.append(audit(again(tmp_path, server.url, label__audit_sample=sample)))
            paid.append(len(server.calls))
        again_asked = [call.messages[-1]["content"] for call in server.calls[12:]]
    assert [result.asked for result in results] == [5, 5, 8, 12] and paid == [12, 17, 17, 20, 24]
    assert len(set(again_asked)) == 12
    assert results[0] == results[1] and results[0].usage.attempts == 5
    assert (tmp_path / "labels.jsonl").read_bytes() == before
    assert len(rows(tmp_path / "labels.jsonl.audit")) == 12


def test_a_seeding_endpoint_is_not_asked_with_the_seeds_that_it_had(tmp_path: Path) -> None:
    write_tasks(tmp_path, 2)
    votes = {"label__votes": 3, "label__temperature": 0.7}
    with FakeTeacher() as server:
        label(settings(tmp_path, server.url, **votes))
        first = {call.body.get("seed") for call in server.calls}
        audit(again(tmp_path, server.url, **votes))
        second = {call.body.get("seed") for call in server.calls[6:]}
    assert len(server.calls) == 12 and len(second) == 3 and None not in second and not first & second


def test_an_estimate_asks_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    write_tasks(tmp_path, 5)
    with FakeTeacher() as server:
        label(settings(tmp_path, server.url))
        files = sorted(tmp_path.iterdir())
        found = estimate(again(tmp_path, server.url, label__audit_sample=3))
        assert len(server.calls) == 5
    assert found.questions == 3 and sorted(tmp_path.iterdir()) == files


def test_a_bill_that_is_not_confirmed_stops_it_before_the_first_call(tmp_path: Path) -> None:
    write_tasks(tmp_path, 5)
    price = {"label__price_in": 1e6, "label__price_out": 1e6}
    with FakeTeacher() as server:
        label(settings(tmp_path, server.url, **price))
        with pytest.raises(UsageError, match="not confirmed"):
            audit(again(tmp_path, server.url, **price), confirm=lambda question: False)
        assert len(server.calls) == 5


def test_the_offline_rules_agree_with_themselves_for_nothing(tmp_path: Path) -> None:
    write_tasks(tmp_path, 8)
    label(settings(tmp_path))
    result = audit(again(tmp_path))
    assert result.topology.value == 1.0 and result.usage.cost_usd == 0.0


def test_the_command_prints_figures_or_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tasks(tmp_path, 8)
    output = tmp_path / "labels.jsonl"
    argv = ["label", "--teacher", "heuristic", "--output", str(output)]
    assert main([*argv, "--data", str(tmp_path / "tasks.jsonl"), "-q"]) == 0
    capsys.readouterr()
    assert main([*argv, "--audit", "--audit-sample", "5"]) == 0
    shown = capsys.readouterr().out
    assert "5 of 8 labels" in shown and "same topology  1.000 (0.566-1.000)" in shown and "balanced: single" in shown
    assert main([*argv, "--audit", "--json", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["asked"] == 8 and document["topology"]["value"] == 1.0 and document["kappa"] is None
    assert main([*argv, "--audit", "--strategy", "prefer-teams"]) == 2
    assert "strategy balanced, now prefer-teams" in capsys.readouterr().err


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"label__strategy": "prefer-single"},
            r"labels\.jsonl:1: was made .* \(strategy balanced, now prefer-single\)",
        ),
        ({"decision__roles": "a,b"}, r"roles planner,builder,tester,refractor, now a,b"),
        ({"label__model": "other"}, r"\(model, temperature, topologies, step bound or examples\)"),
        ({"label__votes": 3}, r"votes 1, now 3"),
        ({"label__shots": 4}, "or examples"),
    ],
)
def test_other_settings_than_those_of_the_file_are_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_tasks(tmp_path, 2)
    with FakeTeacher() as server:
        label(settings(tmp_path, server.url))
        with pytest.raises(UsageError, match=said):
            audit(again(tmp_path, server.url, **values))
        assert len(server.calls) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("", "holds no label"),
        ("{nonsense\n", r"labels\.jsonl:1: is not JSON"),
        ('{"task": "a", "decision": {}}\n', r"labels\.jsonl:1: is no row of `router label`"),
    ],
)
def test_a_file_that_is_no_label_file_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "labels.jsonl").write_text(content)
    with pytest.raises(InputError, match=said):
        audit(again(tmp_path))


@pytest.mark.parametrize(
    "values", [{"label__teacher": "recorded"}, {"label__batch": True}, {"label__from_outcomes": "humaneval-mapcoder"}]
)
def test_what_cannot_be_audited_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--audit"):
        audit(again(tmp_path, "http://127.0.0.1:1/v1", **values))


def test_a_server_that_answers_nothing_leaves_no_figures(tmp_path: Path) -> None:
    write_tasks(tmp_path, 2)
    switch: list[bool] = []
    with FakeTeacher(behave=lambda call: Reply(status=500) if switch else None) as server:
        label(settings(tmp_path, server.url))
        switch.append(True)
        with pytest.raises(RouterError) as error:
            audit(again(tmp_path, server.url, endpoint__retries=0))
    assert isinstance(error.value, TeacherError) and not (tmp_path / "labels.jsonl.audit.jsonl").exists()

"""`infer` where the router is not sure: thresholds, who decides instead, what it costs, and that nothing is lost."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from router_cli import prompts
from router_cli.backends.local import META
from router_cli.cli import main
from router_cli.errors import BudgetReached, ModelError, OutputError, TeacherError, UsageError
from router_cli.fallback import Fallback, make_fallback
from router_cli.infer import InferResult, infer, predict
from router_cli.schema import Prediction, Task
from router_cli.settings import load
from router_cli.space import DecisionSpace
from router_cli.summaries.infer import decided
from router_cli.teachers import heuristic
from router_cli.train import train
from tests.fake_teacher import Call, FakeTeacher, Reply
from tests.serving import Gated, until
from tests.training import Recorder, label_rows, train_settings, write_rows
from tests.unit.test_infer import logprobs, with_logprobs

Tiny = Callable[..., Path]
SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))
FIXED = '{"topology":"single","roles":["tester"],"manager_role":null,"entry_role":"tester","max_steps":1}'
CURVE = [(0.9, 0.2, 0.95), (0.6, 0.5, 0.9), (0.1, 1.0, 0.8)]


def calibrated(**values: Any) -> dict[str, Any]:
    points = [dict(zip(("threshold", "coverage", "agreement"), one, strict=True)) for one in CURVE]
    errors = {"ece_before": 0.2, "ece_after": 0.1, "ece_floor": 0.1}
    return {"temperature": 1.0, "biases": {}, "n": 40, "dtype": "float32", **errors, "curve": points, **values}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("fallback")
    data = write_rows(folder / "labels.jsonl", label_rows(8, 0))
    train(train_settings(data, tiny_folder("smollm"), folder / "adapter", validation_share=0))
    return folder / "adapter"


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    return with_calibration(plain, tmp_path / "adapter", calibrated())


def with_calibration(plain: Path, folder: Path, calibration: Any) -> Path:
    shutil.copytree(plain, folder)
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**meta, "calibration": calibration}))
    return folder


def tasks_file(path: Path, count: int = 8) -> Path:
    return write_rows(
        path / "tasks.jsonl", [{"id": f"t{i}", "task": f"Do {'very ' * (i % 4)}well {i}."} for i in range(count)]
    )


def run(adapter: Path, data: Path | str, said: Recorder | None = None, confirm: Any = None, **more: Any) -> InferResult:
    chosen = {"infer.adapter": adapter, "infer.data": data, "models.dtype": "float32", "endpoint.retries": 0}
    chosen |= {f"infer.{key}" if "__" not in key else key.replace("__", "."): value for key, value in more.items()}
    settings = load(
        {key: (f"test {key}", str(value)) for key, value in chosen.items() if value is not None}, environ={}
    )
    return infer(settings, progress=said or Recorder(), confirm=confirm)


def to_teacher(server: FakeTeacher, **more: Any) -> dict[str, Any]:
    values = {"fallback": "teacher", "endpoint__base_url": server.url, "endpoint__api_key": "k"}
    return {**values, "label__price_in": 2.5, "label__price_out": 10.0, **more}


def middle(rows: list[Prediction]) -> float:
    return median(row.probability for row in rows if row.probability is not None)


# -- calibration is applied -------------------------------------------------------------------------------------


def test_probabilities_are_calibrated_and_the_topology_is_chosen_from_them(plain: Path, tmp_path: Path) -> None:
    data = tasks_file(tmp_path)
    before = run(plain, data).predictions
    warm = with_calibration(plain, tmp_path / "warm", calibrated(temperature=4.0))
    for row, own in zip(run(warm, data).predictions, before, strict=True):
        assert row.topologies and own.topologies and row.decision == own.decision
        powers = {name: share**0.25 for name, share in own.topologies.items()}
        expected = {name: power / sum(powers.values()) for name, power in powers.items()}
        assert row.topologies == pytest.approx(expected, abs=1e-4) and row.probability == max(row.topologies.values())
    rare = min(before[0].topologies or {}, key=(before[0].topologies or {}).__getitem__)
    biased = with_calibration(plain, tmp_path / "biased", calibrated(biases={rare: 20.0}))
    rows = run(biased, data).predictions
    assert all(row.decision and row.decision.topology == rare and row.probability > 0.9 for row in rows)
    assert not any(SPACE.violations(row.decision) for row in rows)


@pytest.mark.parametrize(
    ("damaged", "where"),
    [
        ({"temperature": 0}, "temperature"),
        ({"curve": []}, "curve"),
        ({"biases": {"ring": 1.0}}, "biases"),
        ({"temperatur": 1}, "temperatur"),
        (7, "no object"),
    ],
)
def test_a_damaged_calibration_is_one_clear_line(plain: Path, tmp_path: Path, damaged: Any, where: str) -> None:
    value = {**calibrated(), **damaged} if isinstance(damaged, dict) else damaged
    folder = with_calibration(plain, tmp_path / "damaged", value)
    with pytest.raises(ModelError, match=rf"{META}: its calibration is damaged \({where}\); train") as error:
        run(folder, tasks_file(tmp_path))
    assert "\n" not in str(error.value)


# -- alternatives -----------------------------------------------------------------------------------------------


def test_alternatives_are_in_the_row_where_they_are_asked_for(plain: Path, tmp_path: Path) -> None:
    data = tasks_file(tmp_path, 3)
    run(plain, data, output=tmp_path / "plain.jsonl")
    assert "alternatives" not in (tmp_path / "plain.jsonl").read_text()
    run(plain, data, output=tmp_path / "listed.jsonl", alternatives=4)
    for line in (tmp_path / "listed.jsonl").read_text().splitlines():
        row = json.loads(line)
        shares = [one["probability"] for one in row["alternatives"]]
        assert len(shares) == 4 and shares == sorted(shares, reverse=True) and sum(shares) < 1
        assert not any(SPACE.violations(one["decision"]) for one in row["alternatives"])
    with pytest.raises(UsageError, match="--alternatives needs --backend local"):
        run(plain, data, alternatives=2, backend="heuristic")
    with pytest.raises(OutputError, match="other settings \\(alternatives\\)"):
        run(plain, data, output=tmp_path / "listed.jsonl", alternatives=3)


def test_a_search_that_ends_early_is_said_once(tiny_folder: Tiny, tmp_path: Path) -> None:
    said = Recorder()
    roles = ",".join("abcdefghij")
    chosen = {"infer.base": tiny_folder("smollm"), "decision.roles": roles, "infer.alternatives": 1000}
    chosen |= {"infer.data": tasks_file(tmp_path, 2), "infer.batch_size": 1, "models.dtype": "float32"}
    infer(load({key: ("test", str(value)) for key, value in chosen.items()}, environ={}), progress=said)
    assert len([line for line in said.warnings if "some rows have fewer" in line]) == 1


# -- who decides ------------------------------------------------------------------------------------------------


def test_below_the_threshold_the_rules_decide_and_above_the_router(adapter: Path, tmp_path: Path) -> None:
    data = tasks_file(tmp_path)
    own = run(adapter, data).predictions
    result = run(adapter, data, min_confidence=middle(own), fallback="heuristic")
    texts = {row["id"]: row["task"] for row in map(json.loads, data.read_text().splitlines())}
    for row, before in zip(result.predictions, own, strict=True):
        assert before.probability is not None
        if before.probability < middle(own):
            decision = heuristic.decide(texts[row.task_id], SPACE)[0]
            assert (row.fallback, row.decision) == ("heuristic", decision)
            # Of the topology in the row, as ever; how sure the router was is the greatest of them.
            assert row.topologies == before.topologies and row.probability == before.topologies[decision.topology]
        else:
            assert row.model_copy(update={"milliseconds": before.milliseconds}) == before
    assert result.unsure == {"heuristic": 4} and result.fallbacks == 4 and result.threshold == middle(own)
    assert run(adapter, data, min_confidence=0, fallback="heuristic").unsure == {}
    assert run(adapter, data, min_confidence=1, fallback="heuristic").unsure == {"heuristic": 8}


def test_nobody_or_a_given_decision(adapter: Path, tmp_path: Path) -> None:
    data = tasks_file(tmp_path, 3)
    result = run(adapter, data, min_confidence=1, fallback="abstain", output=tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["decision"], row["fallback"], row["probability"]) for row in rows] == [(None, "abstain", None)] * 3
    assert "3 of 3 below the confidence 1: decided by nobody 3" in str(decided(result, False)[0])
    result = run(adapter, data, min_confidence=1, fallback=FIXED)
    assert all(row.decision and prompts.render(row.decision) == FIXED for row in result.predictions)
    assert {row.fallback for row in result.predictions} == {"decision"} and result.unsure == {"decision": 3}


def test_an_abstention_is_shown_to_people(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["infer", "--adapter", str(adapter), "--dtype", "float32", "--min-confidence", "1", "--fallback", "abstain"]
    assert main([*words, "--alternatives", "2", "Sort"]) == 0
    shown = capsys.readouterr().out
    assert "none: not sure enough" in shown and "1. of all" in shown and "2. of all" in shown


def test_the_teacher_is_asked_about_the_unsure_alone_and_priced(adapter: Path, tmp_path: Path) -> None:
    data, output = tasks_file(tmp_path), tmp_path / "out.jsonl"
    own = run(adapter, data).predictions
    unsure = {row.task_id for row in own if row.probability is not None and row.probability < middle(own)}
    with FakeTeacher() as server:
        result = run(adapter, data, min_confidence=middle(own), output=output, **to_teacher(server))
        again = run(adapter, data, min_confidence=middle(own), output=output, **to_teacher(server))
    rows = [Prediction.model_validate_json(line) for line in output.read_text().splitlines()]
    assert {row.task_id for row in rows if row.fallback == "teacher"} == unsure and len(server.calls) == len(
        unsure
    ) == 4
    assert [row.task_id for row in rows] == [f"t{i}" for i in range(8)]
    assert result.usage is not None and result.usage.cost_usd == pytest.approx(server.cost)
    assert result.unsure == {"teacher": 4} and (again.decided, again.resumed) == (0, 8)
    shown = str(decided(result, False)[0])
    assert "4 of 8 below the confidence" in shown and "4 requests, 1,600 + 160 tokens, $0.0056" in shown


def test_a_teacher_without_a_valid_answer_leaves_the_row_without_a_decision(adapter: Path, tmp_path: Path) -> None:
    with FakeTeacher(behave=lambda call: Reply("no idea")) as server:
        result = run(adapter, tasks_file(tmp_path, 2), min_confidence=1, **to_teacher(server, label__reask=0))
    assert [(row.decision, row.fallback) for row in result.predictions] == [(None, "teacher (no_json)")] * 2
    assert result.unsure == {"none": 2}


@pytest.mark.parametrize("how", ["budget", "quota"])
def test_what_was_paid_for_stands_when_the_teacher_ends(adapter: Path, tmp_path: Path, how: str) -> None:
    data, output = tasks_file(tmp_path), tmp_path / "out.jsonl"
    refused = Reply(status=401, error={"message": "bad key", "code": "invalid_api_key"})
    with FakeTeacher(*[Reply()] * 3, *([refused] if how == "quota" else [])) as server:
        values = to_teacher(server, min_confidence=1, output=output, label__concurrency=1)
        with pytest.raises(BudgetReached if how == "budget" else TeacherError) as error:
            # A request's worst case is some cents; its cost a tenth of that.
            run(adapter, data, **values, label__max_cost=None if how == "quota" else 0.02)
        paid = len(server.ledger)
        assert len(output.read_text().splitlines()) == paid and 0 < paid < 8
        assert how == "quota" or "a larger --max-cost goes on" in str(error.value)
        result = run(adapter, data, **values)
        assert (result.resumed, result.decided) == (paid, 8 - paid)
        assert len(server.ledger) == 8 and set(server.answered().values()) == {1}


def test_answers_behind_a_gap_are_counted_and_said(adapter: Path, tmp_path: Path) -> None:
    data, output, said = tasks_file(tmp_path), tmp_path / "out.jsonl", Recorder()
    gap = json.loads(data.read_text().splitlines()[1])["task"]

    def behave(call: Call) -> Reply | None:
        until(lambda: len(server.calls) == 4)  # all are on their way before one is refused
        return Reply(status=401) if call.task == gap else None

    with FakeTeacher(behave=behave) as server:
        with pytest.raises(TeacherError):
            run(adapter, data, said, **to_teacher(server, min_confidence=1, output=output, label__concurrency=4))
        assert len(output.read_text().splitlines()) == 1
        [bill] = [line for line in said.notices if "the fallback's answers so far" in line]
        assert f"3 requests, ${server.cost:.4f}; those to 2 tasks behind the one that got none are lost" in bill


def asking(server: FakeTeacher, **more: Any) -> Fallback:
    """A fallback of the teacher for a life of many calls."""
    values = {"min_confidence": 1.0, "endpoint__retries": 0, **to_teacher(server, **more)}
    chosen = {f"infer.{key}" if "__" not in key else key.replace("__", "."): value for key, value in values.items()}
    return make_fallback(load({key: ("test", str(value)) for key, value in chosen.items()}, environ={}), [], None)


def outcomes(unsure: Fallback, *texts: str) -> list[Prediction | BaseException]:
    tasks = [Task(id=text, text=text) for text in texts]
    return list(unsure.outcomes(tasks, predict(Gated(), tasks)))


def test_every_row_has_its_own_outcome_and_all_that_was_paid_is_known() -> None:
    wrong = json.dumps({"topology": "ring"})

    def behave(call: Call) -> Reply | None:
        if call.task == "c" and call.turn == 0:
            return Reply(wrong)
        if call.task == "c":  # all are answered before it is refused, with one answer of its own paid for
            until(lambda: len(server.ledger) == 4)
            return Reply(status=401)
        return None

    with FakeTeacher(behave=behave) as server, asking(server, label__concurrency=4) as unsure:
        found = outcomes(unsure, "a", "b", "c", "d", "e")
        # What comes behind the refusal is not asked in the same breath.
        assert [isinstance(one, TeacherError) for one in found] == [False, False, True, False, True]
        assert {one.fallback for one in found if isinstance(one, Prediction)} == {"teacher"}
        assert (len(server.ledger), len(server.calls)) == (4, 5)
        assert unsure.usage.cost_usd == pytest.approx(server.cost) and unsure.usage.attempts == 4
        assert dict(unsure.counts) == {"teacher": 3}


def test_a_row_without_a_probability_is_an_error_of_its_own() -> None:
    with FakeTeacher() as server, asking(server) as unsure:
        tasks = [Task(id=text, text=text) for text in "ab"]
        first, second = predict(Gated(), tasks)
        bare = first.model_copy(update={"probability": None, "topologies": None})
        found = list(unsure.outcomes(tasks, [bare, second]))
    assert isinstance(found[0], UsageError) and isinstance(found[1], Prediction) and found[1].fallback == "teacher"


@pytest.mark.parametrize(
    ("refusal", "times"),
    [(Reply(status=401), 1), (Reply(status=503), 3), (Reply(drop=True), 3)],
    ids=["no key", "down", "drops"],
)
def test_a_teacher_that_comes_back_is_asked_again(refusal: Reply, times: int) -> None:
    there = threading.Event()
    with FakeTeacher(behave=lambda call: None if there.is_set() else refusal) as server, asking(server) as unsure:
        for _ in range(times - 1):  # given up, and not yet taken to be down
            [row] = outcomes(unsure, "x")
            assert isinstance(row, Prediction) and row.fallback == "teacher (no_answer)"
        for _ in range(2):
            [error] = outcomes(unsure, "x")
            assert isinstance(error, TeacherError)
        there.set()
        for text in ("x", "y"):
            [row] = outcomes(unsure, text)
            assert isinstance(row, Prediction) and row.fallback == "teacher" and row.decision


def test_what_is_spent_stays_spent_when_a_teacher_comes_back() -> None:
    # A request's worst case is some cents; its cost a tenth of that.
    refused = {1, 3}
    with (
        FakeTeacher(behave=lambda call: Reply(status=401) if call.number in refused else None) as server,
        asking(server, label__max_cost=0.02) as unsure,
    ):
        found = [outcomes(unsure, f"task {i}")[0] for i in range(12)]
        assert [isinstance(one, TeacherError) for one in found[:5]] == [False, True, False, True, False]
        ended = [isinstance(one, BudgetReached) for one in found]
        assert ended == sorted(ended) and ended[-1] and not ended[4]
        assert unsure.usage.cost_usd == pytest.approx(server.cost) and 0 < server.cost <= 0.02
        assert len(server.calls) == ended.index(True)  # nothing is sent for those


def test_another_teacher_is_another_file(adapter: Path, tmp_path: Path) -> None:
    data, output = tasks_file(tmp_path, 2), tmp_path / "out.jsonl"
    with FakeTeacher() as server:
        run(adapter, data, min_confidence=1, output=output, **to_teacher(server))
        with pytest.raises(OutputError, match=r"other settings \(teacher\)"):
            run(adapter, data, min_confidence=1, output=output, **to_teacher(server, label__model="other"))


def test_a_dear_fallback_is_agreed_to_first(adapter: Path, tmp_path: Path) -> None:
    data, asked, said = tasks_file(tmp_path, 8), list[str](), Recorder()

    def refuse(question: str) -> bool:
        asked.append(question)
        return False

    with FakeTeacher() as server:
        values = to_teacher(server, min_confidence=0.6, label__confirm_above=0)
        with pytest.raises(UsageError, match="is not confirmed and nothing was sent"):
            run(adapter, data, said, refuse, **values)
        # Half of the calibration tasks were less sure than that.
        assert len(asked) == 1 and not server.calls and any("4 questions" in line for line in said.notices)
        assert run(adapter, data, confirm=refuse, **values, label__yes=True).unsure == {"teacher": len(server.calls)}
    assert len(asked) == 1


# -- the threshold ----------------------------------------------------------------------------------------------


def test_a_target_agreement_picks_the_threshold_that_keeps_most(adapter: Path, tmp_path: Path) -> None:
    data, said = tasks_file(tmp_path), Recorder()
    result = run(adapter, data, said, target_agreement=0.9, fallback="abstain")
    assert result.threshold == 0.6
    assert any("keeps 50%, and agrees with the labels on 90%" in line for line in said.notices)
    by_hand = run(adapter, data, min_confidence=0.6, fallback="abstain")
    assert [row.decision for row in result.predictions] == [row.decision for row in by_hand.predictions]
    with pytest.raises(UsageError, match=r"--target-agreement 0\.99: the most on the 40 calibration tasks is 0\.950"):
        run(adapter, data, target_agreement=0.99, fallback="abstain")


def test_a_target_cost_picks_the_threshold_by_the_price_of_a_call(adapter: Path, tmp_path: Path) -> None:
    data = tasks_file(tmp_path)
    with FakeTeacher() as server:
        for share, threshold in ((0.0, 0.1), (0.55, 0.6), (2.0, 0.9)):
            # About 500 prompt tokens and an answer.
            found = run(adapter, data, target_cost=share * 0.0018, **to_teacher(server), limit=2)
            assert found.threshold == threshold
        with pytest.raises(UsageError, match=r"the price of nowhere is unknown: set label\.price_in"):
            values = to_teacher(server, label__model="nowhere", label__price_in=None, label__price_out=None)
            run(adapter, data, target_cost=1, **values)
        with pytest.raises(UsageError, match="the price of gpt-4o is nothing"):
            run(adapter, data, target_cost=1, **to_teacher(server, label__price_in=0, label__price_out=0))


def test_without_a_calibration_there_is_a_warning_or_no_curve(plain: Path, tmp_path: Path) -> None:
    data, said = tasks_file(tmp_path, 1), Recorder()
    run(plain, data, said, min_confidence=0.5, fallback="abstain")
    assert any("not calibrated" in line for line in said.warnings)
    with pytest.raises(UsageError, match="no curve to choose a threshold from; give --min-confidence"):
        run(plain, data, target_agreement=0.5, fallback="abstain")
    said = Recorder()
    run(plain, data, said)
    assert said.warnings == []


def test_another_number_type_than_the_calibrations_is_warned_about(plain: Path, tmp_path: Path) -> None:
    folder, said = with_calibration(plain, tmp_path / "bf16", calibrated(dtype="bfloat16")), Recorder()
    data = tasks_file(tmp_path, 1)
    run(folder, data, said, min_confidence=0.5, fallback="abstain")
    assert [line for line in said.warnings if "calibrated in bfloat16, but computed in float32" in line]
    run(folder, data, said := Recorder())
    assert said.warnings == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_confidence": 0.5}, "--min-confidence needs --fallback"),
        ({"fallback": "abstain"}, "--fallback needs --min-confidence, --target-agreement or --target-cost"),
        ({"min_confidence": 0.5, "target_agreement": 0.9, "fallback": "abstain"}, "exclude each other"),
        ({"target_cost": 1, "fallback": "heuristic"}, "--target-cost needs --fallback teacher"),
        ({"target_agreement": 0.9, "fallback": "abstain", "backend": "heuristic"}, "needs a local --adapter"),
        (
            {"min_confidence": 0.5, "fallback": "abstain", "backend": "heuristic"},
            "--backend heuristic gives no probability",
        ),
        ({"min_confidence": 0.5, "fallback": "{"}, "--fallback: is not JSON"),
        ({"min_confidence": 0.5, "fallback": FIXED.replace("1}", "2}")}, "the decision is not valid: max_steps"),
        ({"min_confidence": 0.5, "fallback": "guess"}, "must be teacher, heuristic, abstain or a decision as JSON"),
        ({"min_confidence": 2, "fallback": "abstain"}, "infer.min_confidence .* must be <= 1"),
    ],
)
def test_options_that_do_not_go_together(plain: Path, tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(plain, tasks_file(tmp_path, 1), **values)


def test_money_options_need_somebody_to_be_paid(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "--adapter", str(plain), "--max-cost", "1", "Sort"]) == 2
    assert "--max-cost needs --fallback teacher" in capsys.readouterr().err


# -- a remote router --------------------------------------------------------------------------------------------


def test_a_remote_routers_probabilities_are_compared_too(plain: Path) -> None:
    spread = logprobs([('{"topology":"', []), ("single", [("single", 0.6), ("chain", 0.4)]), ('"}', [])])
    values: dict[str, Any] = {"infer.backend": "remote", "infer.model": "m", "endpoint.api_key": "k"}
    values |= {"infer.fallback": "abstain"}

    def ask(server: FakeTeacher, least: float) -> Prediction:
        chosen = {**values, "endpoint.base_url": server.url, "infer.min_confidence": least}
        [row] = infer(
            load({key: ("test", str(value)) for key, value in chosen.items()}, environ={}), "Sort"
        ).predictions
        return row

    with FakeTeacher(behave=lambda call: with_logprobs(FIXED, spread)) as server:
        assert ask(server, 0.5).fallback is None and ask(server, 0.7).fallback == "abstain"
    with (
        FakeTeacher(behave=lambda call: Reply(FIXED)) as server,
        pytest.raises(UsageError, match="gives no probability"),
    ):
        ask(server, 0.5)
    with FakeTeacher(behave=lambda call: Reply("no idea")) as server:  # the rules' decision is nobody's confidence
        assert (row := ask(server, 0.5)).fallback == "abstain" and row.decision is None

"""`router eval --outcomes` from files to reports, and on the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from router_cli.cli import main
from router_cli.errors import InputError, SettingsError, UsageError
from router_cli.jsonl import write_rows
from router_cli.options import _completion
from router_cli.replay import replay, write_tasks
from router_cli.scoring import worth_report
from router_cli.sections import OUTCOME_TABLES
from router_cli.settings import load
from router_cli.space import DecisionSpace
from router_cli.summaries.evaluate import weighed
from router_cli.teachers.heuristic import decide
from router_cli.train import train
from tests import training

SPACE = DecisionSpace(("planner", "builder", "tester", "refractor"))


def decision(topology: str) -> dict[str, Any]:
    return decide("Sort a list.", DecisionSpace(SPACE.roles, (topology,)))[0].model_dump(mode="json")


def runs(count: int = 40, **more: Any) -> list[dict[str, Any]]:
    """Even tasks need the chain, odd ones do not; the chain costs four times as much."""
    return [
        {"task_id": f"t{i}", "topology": name, "solved": name == "chain" or i % 2 == 1, "cost": cost, **more}
        for i in range(count)
        for name, cost in (("single", 0.5), ("chain", 2.0))
    ]


def predictions(count: int = 40) -> list[dict[str, Any]]:
    right = ("chain", "single")
    return [
        {"task_id": f"t{i}", "decision": decision(right[i % 2]), "topologies": {"single": i % 2, "chain": 1 - i % 2}}
        for i in range(count)
    ]


@pytest.fixture
def judge(tmp_path):
    def run(rows: list[dict[str, Any]], predicted: list[dict[str, Any]] | None, **options: Any):
        write_rows(tmp_path / "o.jsonl", rows)
        given = {"outcomes": str(tmp_path / "o.jsonl"), "output_dir": str(tmp_path / "report"), "resamples": 200}
        if predicted is not None:
            write_rows(tmp_path / "p.jsonl", predicted)
            given["predictions"] = str(tmp_path / "p.jsonl")
        values = {f"eval.{key}": (f"--{key}", value) for key, value in {**given, **options}.items()}
        return replay(load(values, environ={}))

    return run


def test_a_perfect_router_is_the_oracle_and_both_files_say_so(judge, tmp_path):
    report = judge(runs(), predictions(), unsolved_penalty=5)
    (one,) = report.tables
    first = one.policies[0]
    assert (first.name, first.solved.value, first.dollars.value) == ("router", 1.0, 1.25)
    assert {row.name for row in one.policies} == {
        "router", "always single", "always chain", "random", "same-mix coin", "same-cost coin", "oracle",
    }  # fmt: skip
    metrics = one.metrics
    found = [getattr(metrics, name).value for name in ("pgr", "apgr", "cpt_50", "cpt_80")]
    assert found == [1.0, 0.75, 0.25, 0.4]
    assert [one.value for one in (metrics.opt_sel, metrics.opt_cost, metrics.opt_acc)] == [1.0, 1.0, 1.0]
    assert "it is better than always single" in one.summary[1]
    assert report.split == "all", "no row carries a split"
    written = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert written == report.model_dump(mode="json")
    assert "NaN" not in json.dumps(written)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 7 and "<script" not in page and "http" not in page
    assert all(word in page for word in ("Opt.Sel", "bill a task", "same-mix coin", "McNemar"))


def test_what_predictions_say_about_solving_is_judged_in_both_files_and_on_the_terminal(judge, tmp_path):
    said = [{**row, "solving": {"single": (i % 2) * 0.8 + 0.1, "chain": 0.9}} for i, row in enumerate(predictions())]
    report = judge(runs(), said)
    found = report.tables[0].solving
    assert found is not None and found.calibration.n == 80
    assert found.calibration.brier.value == pytest.approx(0.01), "every run is .1 off"
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "How likely a topology solves" in page and "Reliability diagram: solved by said P(solved)" in page
    written = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert written["tables"][0]["solving"]["topologies"][1]["said"] == pytest.approx(0.9)
    console = Console(file=io.StringIO(), width=120)
    console.print(weighed(report, load({"eval.output_dir": ("", str(tmp_path))}, environ={}))[0])
    assert "P(solved | topology), on 80 runs" in " ".join(console.file.getvalue().split())
    for broken in ({"single": 1.2}, {"single": "much"}, [0.5], {}):
        rows = [{**row, "solving": broken} for row in predictions()]
        assert judge(runs(), rows).tables[0].solving is None, broken


def test_names_in_files_are_escaped_in_the_page(judge, tmp_path):
    judge(runs(worker="<b>x</b>"), predictions())
    assert "<b>x</b>" not in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_a_page_without_costs_has_no_cost_picture(judge, tmp_path):
    report = judge([{k: v for k, v in row.items() if k != "cost"} for row in runs()], predictions())
    assert worth_report.cost_quality(report.tables[0]) is None
    assert report.tables[0].metrics.aiq is None
    assert any("Not every run counts its tokens" in note for note in report.tables[0].notes)


def test_policies_are_judged_without_a_router_too(judge):
    (one,) = judge(runs(), None).tables
    assert one.policies[0].name == "always single"
    assert one.metrics is None
    random = next(row for row in one.policies if row.name == "random")
    assert (random.solved.value, random.dollars.value, random.mix) == (0.75, 1.25, {"single": 0.5, "chain": 0.5})
    assert {row.name: row.solved_difference.verdict for row in one.policies[1:]}["always chain"] == "worse"


def test_the_teachers_labels_and_other_routers_are_policies(judge, tmp_path):
    write_rows(
        tmp_path / "l.jsonl", [{"task_id": f"t{i}", "task": "x", "decision": decision("chain")} for i in range(40)]
    )
    write_rows(tmp_path / "q.jsonl", [{"task_id": f"t{i}", "decision": decision("single")} for i in range(40)])
    (one,) = judge(
        runs(), predictions(), labels=str(tmp_path / "l.jsonl"), compare=f"other={tmp_path / 'q.jsonl'}"
    ).tables
    solved = {row.name: row.solved.value for row in one.policies}
    assert (solved["teacher's labels"], solved["other"]) == (1.0, 0.5)


def test_old_labels_of_mbpp_find_their_tasks_by_number(judge, tmp_path):
    rows = [{**row, "task_id": row["task_id"].replace("t", "mbpp_") + "_name"} for row in runs()]
    label = {"task": "x", "decision": decision("chain"), "sample_type": "mbpp_teacher_distilled"}
    write_rows(tmp_path / "l.jsonl", [{**label, "origin_task_id": i} for i in range(40)])
    (one,) = judge(rows, None, labels=str(tmp_path / "l.jsonl")).tables
    assert next(row for row in one.policies if row.kind == "labels").solved.n == 40


def test_every_worker_gets_a_table_or_the_one_that_is_asked_for(judge):
    both = [
        *runs(worker="a"),
        *runs(worker="b"),
        {"task_id": "t0", "topology": "single", "solved": True, "worker": "c"},
    ]
    report = judge(both, predictions())
    assert [one.worker for one in report.tables] == ["a", "b"]
    assert report.notes == ("c: no task with two executed topologies and a decision; left out.",)
    assert [one.worker for one in judge(both, predictions(), worker="b").tables] == ["b"]


def test_what_goes_wrong_is_one_line(judge, tmp_path):
    with pytest.raises(InputError, match=r"its ids are like 't0', those of .*p.jsonl like 'z'"):
        judge(runs(), [{"task_id": "z", "decision": None}])
    with pytest.raises(UsageError, match="--probe says nothing beside --outcomes"):
        judge(runs(), predictions(), probe="smollm2-135m")
    assert main(["eval", "--worker", "w", "--predictions", "p.jsonl", "--labels", "l.jsonl"]) == 2
    with pytest.raises(SettingsError, match="expected NAME=FILE, a file or the folder of a run, got 'x'"):
        judge(runs(), predictions(), compare="x")
    with pytest.raises(SettingsError, match="the name 'oracle' is taken"):
        judge(runs(), predictions(), compare="oracle=x.jsonl")
    with pytest.raises(SettingsError, match="pass --outcomes"):
        replay(load({}, environ={}))


def test_tasks_to_predict_come_out_of_the_outcomes(tmp_path):
    settings = load({"eval.outcomes": ("", "mbpp-mapcoder")}, environ={})
    path = Path(write_tasks(settings, tmp_path / "tasks.jsonl"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 397 and all(row["task"] for row in rows)
    with pytest.raises(InputError, match="no row brings a task's text"):
        write_tasks(load({"eval.outcomes": ("", "xcodeeval-mapcoder")}, environ={}), tmp_path / "x.jsonl")


def test_the_command_prints_a_table_of_policies_and_a_document(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["eval", "--outcomes", "xcodeeval-mapcoder", "--resamples", "200", "--output-dir", "w"]
    assert main([*asked, "--worker", "gpt-4-turbo"]) == 0
    out = capsys.readouterr().out
    assert "xCodeEval, gpt-4-turbo: Always single solves 0.368" in out and "…" not in out
    assert main([*asked, "--json", "-q"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tables"]) == 2


def test_names_of_tables_complete_beside_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "human.jsonl").touch()
    (tmp_path / "runs").mkdir()
    complete = _completion("eval.outcomes", list(OUTCOME_TABLES), False)
    assert complete is not None
    assert complete("hum") == ["humaneval-mapcoder", "human.jsonl"]
    assert complete("ru") == ["runs/"]
    assert complete("nowhere/x") == []


def test_an_adapter_decides_the_tasks_of_the_outcomes_first(tmp_path, tiny_folder, capsys):
    data = training.write_rows(tmp_path / "labels.jsonl", training.label_rows(8, 0))
    train(training.train_settings(data, tiny_folder("smollm"), tmp_path / "adapter", validation_share=0))
    rows = [{**row, "text": f"Write the function {row['task_id']}."} for row in runs(6)]
    write_rows(tmp_path / "o.jsonl", rows)
    asked = ["eval", "--outcomes", str(tmp_path / "o.jsonl"), "--adapter", str(tmp_path / "adapter"), "-q", "--json"]
    assert main([*asked, "--output-dir", str(tmp_path / "w"), "--resamples", "100"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert (table["policies"][0]["name"], table["counts"]["judged"]) == ("router", 6)
    assert table["metrics"]["apgr"] is not None, "its probabilities came along"
    assert main([*asked, "--predictions", "p.jsonl"]) == 2

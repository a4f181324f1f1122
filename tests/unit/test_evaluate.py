from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from router_cli import jsonl
from router_cli.errors import InputError, OutputError, SettingsError
from router_cli.evaluate import evaluate
from router_cli.progress import Silent
from router_cli.settings import load

TOPOLOGIES = ("single", "chain", "decentralized", "centralized")
DECISIONS = {
    "single": {
        "topology": "single",
        "roles": ["builder"],
        "manager_role": None,
        "entry_role": "builder",
        "max_steps": 1,
    },
    "chain": {
        "topology": "chain",
        "roles": ["planner", "builder"],
        "manager_role": None,
        "entry_role": "planner",
        "max_steps": 2,
    },
    "decentralized": {
        "topology": "decentralized",
        "roles": ["builder", "tester"],
        "manager_role": None,
        "entry_role": "builder",
        "max_steps": 4,
    },
    "centralized": {
        "topology": "centralized",
        "roles": ["planner", "builder"],
        "manager_role": "planner",
        "entry_role": "planner",
        "max_steps": 3,
    },
}
WORDS = {
    "single": "write one function that sorts",
    "chain": "first export, then convert, then verify",
    "decentralized": "the same change in each of the modules",
    "centralized": "keep the services in step during the cut-over",
}


class Listening(Silent):
    """Keeps what a user has to know."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def label(number: int, topology: str, split: str | None = "test", **more):
    row = {
        "messages": [
            {"role": "system", "content": "You are a meta-router."},
            {"role": "user", "content": f"Task: {WORDS[topology]} in project {number}"},
            {"role": "assistant", "content": json.dumps(DECISIONS[topology])},
        ],
        "sample_type": "teacher_distilled",
        "origin_task_id": f"t{number}",
        "decision": DECISIONS[topology],
        "split": split,
    }
    return {**row, **more}


def labels(count: int = 60, split: str | None = "test", start: int = 0, **more):
    return [label(start + i, TOPOLOGIES[i % 4], split, **more) for i in range(count)]


def prediction(number: int, topology: str, probability: float | None = 0.7, **more):
    rest = (1 - (probability or 0)) / 3
    row = {
        "task_id": f"t{number}",
        "decision": DECISIONS[topology],
        "backend": "local",
        "model": "m",
        "milliseconds": 1.0,
    }
    if probability is not None:
        row["probability"] = probability
        row["topologies"] = {name: probability if name == topology else rest for name in TOPOLOGIES}
    return {**row, **more}


def right(count: int = 60, wrong: int = 0, start: int = 0):
    """Right predictions but for the first `wrong`, which name the next topology."""
    return [prediction(start + i, TOPOLOGIES[(i + (i < wrong)) % 4]) for i in range(count)]


TRAIN = labels(12, "train", start=500)
"""A few training rows: one fit of the baselines is quicker than five folds."""


@pytest.fixture
def judge(tmp_path: Path):
    def run(predictions, gold, train=TRAIN, loss_log=None, features=None, progress=None, **options):
        jsonl.write_rows(tmp_path / "predictions.jsonl", predictions)
        jsonl.write_rows(tmp_path / "labels.jsonl", [*gold, *train])
        given = {
            "predictions": str(tmp_path / "predictions.jsonl"),
            "labels": str(tmp_path / "labels.jsonl"),
            "output_dir": str(tmp_path / "report"),
            "resamples": 200,
            **options,
        }
        settings = load({f"eval.{key}": (f"--{key}", value) for key, value in given.items()}, environ={})
        return evaluate(settings, progress or Silent(), features, loss_log)

    return run


def test_the_report_file_holds_what_is_returned(judge, tmp_path):
    report = judge(right(60, wrong=6), labels())
    written = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert written == report.model_dump(mode="json")
    assert not list((tmp_path / "report").glob(".*"))
    assert "NaN" not in (tmp_path / "report" / "report.json").read_text(encoding="utf-8")


def test_shares_count_the_right_topologies_and_decisions(judge):
    predictions = right(60, wrong=6)
    predictions[20]["decision"] = {**DECISIONS["single"], "roles": ["tester"], "entry_role": "tester"}
    report = judge(predictions, labels())
    assert report.accuracy.value == pytest.approx(54 / 60)
    assert report.exact.value == pytest.approx(53 / 60)
    assert report.valid.value == 1.0
    assert report.valid.low < 1.0
    assert sum(map(sum, report.confusion)) == 60
    assert [row.support for row in report.per_class] == [15] * 4
    for row in report.per_class:
        for one in (row.precision, row.recall, row.f1):
            assert one.low <= one.value <= one.high and one.high - one.low > 0.05, "every figure has its interval"
    assert report.mistakes[0].gold.topology != report.mistakes[0].predicted.topology


def test_missing_and_invalid_predictions_are_wrong_and_said_so(judge):
    predictions = right(60)
    del predictions[:2]
    predictions[10]["decision"] = {**DECISIONS["single"], "max_steps": 9}
    predictions[11]["decision"] = None
    progress = Listening()
    report = judge(predictions, labels(), progress=progress)
    assert report.accuracy.value == pytest.approx(56 / 60)
    assert report.valid.value == pytest.approx(56 / 60)
    assert (report.counts.missing_predictions, report.counts.invalid) == (2, 2)
    assert sum(row[-1] for row in report.confusion) == 4
    assert "2 judged tasks are without a prediction, counted as wrong." in progress.warnings
    assert "2 predictions are without a valid decision, counted as wrong." in progress.warnings
    assert any("steps_out_of_range" in mistake.why for mistake in report.mistakes)


def test_rows_without_a_partner_and_repeated_rows_are_counted(judge):
    predictions = [*right(60), prediction(3, "single"), prediction(999, "single"), prediction(200, "single")]
    report = judge(predictions, [*labels(), label(5, "single"), *labels(40, "train", start=200)])
    counts = report.counts
    assert (counts.duplicate_predictions, counts.predictions_without_label) == (1, 1)
    assert (counts.predictions_of_other_splits, counts.duplicate_labels) == (1, 1)
    assert (counts.judged, counts.labels) == (60, 113)
    assert report.accuracy.value == 1.0
    assert any("repeated label" in warning for warning in report.warnings)


def test_other_systems_rows_need_only_an_id_and_a_decision(judge):
    predictions = [{"task_id": row["task_id"], "decision": row["decision"], "extra": 1} for row in right(60)]
    report = judge(predictions, labels())
    assert report.accuracy.value == 1.0
    assert report.calibration is None
    assert report.selective is None
    assert any("0 of 60 tasks" in note for note in report.notes)


def test_old_label_rows_without_decision_and_split_are_read_and_all_judged(judge):
    gold = [{key: row[key] for key in ("messages", "sample_type", "origin_task_id")} for row in labels(40, None)]
    report = judge(right(40), gold, train=())
    assert (report.split, report.accuracy.n, report.accuracy.value) == ("all", 40, 1.0)
    assert "No label carries a split: all rows were judged." in report.notes
    assert any("cross-validation" in note for note in report.notes)
    assert all("(out of fold)" in system.note for system in report.systems if system.kind == "baseline")


def test_baselines_are_fitted_on_the_training_split_and_stand_beside_heuristic_and_comparisons(judge, tmp_path):
    jsonl.write_rows(tmp_path / "base.jsonl", [prediction(i, "single") for i in range(60)])
    report = judge(
        right(60, wrong=3),
        labels(),
        train=labels(80, "train", start=100),
        features=lambda texts: np.array([[len(text), text.count("e"), text.count("s")] for text in texts], dtype=float),
        compare=f"untrained={tmp_path / 'base.jsonl'}",
    )
    assert [system.name for system in report.systems] == [
        "router",
        "untrained",
        "heuristic",
        "majority",
        "random",
        "length",
        "tf-idf + lr",
        "tf-idf + knn",
        "linear probe",
    ]
    assert "Baselines were fitted on the 80 rows of the training split." in report.notes
    by_name = {system.name: system for system in report.systems}
    assert by_name["untrained"].accuracy.value == 0.25
    assert by_name["untrained"].macro_f1_difference.verdict == "better"
    assert by_name["tf-idf + lr"].accuracy.value > 0.95
    assert by_name["tf-idf + lr"].accuracy_difference.score.value < 0
    assert by_name["router"].macro_f1_difference is None
    assert "better than untrained" in report.summary[1]


def test_a_difference_that_few_tasks_cannot_tell_is_said_with_the_number_that_could(judge, tmp_path):
    jsonl.write_rows(tmp_path / "other.jsonl", right(60, wrong=10)[::-1])
    predictions = right(60, wrong=0)
    for i in range(8, 17):
        predictions[i] = prediction(i, TOPOLOGIES[(i + 1) % 4])
    report = judge(predictions, labels(), compare=f"other={tmp_path / 'other.jsonl'}")
    other = report.systems[1].accuracy_difference
    assert (other.verdict, other.tasks is not None and other.tasks > 60) == ("cannot tell", True)
    assert other.words == f"cannot tell; about {other.tasks:,} tasks would"
    assert "cannot tell it from other" in report.summary[1]


def test_a_constant_router_is_named(judge):
    report = judge([prediction(i, "chain") for i in range(60)], labels())
    assert "The router is constant: every valid decision is chain." in report.warnings


def test_a_router_no_better_than_a_coin_of_its_mix_is_named(judge):
    kinds = np.random.default_rng(0).permutation([TOPOLOGIES[i % 4] for i in range(60)])
    report = judge([prediction(i, str(kind)) for i, kind in enumerate(kinds)], labels())
    assert any("no better than a coin of its own mix" in warning for warning in report.warnings)
    assert report.coin.expected.value == pytest.approx(0.25)
    assert not any("coin" in warning for warning in judge(right(60, wrong=9), labels()).warnings)


def test_labels_of_one_class_and_few_rows_are_named(judge):
    report = judge([prediction(i, "single") for i in range(12)], [label(i, "single") for i in range(12)])
    assert "All judged labels are single: nothing can be told about choosing a topology." in report.warnings
    assert any("Only 12 judged tasks" in warning for warning in report.warnings)
    assert any("left out of macro-F1" in note for note in report.notes)


def test_training_rows_among_the_judged_are_named_by_id_and_by_text(judge):
    train = labels(40, "train", start=100)
    copied = {**label(7, "centralized"), "messages": train[3]["messages"]}
    gold = [copied if row["origin_task_id"] == "t7" else row for row in labels()]
    report = judge(right(60), [*gold, label(9, "chain", "train"), *train])
    leak = next(warning for warning in report.warnings if "training split" in warning)
    assert leak.startswith("2 judged tasks are also in the training split")
    assert "t7, t9" in leak


def test_judging_the_training_split_itself_is_said_and_does_not_flatter_baselines(judge):
    report = judge(right(60), labels(60, "train"), train=(), split="train")
    assert any("60 judged tasks are also in the training split" in warning for warning in report.warnings)
    assert any("cross-validation" in note for note in report.notes)


def test_labels_of_the_heuristic_are_told_from_a_teachers_and_votes_give_the_ceiling(judge):
    def provenance(teacher: str, agreement: float | None) -> dict:
        return {
            "teacher": teacher,
            "model": teacher,
            "prompt_version": "1",
            "roles": ["planner", "builder", "tester", "refractor"],
            "strategy": "balanced",
            "key": "k",
            "agreement": agreement,
        }

    report = judge(right(60), labels(60, provenance=provenance("heuristic", None)))
    assert any("offline heuristic" in warning for warning in report.warnings)
    assert report.ceiling is None
    assert any("repeatability" in note and "not known" in note for note in report.notes)
    report = judge(right(60), labels(60, provenance=provenance("openai", 0.8)))
    assert report.label_teachers == {"openai": 60}
    assert (report.ceiling.source, report.ceiling.agreement.value) == ("votes", pytest.approx(0.8))
    assert (report.ceiling.router.score.value, report.ceiling.router.verdict) == (pytest.approx(0.2), "better")
    assert not report.warnings


def test_a_second_label_file_gives_the_ceiling_and_no_repeated_rows(judge, tmp_path):
    again = labels()
    for i in range(15):  # the teacher changes its mind about a quarter
        again[i] = {**again[i], "decision": DECISIONS[TOPOLOGIES[(i + 1) % 4]]}
        again[i]["messages"] = [*again[i]["messages"][:2], {"role": "assistant", "content": "{}"}]
    jsonl.write_rows(tmp_path / "again.jsonl", again)
    report = judge(right(60, wrong=30), labels(), labels=f"{tmp_path / 'labels.jsonl'},{tmp_path / 'again.jsonl'}")
    assert (report.ceiling.source, report.ceiling.agreement.value, report.ceiling.agreement.n) == (
        "second file",
        0.75,
        60,
    )
    assert report.ceiling.macro_f1.value == pytest.approx(0.75, abs=0.02)
    assert (report.ceiling.router.score.value, report.ceiling.router.verdict) == (-0.25, "worse")
    assert (report.counts.duplicate_labels, report.accuracy.value) == (0, 0.5)
    assert any("second file agrees with the first" in note for note in report.notes)


def test_what_answers_and_labels_take_is_counted(judge):
    used = {"prompt_tokens": 100, "completion_tokens": 30}
    predictions = [{**row, "milliseconds": float(i), "usage": used} for i, row in enumerate(right(60), start=1)]
    origin = {"teacher": "openai", "usage": {**used, "cost_usd": 0.002}}
    report = judge(predictions, labels(60, provenance=origin))
    own = report.spending
    assert (own.n, own.median_milliseconds, own.milliseconds.value) == (60, 30.5, 30.5)
    assert (own.prompt_tokens.value, own.completion_tokens.value, own.dollars) == (100, 30, None)
    assert report.teacher_spending.dollars.value == pytest.approx(0.002)
    assert report.teacher_spending.median_milliseconds is None
    assert any("A label of the teacher took 100 + 30 tokens, $0.002" in note for note in report.notes)
    # Half of the tasks handed over cost half of the teacher's price.
    half = min(report.cost_quality, key=lambda point: abs(point.asked - 0.5))
    assert half.dollars == pytest.approx(half.asked * 0.002)
    assert [(one.asked, one.agreement.value) for one in report.cost_quality][-1] == (1.0, 1.0)


def test_rows_of_rules_and_people_took_no_tokens(judge):
    origin = {"teacher": "recorded", "usage": {"prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0}}
    assert judge(right(60), labels(60, provenance=origin)).teacher_spending is None


def test_parts_of_the_tasks_are_judged_apart(judge, tmp_path):
    gold = labels()
    for i in range(20):
        gold[i]["messages"][1]["content"] = "Task: 请写一个函数,把列表排序并返回结果,注意边界情况。" * (1 + i % 3)
        gold[i]["provenance"] = {"teacher": "openai", "agreement": 1.0 if i % 2 else 0.6}
    for i in range(40, 60):
        gold[i]["sample_type"], gold[i]["origin_task_id"] = "mbpp_teacher_distilled", f"mbpp_{i}"
    predictions = right(60, wrong=20)
    for i in range(40, 60):
        predictions[i]["task_id"] = f"mbpp_{i}"
    report = judge(predictions, gold)
    found = {(one.kind, one.name): one for one in report.slices}
    assert {kind for kind, _ in found} == {"data set", "language", "length", "teacher confidence"}
    chinese, rest = found["language", "Chinese, Japanese or Korean"], found["language", "other scripts"]
    assert (chinese.n, chinese.accuracy.value, rest.n, rest.accuracy.value) == (20, 0.0, 40, 1.0)
    assert found["data set", "mbpp"].n == 20 and found["data set", "labels.jsonl"].n == 40
    assert {found["teacher confidence", name].n for name in ("votes of one mind", "votes divided")} == {10}
    assert sum(one.n for (kind, _), one in found.items() if kind == "length") == 60
    assert rest.over_baseline.score.value > chinese.over_baseline.score.value
    assert "By part of the tasks" in page(tmp_path)[0]


def test_a_router_that_hardly_varies_sets_off_the_alarm(judge):
    many = [prediction(i, "single" if i % 20 else "chain") for i in range(60)]
    (said,) = [one for one in judge(many, labels()).warnings if "varies" in one]
    assert said.startswith("The router hardly varies: 95% of the tasks get single, 0.29 bits of entropy")
    # Three topologies share a tenth: no single one has the rest, and yet the entropy is low.
    some = [prediction(i, "single" if i % 12 else "chain") for i in range(60)]
    report = judge(some, labels())
    assert report.entropy.value == pytest.approx(0.414, abs=1e-3)
    assert not any("varies" in one for one in report.warnings)
    assert judge(right(60), labels()).entropy.value == 2.0


def test_two_routers_stand_side_by_side(judge, tmp_path):
    other = [{**row, "milliseconds": 2.0} for row in right(60, wrong=12)]
    jsonl.write_rows(tmp_path / "second" / "predictions.jsonl", other)
    jsonl.write_json(
        tmp_path / "second" / "report.json", {"loss": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}
    )
    report = judge(right(60, wrong=3), labels(), compare=str(tmp_path / "second"))
    (side,) = report.sides
    assert (side.name, side.accuracy.value, side.versus.only_router, side.versus.only_other) == ("second", 0.8, 9, 0)
    assert (side.versus.same_topology.value, side.versus.mcnemar) == (pytest.approx(51 / 60), 2 / 2**9)
    assert (side.spending.median_milliseconds, [point.loss for point in side.loss]) == (2.0, [2.0, 1.0])
    assert sum(map(sum, side.confusion)) == 60 and side.calibration.n == 60
    written = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert written["sides"][0]["macro_f1"] == side.macro_f1.model_dump()
    text, pieces = page(tmp_path)
    assert all(words in text for words in ("Side by side", "Confusion: router", "Confusion: second", "compared"))
    charts = [one["aria-label"].split()[0] for one in pieces.pictures if one["class"] == "chart"]
    assert [charts.count(kind) for kind in ("Confusion", "Reliability", "Risk-coverage", "Loss")] == [3, 3, 2, 1]


def test_calibration_and_selective_risk_follow_the_probabilities(judge):
    predictions = [
        prediction(i, TOPOLOGIES[(i + (i >= 45)) % 4], 0.95 if i < 45 else 0.4, fallback="teacher" if i == 0 else None)
        for i in range(60)
    ]
    report = judge(predictions, labels())
    assert report.calibration.n == 60
    assert [one.count for one in report.calibration.bins] == [15, 45]
    assert report.calibration.ece.value == pytest.approx(0.75 * 0.05 + 0.25 * 0.4)
    assert (report.systems[0].ece, report.systems[0].brier) == (report.calibration.ece, report.calibration.brier)
    assert [(point.coverage, point.risk.value) for point in report.selective.curve] == [(0.75, 0.0), (1.0, 0.25)]
    assert report.mistakes[0].probability == 0.4
    assert any("1 judged prediction is from a fallback" in note for note in report.notes)


def test_impossible_probabilities_are_left_out_of_calibration(judge):
    predictions = right(60)
    predictions[0] |= {"probability": 1.7, "topologies": {"single": 0.9, "chain": 0.9}}
    predictions[1] |= {"probability": "high", "topologies": None}
    assert judge(predictions, labels()).calibration.n == 58


class Pieces(HTMLParser):
    """What a page is made of, with every attribute, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.pictures: list[dict[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag == "svg":
            self.pictures.append(dict(attrs))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(tmp_path: Path) -> tuple[str, Pieces]:
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    pieces = Pieces()
    pieces.feed(text)
    assert pieces.open == []
    return text, pieces


def test_the_page_stands_alone_and_each_picture_has_an_alternative_text(judge, tmp_path):
    log = tmp_path / "loss.json"
    log.write_text(json.dumps([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.2}]), encoding="utf-8")
    report = judge(right(60, wrong=9), labels(), loss_log=log)
    assert [(point.step, point.loss, point.eval_loss) for point in report.loss] == [(1, 2, None), (2, 1, 1.2)]
    text, pieces = page(tmp_path)
    assert not {"script", "link", "img", "iframe"} & set(pieces.tags)
    assert not any(name in ("src", "href") or name.startswith("on") for name, _ in pieces.attributes)
    assert not [word for word in ("http", "@import", "url(") if word in text]
    assert pieces.pictures
    assert all(one["role"] == "img" and one["aria-label"] for one in pieces.pictures)
    charts = [one["aria-label"] for one in pieces.pictures if one["class"] == "chart"]
    starts = ("Confusion", "Reliability", "Risk-coverage", "Cost and quality", "Loss curve")
    assert len(charts) == 5
    assert all(chart.startswith(start) for chart, start in zip(charts, starts, strict=True))
    assert report.summary[0] in text


def test_whatever_comes_from_a_file_is_escaped(judge, tmp_path):
    evil = "<script>alert('x')</script>\"><b onclick=x>"
    gold = labels()
    gold[0]["messages"][1]["content"] = f"Task: {evil}"
    gold[1]["origin_task_id"] = evil
    jsonl.write_rows(tmp_path / "other.jsonl", right(60))
    predictions = right(60, wrong=2)
    predictions[1]["task_id"] = evil
    predictions[5]["decision"] = {**DECISIONS["chain"], "topology": evil}
    judge(predictions, gold, compare=f"{evil.replace('=', '')}={tmp_path / 'other.jsonl'}")
    text, pieces = page(tmp_path)
    assert not [word for word in ("<script", "<b onclick") if word in text]
    assert text.count("&lt;script&gt;") >= 4
    assert not any(name.startswith("on") for name, _ in pieces.attributes)


def test_a_perfect_router_on_one_row_without_probabilities_makes_a_page_too(judge, tmp_path):
    report = judge([prediction(0, "single", None)], labels(1), train=())
    assert report.accuracy.value == 1.0
    assert [system.kind for system in report.systems] == ["router", "heuristic"]
    page(tmp_path)


def test_a_router_that_never_answers_validly_makes_a_page_too(judge, tmp_path):
    report = judge([{"task_id": f"t{i}", "decision": None} for i in range(40)], labels(40))
    assert (report.valid.value, report.accuracy.value, report.macro_f1.value) == (0, 0, 0)
    assert report.step_difference is None
    page(tmp_path)


def test_settings_that_do_not_go_together_are_refused_in_one_line(judge, tmp_path):
    (tmp_path / "report").mkdir()
    for compare, words in [
        ("nofile", "--compare.*expected NAME=FILE, a file or the folder of a run, got 'nofile'"),
        (str(tmp_path / "report"), r"report holds no predictions\.jsonl"),
        ("majority=x.jsonl", "'majority' is taken"),
        ("a=x.jsonl,a=y.jsonl", "'a' is taken"),
    ]:
        with pytest.raises(SettingsError, match=words):
            judge(right(8), labels(8), compare=compare)
    with pytest.raises(SettingsError, match=r"eval\.predictions: needs"):
        evaluate(load({}, environ={}))
    with pytest.raises(SettingsError, match=r"eval\.labels: needs"):
        evaluate(load({"eval.predictions": ("--predictions", "p.jsonl")}, environ={}))


def test_unusable_input_is_refused_naming_file_and_line(judge, tmp_path):
    for rows, words in [
        ([{"decision": None}], r"predictions.jsonl:1: expected a prediction with a task_id"),
        ([prediction(0, "single"), {"task_id": "t1"}], r"predictions.jsonl:2: expected a prediction with a decision"),
        ([prediction(77, "single")], r"no row answers a judged task"),
        ([], r"no row answers a judged task"),
    ]:
        with pytest.raises(InputError, match=words):
            judge(rows, labels(8))
    with pytest.raises(InputError, match="no row of the split 'validation'"):
        judge(right(8), labels(8), split="validation")
    log = tmp_path / "loss.json"
    log.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"loss\.json: cannot be read as JSON"):
        judge(right(8), labels(8), loss_log=log)


def test_unusable_labels_are_left_out_counted_and_shown(judge):
    gold = labels()
    gold[4]["decision"] = {**DECISIONS["single"], "max_steps": 5}
    gold[4]["messages"][2]["content"] = json.dumps(gold[4]["decision"])
    report = judge(right(60), gold)
    assert (report.counts.unusable_labels, report.counts.judged) == (1, 59)
    said = next(warning for warning in report.warnings if "unusable" in warning)
    assert said.startswith("1 label is unusable and left out: ")
    assert "labels.jsonl:5: " in said
    with pytest.raises(InputError, match=r"none of the 1 labels can be used: .*labels\.jsonl:1: "):
        judge(right(60), gold[4:5], train=())


def test_a_folder_that_cannot_be_written_is_an_output_error(judge, tmp_path):
    (tmp_path / "report").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"):
        judge(right(8), labels(8))

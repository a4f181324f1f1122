"""Write a report: report.json for programs, report.html for people.

The page is one file without scripts or outside resources; whatever came from an input file is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from router_cli import jsonl
from router_cli.schema import Decision, Score
from router_cli.scoring import page, pictures, report_sides
from router_cli.scoring.results import Difference, Mistake, Report, Spending, System
from router_cli.scoring.wording import interval

_TEXT = 600


def write_report(report: Report, folder: Path) -> None:
    """Write `folder`/report.json and `folder`/report.html, each replaced whole. Raises OutputError."""
    jsonl.write_json(folder / "report.json", report)
    with jsonl.replacing(folder / "report.html") as file:
        file.write(html(report))


def html(report: Report) -> str:
    """The page."""
    parts = [
        page.header("router eval", report.summary),
        page.warnings(report.warnings),
        _figures(report),
        page.section("Against what it must beat", _systems(report), _LEGEND),
        '<div class="two">',
        page.picture("Confusion", pictures.confusion(report.confusion, report.classes), _CONFUSION),
        page.section(
            "By topology",
            _per_class(report),
            f"Coin of the router's own mix: {interval(report.coin.expected)} "
            f"agreement; shuffled answers agree as often with p {page.p(report.coin.p)}. Entropy of the mix: "
            f"{interval(report.entropy)} bits.",
        ),
        _calibration(report),
        _cost_quality(report),
        _loss(report),
        "</div>",
        _slices(report),
        _spending(report),
        _flip(report),
        report_sides.side_by_side(report),
        page.section("Mistakes", _mistakes(report.mistakes), "The surest wrong topologies first, at most 20."),
        page.section("How this was made", _made(report)),
    ]
    return page.document(f"Router evaluation: macro-F1 {report.macro_f1.value:.3f}", parts)


# -- parts ------------------------------------------------------------------------------------------------------


def _figures(report: Report) -> str:
    def card(name: str, score: Score | None, words: str) -> str:
        value = "-" if score is None else f"{score.value:.3f}"
        between = "not measured" if score is None else f"{score.low:.3f} to {score.high:.3f}"
        return (
            f"<div class='card' title='{escape(words, quote=True)}'><p class='name'>{escape(name)}</p>"
            f"<p class='value'>{value}</p><p class='between'>{between}</p></div>"
        )

    calibration, selective = report.calibration, report.selective
    cards = [
        card("accuracy", report.accuracy, "share of tasks whose topology is the labelled one"),
        card("macro-F1", report.macro_f1, "mean of the topologies' F1"),
        card("exact match", report.exact, "share of tasks whose whole decision is the labelled one"),
        card("valid", report.valid, "share of tasks with a valid decision"),
        card("role F1", report.role_f1, "overlap of the role sets, 0 without a valid decision"),
        card("roles equal", report.role_exact, "share of tasks with exactly the labelled roles"),
        card("steps equal", report.step_exact, "share of tasks with the labelled max_steps"),
        card("step difference", report.step_difference, "mean absolute difference of max_steps, valid decisions"),
        card("ECE", calibration.ece if calibration else None, "expected calibration error, 15 bins, lower is better"),
        card(
            "Brier",
            calibration.brier if calibration else None,
            "squared distance to the truth, 0 to 2, lower is better",
        ),
        card("AURC", selective.aurc if selective else None, "area under the risk-coverage curve, lower is better"),
        card(
            "ceiling", report.ceiling.agreement if report.ceiling else None, "how often the teacher agrees with itself"
        ),
    ]
    return f"<section class='cards'>{''.join(cards)}</section>"


def _systems(report: Report) -> str:
    reach = max(
        (max(abs(found.score.low), abs(found.score.high)) for one in report.systems for found in _differences(one)),
        default=1.0,
    )
    head = (
        "system",
        "macro-F1",
        "accuracy",
        "router minus it, macro-F1",
        "router minus it, accuracy",
        "exact",
        "ECE",
        "Brier",
    )
    rows = []
    for one in report.systems:
        tone = "accent" if one.kind == "router" else "muted"
        note = f"<span class='note'>{escape(one.note)}</span>" if one.note else ""
        rows.append(
            f"<tr class='{one.kind}'><th scope='row'>{escape(one.name)}{note}</th>"
            f"<td>{pictures.interval_bar(one.macro_f1, 0, 1, tone)}{page.score(one.macro_f1)}</td>"
            f"<td>{pictures.interval_bar(one.accuracy, 0, 1, tone)}{page.score(one.accuracy)}</td>"
            f"<td>{page.difference(one.macro_f1_difference, reach or 1.0)}</td>"
            f"<td>{page.difference(one.accuracy_difference, reach or 1.0)}</td>"
            f"<td>{page.stacked(one.exact)}</td><td>{page.stacked(one.ece)}</td><td>{page.stacked(one.brier)}</td></tr>"
        )
    return page.table(head, rows)


def _differences(system: System) -> Iterable[Difference]:
    return (found for found in (system.macro_f1_difference, system.accuracy_difference) if found is not None)


def _per_class(report: Report) -> str:
    rows = [
        f"<tr><th scope='row'>{escape(row.name)}</th><td class='n'>{page.score(row.precision)}</td>"
        f"<td class='n'>{page.score(row.recall)}</td><td class='n'>{page.score(row.f1)}</td>"
        f"<td class='n'>{row.support}</td><td class='n'>{row.predicted}</td></tr>"
        for row in report.per_class
    ]
    return page.table(("topology", "precision", "recall", "F1", "labels", "predictions"), rows)


def _calibration(report: Report) -> str:
    if report.calibration is None or report.selective is None:
        return page.section("Calibration", "", "The predictions name no probability: there is nothing to calibrate.")
    found = report.calibration
    return page.picture(
        "Reliability",
        pictures.reliability(found),
        f"ECE {interval(found.ece)} over {found.n} tasks; a perfectly calibrated router with these confidences shows "
        f"{found.ece_when_calibrated:.3f} on so few. On the dashed line, confidence is what it says.",
    ) + page.picture(
        "Risk and coverage",
        pictures.risk_coverage(report.selective),
        f"AURC {interval(report.selective.aurc)}. Errors left when only the surest share of the tasks is answered; "
        "the dashed line is a confidence that says nothing.",
    )


def _cost_quality(report: Report) -> str:
    if not report.cost_quality:
        return ""
    free = [(one.name, one.accuracy.value) for one in report.systems if one.name in ("majority", "heuristic")]
    own = "always" if report.ceiling is None else f"with {report.ceiling.agreement.value:.3f} of"
    return page.picture(
        "Cost and quality",
        pictures.cost_quality(report.cost_quality, free),
        "The least sure tasks are handed to the teacher, who agrees "
        f"{own} its labels; the dashed line hands over tasks at random.",
    )


def _loss(report: Report) -> str:
    return page.picture("Loss while training", pictures.loss_curve(report.loss)) if report.loss else ""


def _slices(report: Report) -> str:
    if not report.slices:
        return ""
    differences = [one.over_baseline.score for one in report.slices if one.over_baseline]
    reach = max((max(abs(one.low), abs(one.high)) for one in differences), default=1.0) or 1.0
    rows = [
        f"<tr><th scope='row'>{escape(one.name)}<span class='note'>{one.kind}</span></th><td class='n'>{one.n}</td>"
        f"<td>{pictures.interval_bar(one.accuracy, 0, 1)}{page.score(one.accuracy)}</td>"
        f"<td>{page.difference(one.over_baseline, reach)}</td></tr>"
        for one in report.slices
    ]
    words = "The best baseline is the one most accurate on all tasks. Of many slices, one in twenty errs by chance."
    return page.section(
        "By part of the tasks",
        page.table(("tasks", "number", "accuracy", "router minus the best baseline, accuracy"), rows),
        words,
    )


def _spending(report: Report) -> str:
    kinds: list[tuple[str, Spending | None]] = [("router", report.spending)]
    kinds += [(side.name, side.spending) for side in report.sides]
    kinds.append(("teacher's label", report.teacher_spending))
    rows = [
        f"<tr><th scope='row'>{escape(name)}</th><td class='n'>{one.n}</td>"
        f"<td class='n'>{_amount(one.median_milliseconds)}</td><td class='n'>{_amount(one.p95_milliseconds)}</td>"
        f"<td class='n'>{_mean(one.prompt_tokens)}</td><td class='n'>{_mean(one.completion_tokens)}</td>"
        f"<td class='n'>{'-' if one.dollars is None else f'{one.dollars.value:.6f}'}</td></tr>"
        for name, one in kinds
        if one is not None
    ]
    if not rows:
        return ""
    head = ("answer of", "tasks", "ms, median", "ms, 95 % within", "prompt tokens", "answer tokens", "dollars")
    words = "Means a task, but for the times. Dollars are what an endpoint took: one's own machine has no price here."
    return page.section("What an answer takes", page.table(head, rows), words)


def _amount(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _mean(score: Score | None) -> str:
    return "-" if score is None else f"{score.value:,.1f}"


def _flip(report: Report) -> str:
    if report.flip is None:
        return ""
    rows = [
        f"<tr><th scope='row'>{escape(one.name)}<span class='note'>{escape(one.what)}</span></th>"
        f"<td>{pictures.interval_bar(one.topology, 0, 1)}{page.score(one.topology)}</td>"
        f"<td>{pictures.interval_bar(one.decision, 0, 1)}{page.score(one.decision)}</td></tr>"
        for one in report.flip.changed
    ]
    head = ("asked otherwise", "topology changes", "decision changes")
    words = f"The share of decisions about {report.flip.tasks} tasks that change though the task does not."
    return page.section("Flip test", page.table(head, rows), words)


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    if not mistakes:
        return "<p class='words'>None.</p>"
    rows = []
    for one in mistakes:
        text = one.text if len(one.text) <= _TEXT else one.text[:_TEXT] + " …"
        predicted = _decision(one.predicted) if one.predicted else f"<em>{escape(one.why)}</em>"
        rows.append(
            f"<tr><th scope='row' class='id'>{escape(one.task_id)}</th><td class='task'>{escape(text)}</td>"
            f"<td>{_decision(one.gold)}</td><td>{predicted}</td><td class='n'>{page.plain(one.probability)}</td></tr>"
        )
    return page.table(("task", "text", "label", "prediction", "probability"), rows)


def _decision(decision: Decision) -> str:
    return (
        f"<b>{escape(decision.topology)}</b><span class='note'>{escape(', '.join(decision.roles))}; "
        f"{decision.max_steps} step{'s' if decision.max_steps > 1 else ''}</span>"
    )


def _made(report: Report) -> str:
    facts = {
        "predictions": report.predictions,
        "labels": ", ".join(report.labels),
        "rows judged": f"{report.counts.judged} (split: {report.split})",
        "label teachers": ", ".join(f"{name} {count}" for name, count in report.label_teachers.items())
        or "not recorded",
        "resamples, seed": f"{report.resamples}, {report.seed}",
        "made with": report.made_with,
        **{name.replace("_", " "): str(count) for name, count in report.counts if name != "judged"},
    }
    return page.listed(facts, report.notes)


_LEGEND = (
    "Dots are values, lines 95 % intervals. The differences are paired: right of the middle line the router is better."
)
_CONFUSION = "Rows are labels, columns predictions, shades the share of the row."

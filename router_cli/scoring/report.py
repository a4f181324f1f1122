"""Write a report: report.json for programs, report.html for people.

The page is one file without scripts or outside resources; whatever came from an input file is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from router_cli import jsonl
from router_cli.schema import Decision, Score
from router_cli.scoring import pictures
from router_cli.scoring.results import Difference, Mistake, Report, System
from router_cli.scoring.wording import interval

_TONES = {"better": "good", "worse": "bad", "cannot tell": "muted"}
_TEXT = 600


def write_report(report: Report, folder: Path) -> None:
    """Write `folder`/report.json and `folder`/report.html, each replaced whole. Raises OutputError."""
    jsonl.write_json(folder / "report.json", report)
    with jsonl.replacing(folder / "report.html") as file:
        file.write(html(report))


def html(report: Report) -> str:
    """The page."""
    parts = [
        f"<header><p class='over'>router eval</p><h1>{escape(report.summary[0])}</h1>"
        f"<p class='lead'>{escape(report.summary[1])}</p></header>",
        _warnings(report),
        _figures(report),
        _section("Against what it must beat", _systems(report), _LEGEND),
        '<div class="two">',
        _section("Confusion", f"<figure>{pictures.confusion(report.confusion, report.classes)}</figure>", _CONFUSION),
        _section(
            "By topology",
            _per_class(report),
            f"Coin of the router's own mix: {report.coin.expected:.3f} "
            f"agreement; shuffled answers agree as often with p {_p(report.coin.p)}.",
        ),
        _calibration(report),
        _loss(report),
        "</div>",
        _section("Mistakes", _mistakes(report.mistakes), "The surest wrong topologies first, at most 20."),
        _section("How this was made", _made(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Router evaluation: macro-F1 {report.macro_f1.value:.3f}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


# -- parts ------------------------------------------------------------------------------------------------------


def _section(title: str, body: str, words: str = "") -> str:
    said = f"<p class='words'>{escape(words)}</p>" if words else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    return f"<section class='warnings'><h2>Read with care</h2><ul>{items}</ul></section>"


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
        card("ceiling", report.ceiling, "how often the teacher's votes agree with its own labels"),
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
            f"<td>{pictures.interval_bar(one.macro_f1, 0, 1, tone)}{_score(one.macro_f1)}</td>"
            f"<td>{pictures.interval_bar(one.accuracy, 0, 1, tone)}{_score(one.accuracy)}</td>"
            f"<td>{_difference(one.macro_f1_difference, reach or 1.0)}</td>"
            f"<td>{_difference(one.accuracy_difference, reach or 1.0)}</td>"
            f"<td class='n'>{_plain(one.exact.value if one.exact else None)}</td>"
            f"<td class='n'>{_plain(one.ece)}</td><td class='n'>{_plain(one.brier)}</td></tr>"
        )
    return _table(head, rows)


def _differences(system: System) -> Iterable[Difference]:
    return (found for found in (system.macro_f1_difference, system.accuracy_difference) if found is not None)


def _difference(found: Difference | None, reach: float) -> str:
    if found is None:
        return ""
    tone, score = _TONES[found.verdict], found.score
    return (
        f"{pictures.interval_bar(score, -reach, reach, tone, zero=True)}<span class='figures'>{score.value:+.3f} "
        f"<small>{score.low:+.3f} to {score.high:+.3f}</small></span>"
        f"<span class='verdict {tone}'>{escape(found.words)}</span>"
    )


def _per_class(report: Report) -> str:
    rows = [
        f"<tr><th scope='row'>{escape(row.name)}</th><td class='n'>{_plain(row.precision)}</td>"
        f"<td class='n'>{_plain(row.recall)}</td><td class='n'>{_plain(row.f1)}</td>"
        f"<td class='n'>{row.support}</td><td class='n'>{row.predicted}</td></tr>"
        for row in report.per_class
    ]
    return _table(("topology", "precision", "recall", "F1", "labels", "predictions"), rows)


def _calibration(report: Report) -> str:
    if report.calibration is None or report.selective is None:
        return _section("Calibration", "", "The predictions name no probability: there is nothing to calibrate.")
    found = report.calibration
    return _section(
        "Reliability",
        f"<figure>{pictures.reliability(found)}</figure>",
        f"ECE {interval(found.ece)} over {found.n} tasks; a perfectly calibrated router with these confidences shows "
        f"{found.ece_when_calibrated:.3f} on so few. On the dashed line, confidence is what it says.",
    ) + _section(
        "Risk and coverage",
        f"<figure>{pictures.risk_coverage(report.selective)}</figure>",
        f"AURC {interval(report.selective.aurc)}. Errors left when only the surest share of the tasks is answered; "
        "the dashed line is a confidence that says nothing.",
    )


def _loss(report: Report) -> str:
    if not report.loss:
        return ""
    return _section("Loss while training", f"<figure>{pictures.loss_curve(report.loss)}</figure>")


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    if not mistakes:
        return "<p class='words'>None.</p>"
    rows = []
    for one in mistakes:
        text = one.text if len(one.text) <= _TEXT else one.text[:_TEXT] + " …"
        predicted = _decision(one.predicted) if one.predicted else f"<em>{escape(one.why)}</em>"
        rows.append(
            f"<tr><th scope='row' class='id'>{escape(one.task_id)}</th><td class='task'>{escape(text)}</td>"
            f"<td>{_decision(one.gold)}</td><td>{predicted}</td><td class='n'>{_plain(one.probability)}</td></tr>"
        )
    return _table(("task", "text", "label", "prediction", "probability"), rows)


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
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    said = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f"<ul class='words'>{said}</ul><dl>{listed}</dl>"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    names = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    return f"<div class='scroll'><table><thead><tr>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _score(score: Score) -> str:
    return f"<span class='figures'>{score.value:.3f} <small>{score.low:.3f} to {score.high:.3f}</small></span>"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


_LEGEND = (
    "Dots are values, lines 95 % intervals. The differences are paired: right of the middle line the router is better."
)
_CONFUSION = "Rows are labels, columns predictions, shades the share of the row."

_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1c2330;--soft:#5b6577;--line:#e2e6ec;--axis:#98a2b3;
--accent:#3059c9;--good:#14804a;--bad:#c0362c;--muted:#7a8496;--care:#fff6e0;--careline:#e6b84a}
@media(prefers-color-scheme:dark){:root{--page:#12151b;--card:#1a1f28;--ink:#e6e9ef;--soft:#a0a9b8;--line:#2c3340;
--axis:#667085;--accent:#84a4ff;--good:#5fcf95;--bad:#ff8a7d;--muted:#8f99aa;--care:#2c2616;--careline:#8a6d22}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","Noto Sans CJK SC",sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 20px 64px}
header{margin-bottom:24px}.over{margin:0;color:var(--soft);font-size:13px;letter-spacing:.06em;text-transform:uppercase}
h1{font-size:25px;line-height:1.3;margin:4px 0 8px;font-weight:650;max-width:46em}
h2{font-size:17px;margin:0 0 6px;font-weight:650}
.lead{font-size:17px;margin:0;max-width:60em}.words{color:var(--soft);margin:0 0 12px;font-size:14px}
ul.words{padding-left:18px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-bottom:18px}
.warnings{background:var(--care);border-color:var(--careline)}.warnings ul{margin:0;padding-left:20px}
.cards{display:grid;grid-template-columns:repeat(6,1fr);gap:1px;padding:0;overflow:hidden;
background:var(--line)}
.card{background:var(--card);padding:12px 16px}.card p{margin:0}
.card .name,.card .between{color:var(--soft);font-size:13px}
.card .value{font-size:24px;font-weight:650;font-variant-numeric:tabular-nums}
@media(max-width:900px){.cards{grid-template-columns:repeat(3,1fr)}}
@media(max-width:480px){.cards{grid-template-columns:repeat(2,1fr)}}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:0 18px}
.two>section:last-child:nth-child(odd){grid-column:1/-1}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:7px 10px;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;color:var(--soft);font-weight:550;font-size:13px;white-space:nowrap}
tbody th{font-weight:600}tr.router>*{background:color-mix(in srgb,var(--accent) 9%,transparent)}
td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
.note,.verdict,.figures{display:block;font-size:12.5px}.note{color:var(--soft);font-weight:400;max-width:22em}
.figures{font-variant-numeric:tabular-nums;white-space:nowrap}small{color:var(--soft);font-size:12px}
.verdict{font-weight:600}.verdict.good{color:var(--good)}.verdict.bad{color:var(--bad)}.verdict.muted{color:var(--muted)}
td.task{min-width:22em;white-space:pre-wrap;overflow-wrap:anywhere}th.id{overflow-wrap:anywhere;min-width:6em;max-width:11em}
figure{margin:0}svg.chart{width:100%;height:auto;max-width:520px;display:block;margin:0 auto}svg.bar{display:block}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}svg .label{fill:var(--ink)}
svg .grid{stroke:var(--line)}svg .axis{stroke:var(--axis)}svg .dashed{stroke-dasharray:5 4}
svg line.accent,svg .line.accent{stroke:var(--accent)}svg line.good,svg .line.good{stroke:var(--good)}
svg line.bad{stroke:var(--bad)}svg line.muted{stroke:var(--muted)}
svg .thick{stroke-width:3;stroke-linecap:round;opacity:.55}svg .soft{stroke-width:2;opacity:.45}
svg .line{fill:none;stroke-width:2.25;stroke-linejoin:round}
svg .dot.accent{fill:var(--accent)}svg .dot.good{fill:var(--good)}svg .dot.bad{fill:var(--bad)}
svg .dot.muted{fill:var(--muted)}
svg .cell{fill:var(--page)}svg .right{fill:var(--accent)}svg .wrong{fill:var(--bad)}
svg .count{fill:var(--ink);font-size:14px;font-weight:600}svg .count.on{fill:var(--card)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0;font-size:14px}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
@media print{body{background:#fff}section{break-inside:avoid}}
"""

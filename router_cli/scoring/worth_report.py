"""Write a replay's report: report.json for programs, report.html for people, in the style of `scoring.report`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from router_cli import jsonl
from router_cli.schema import Score
from router_cli.scoring import page, pictures, routing, worth_words
from router_cli.scoring.worth_results import PolicyRow, Replayed, Solving, WorthReport

_TONES = {"router": "accent", "compare": "accent", "oracle": "good"}


def write_report(found: WorthReport, folder: Path) -> None:
    """Write `folder`/report.json and `folder`/report.html, each replaced whole. Raises OutputError."""
    jsonl.write_json(folder / "report.json", found)
    with jsonl.replacing(folder / "report.html") as file:
        file.write(html(found))


def html(found: WorthReport) -> str:
    """The page."""
    parts = []
    for one in found.tables:
        parts.append(page.header("router eval: worth", one.summary))
        parts.append(page.warnings(one.warnings))
        parts.append(page.section("Policies", _policies(one), _LEGEND))
        parts.append('<div class="two">')
        if (picture := cost_quality(one)) is not None:
            parts.append(page.section("Cost and quality", f"<figure>{picture}</figure>", _PICTURE))
        parts.append(page.section("Metrics of the field", _metrics(one)))
        if one.solving is not None:
            picture = pictures.reliability(one.solving.calibration, "said P(solved)", "solved")
            parts.append(page.picture("How likely a topology solves", picture, _SOLVING))
            parts.append(page.section("What each topology solves", _solving(one.solving)))
        parts.append("</div>")
        said = "".join(f"<li>{escape(note)}</li>" for note in one.notes)
        parts.append(page.section("How to read it", f"<ul class='words'>{said}</ul>"))
    parts.append(page.section("How this was made", _made(found)))
    title = ", ".join(one.name for one in found.tables)
    return page.document(f"Router worth: {title}", parts)


def cost_quality(found: Replayed) -> str | None:
    """Every policy by its cost a task (dollars, else tokens) and solved share; the dashed line is what coins between
    fixed topologies reach, the full one the router's probabilities. None where costs are unknown."""
    places = [(row, _cost(found, row)) for row in found.policies]
    known = [(row, cost) for row, cost in places if cost is not None]
    if found.unit == "rank" or len({cost for _, cost in known}) < 2:
        return None
    solved = [value for row, _ in known for value in (row.solved.low, row.solved.high)]
    top = max([cost for _, cost in known] + [point.price for point in found.curve]) * 1.08
    low, high = max(0.0, min(solved) - 0.02), min(1.0, max(solved) + 0.02)
    unit = "US dollars a task" if found.unit == "USD" else "tokens a task"
    body, x, y = pictures._axes(0, top, low, high, unit, "solved")
    edge = routing.hull([(cost, row.solved.value) for row, cost in known if row.kind == "fixed"])
    line = " ".join(f"{x(cost)},{y(quality)}" for cost, quality in edge)
    body.append(f'<polyline class="axis dashed" fill="none" points="{line}"/>')
    if found.curve:
        shown = [
            (x(point.price), y(max(low, point.solved.low)), y(min(high, point.solved.high))) for point in found.curve
        ]
        body.append(pictures._band(shown, "accent"))
        body.append(pictures._line([(x(point.price), y(point.solved.value)) for point in found.curve], "accent"))
    for row, cost in known:
        tone, at, far = _TONES.get(row.kind, "muted"), x(cost), cost > 0.7 * top
        # Coins lie on the dashed line, where their names would only be in the way.
        name = "" if row.kind == "random" else escape(row.name)
        body.append(
            f'<line class="{tone} soft" x1="{at}" y1="{y(row.solved.low)}" x2="{at}" y2="{y(row.solved.high)}"/>'
            f'<circle class="{tone} dot" cx="{at}" cy="{y(row.solved.value)}" r="4"/>'
            f'<text class="tick" x="{at + (-7 if far else 7)}" y="{y(row.solved.value) - 5}" '
            f'text-anchor="{"end" if far else "start"}">{name}</text>'
        )
    words = "; ".join(f"{row.name} {row.solved.value:.3f} at {cost:.4g}" for row, cost in known)
    return pictures._svg(pictures._WIDTH, pictures._HEIGHT, f"Solved share by {unit}: {words}", "".join(body))


def _cost(found: Replayed, row: PolicyRow) -> float | None:
    score = row.dollars if found.unit == "USD" else row.tokens
    return None if score is None else score.value


def _policies(found: Replayed) -> str:
    differences = [row.solved_difference.score for row in found.policies if row.solved_difference is not None]
    reach = max((max(abs(one.low), abs(one.high)) for one in differences), default=1.0) or 1.0
    billed = any(row.bill is not None for row in found.policies)
    head = ["policy", "solved", "first row minus it", "dollars a task", "tokens a task", "first row minus it, dollars"]
    rows = []
    for row in found.policies:
        name = f"<th scope='row' style='min-width:12em'>{escape(row.name)}"
        tone = "accent" if row.kind == "router" else "muted"
        detail = "; ".join(part for part in (worth_words.mix(row), row.note) if part)
        test = f"<span class='note'>McNemar p {page.p(row.mcnemar)}</span>" if row.mcnemar is not None else ""
        rows.append(
            f"<tr class='{row.kind}'>{name}<span class='note'>{escape(detail)}</span></th>"
            f"<td>{pictures.interval_bar(row.solved, 0, 1, tone)}{page.score(row.solved)}</td>"
            f"<td>{page.difference(row.solved_difference, reach)}{test}</td>"
            f"<td>{_amount(row.dollars, True)}</td><td>{_amount(row.tokens, False)}</td>"
            f"<td>{_amount(row.dollars_difference, True)}</td>"
            + (f"<td>{_amount(row.bill, True)}</td>" if billed else "")
            + "</tr>"
        )
    return page.table([*head, "bill a task"] if billed else head, rows)


def _amount(score: Score | None, dollars: bool) -> str:
    if score is None:
        return "-"

    def shown(value: float) -> str:
        return f"{value:.4f}" if dollars else f"{value:,.0f}"

    return (
        f"<span class='figures'>{shown(score.value)}<br><small>{shown(score.low)} to {shown(score.high)}</small></span>"
    )


def _metrics(found: Replayed) -> str:
    one = found.metrics
    if one is None:
        return "<p class='words'>No router was judged.</p>"

    facts: Sequence[tuple[str, Score | None, str]] = (
        ("PGR", one.pgr, f"of the gap from {one.weak} to {one.strong}, this share is recovered"),
        ("APGR", one.apgr, "the same, averaged over all shares of calls; a coin has 0.5"),
        ("CPT(50)", one.cpt_50, f"share of calls to {one.strong} that recovers half the gap; a coin needs 0.5"),
        ("CPT(80)", one.cpt_80, "share that recovers four fifths; a coin needs 0.8"),
        ("AIQ", one.aiq, "mean solved share under the convex hull, over all costs"),
        ("AIQ, fixed", one.aiq_fixed, "the same without the router"),
        ("Opt.Sel", one.opt_sel, "of the tasks that can be solved, those given the cheapest topology that does"),
        ("Opt.Cost", one.opt_cost, "mean ratio of that topology's cost to the chosen one's"),
        ("Opt.Acc", one.opt_acc, "solved tasks over those that any topology solves"),
    )
    rows = [
        f"<tr><th scope='row'>{escape(name)}</th><td class='n'>{page.score(score)}</td>"
        f"<td class='words'>{escape(words)}</td></tr>"
        for name, score, words in facts
    ]
    return page.table(("metric", "value", ""), rows)


def _solving(found: Solving) -> str:
    rows = [
        f"<tr><th scope='row'>{escape(row.name)}</th><td class='n'>{row.said:.3f}</td>"
        f"<td class='n'>{page.score(row.solved)}</td><td class='n'>{row.solved.n:,}</td></tr>"
        for row in found.topologies
    ]
    return page.table(("topology", "said", "solved", "runs"), rows)


def _made(found: WorthReport) -> str:
    facts = {
        "outcomes": found.outcomes,
        "predictions": found.predictions or "none",
        "teacher's labels": ", ".join(found.labels) or "none",
        "split": found.split,
        "unsolved penalty": "none" if found.unsolved_penalty is None else f"${found.unsolved_penalty:g}",
        "resamples, seed": f"{found.resamples}, {found.seed}",
        "made with": found.made_with,
    }
    return page.listed(facts, found.notes)


_LEGEND = (
    "Dots are values, lines 95 % intervals by task. Differences are paired: right of the middle line the first row "
    "solves more. A cascade's shares sum to more than 100 %, because it pays for both runs."
)
_SOLVING = (
    "What the router says a topology solves, and what its runs did; on the dashed line it is as it says. Judged on all "
    "recorded runs, whichever topology the router chose."
)
_PICTURE = "Up is better, left is cheaper. Between the fixed topologies a coin reaches the dashed line."

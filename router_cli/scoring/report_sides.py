"""Compared routers side by side: the same figures and the same pictures for each."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from router_cli.schema import Score
from router_cli.scoring import page, pictures, wording
from router_cli.scoring.results import Own, Report

_ROWS: tuple[tuple[str, Callable[[Own], Score | None]], ...] = (
    ("valid", lambda one: one.valid),
    ("accuracy", lambda one: one.accuracy),
    ("macro-F1", lambda one: one.macro_f1),
    ("exact match", lambda one: one.exact),
    ("role F1", lambda one: one.role_f1),
    ("roles equal", lambda one: one.role_exact),
    ("steps equal", lambda one: one.step_exact),
    ("step difference", lambda one: one.step_difference),
    ("ECE", lambda one: one.calibration.ece if one.calibration else None),
    ("Brier", lambda one: one.calibration.brier if one.calibration else None),
    ("AURC", lambda one: one.selective.aurc if one.selective else None),
)


def side_by_side(report: Report) -> str:
    """The section; nothing where no other router is compared."""
    if not report.sides:
        return ""
    every: list[tuple[str, Own]] = [(report.systems[0].name, report), *((side.name, side) for side in report.sides)]
    rows = [
        f"<tr><th scope='row'>{name}</th>" + "".join(f"<td>{page.score(of(one))}</td>" for _, one in every) + "</tr>"
        for name, of in _ROWS
    ]
    rows += [
        f"<tr><th scope='row'>F1, {escape(topology)}</th>"
        + "".join(f"<td class='n'>{page.score(one.per_class[place].f1)}</td>" for _, one in every)
        + "</tr>"
        for place, topology in enumerate(report.classes)
    ]
    said = "".join(f"<li>{escape(wording.versus(side))}</li>" for side in report.sides)
    table = page.table(("", *(name for name, _ in every)), rows)
    pictured = "".join(
        page.picture(f"Confusion: {name}", pictures.confusion(one.confusion, report.classes)) for name, one in every
    )
    pictured += "".join(
        page.picture(f"Reliability: {name}", pictures.reliability(one.calibration))
        for name, one in every
        if one.calibration
    )
    curves = [(name, one.selective) for name, one in every if one.selective]
    if len(curves) > 1:
        (name, first), *others = curves
        pictured += page.picture("Risk and coverage, compared", pictures.risk_coverage(first, others, name))
    pictured += "".join(
        page.picture(f"Loss while training: {side.name}", pictures.loss_curve(side.loss))
        for side in report.sides
        if side.loss
    )
    return page.section("Side by side", f"<ul class='words'>{said}</ul>{table}") + f'<div class="two">{pictured}</div>'

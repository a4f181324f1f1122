"""The report's pictures as inline SVG. Colours are the page's CSS classes, so that they follow light and dark.

Six charts of lines, dots and boxes need no plotting library, and text stays text. The curves of a training are a PNG,
which model cards show everywhere: those are matplotlib's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from router_cli.schema import Score
from router_cli.scoring.results import Calibration, CostPoint, LossPoint, SelectiveRisk

_WIDTH, _HEIGHT = 460, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 14, 44

_TONES = ("accent", "good", "bad", "muted")

Scale = Callable[[float], float]


def interval_bar(score: Score, low: float, high: float, tone: str = "accent", zero: bool = False) -> str:
    """A small bar for a table cell: the interval as a line, the value as a dot, on an axis from `low` to `high`."""
    width, height = 132, 18

    def x(value: float) -> float:
        return round(6 + (min(max(value, low), high) - low) / (high - low) * (width - 12), 1)

    rule = f'<line class="axis" x1="{x(0)}" y1="1" x2="{x(0)}" y2="{height - 1}"/>' if zero else ""
    body = (
        f'<line class="grid" x1="6" y1="9" x2="{width - 6}" y2="9"/>{rule}'
        f'<line class="{tone} thick" x1="{x(score.low)}" y1="9" x2="{x(score.high)}" y2="9"/>'
        f'<circle class="{tone} dot" cx="{x(score.value)}" cy="9" r="4"/>'
    )
    return _svg(width, height, f"{score.value:.3f}, interval {score.low:.3f} to {score.high:.3f}", body, "bar")


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Gold (rows) by prediction (columns), shaded by the share of the row; the last column only where it is needed."""
    columns = [*classes, "none valid"]
    if not any(row[-1] for row in matrix):
        columns.pop()
    left, top, cell = 104, 44, 84 if len(columns) < 5 else 82
    width, height = left + cell * len(columns) + 4, top + cell * len(classes) + 4
    body = [f'<text class="label" x="{left + cell * len(columns) / 2}" y="13" text-anchor="middle">prediction</text>']
    for j, name in enumerate(columns):
        body.append(
            f'<text class="tick" x="{left + cell * (j + 0.5)}" y="{top - 8}" text-anchor="middle">{escape(name)}</text>'
        )
    for i, name in enumerate(classes):
        middle = top + cell * (i + 0.5)
        body.append(f'<text class="tick" x="{left - 8}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>')
        for j in range(len(columns)):
            share = matrix[i][j] / max(1, sum(matrix[i]))
            tone = "right" if i == j else "wrong"
            box = f'x="{left + cell * j + 1}" y="{top + cell * i + 1}" width="{cell - 2}" height="{cell - 2}" rx="4"'
            body.append(
                f'<rect class="cell" {box}/><rect class="{tone}" {box} fill-opacity="{share:.3f}"/>'
                f'<text class="count{" on" if share > 0.55 else ""}" x="{left + cell * (j + 0.5)}" '
                f'y="{middle + 5}" text-anchor="middle">{matrix[i][j]}</text>'
            )
    words = "; ".join(
        f"{name}: " + ", ".join(f"{matrix[i][j]} {column}" for j, column in enumerate(columns))
        for i, name in enumerate(classes)
    )
    return _svg(width, height, f"Confusion matrix, labels by predictions. {words}", "".join(body))


def reliability(calibration: Calibration, said: str = "confidence", done: str = "accuracy") -> str:
    """Accuracy by mean confidence of each bin with its Wilson interval; dots grow with the bin's rows."""
    body, x, y = _axes(0, 1, 0, 1, said, done)
    body.append(f'<line class="axis dashed" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    most = max(one.count for one in calibration.bins)
    for one in calibration.bins:
        at = x(one.confidence)
        body.append(
            f'<line class="accent soft" x1="{at}" y1="{y(one.accuracy.low)}" x2="{at}" y2="{y(one.accuracy.high)}"/>'
            f'<circle class="accent dot" cx="{at}" cy="{y(one.accuracy.value)}" '
            f'r="{3 + 5 * math.sqrt(one.count / most):.1f}"/>'
        )
    words = ", ".join(f"{one.confidence:.2f} right {one.accuracy.value:.2f} of {one.count}" for one in calibration.bins)
    return _svg(_WIDTH, _HEIGHT, f"Reliability diagram: {done} by {said}. {words}", "".join(body))


def risk_coverage(selective: SelectiveRisk, others: Sequence[tuple[str, SelectiveRisk]] = (), name: str = "") -> str:
    """Share of errors among the answered tasks by the share answered, from the surest on; one line a system."""
    error = selective.curve[-1].risk.value
    every = [(name, selective), *others]
    # The intervals of the surest few reach far up: they may leave the picture.
    top = min(1.0, max(0.05, 2 * error, *(point.risk.value for _, one in every for point in one.curve)))
    body, x, y = _axes(0, 1, 0, top, "coverage", "risk (error share)")
    body.append(f'<line class="axis dashed" x1="{x(0)}" y1="{y(error)}" x2="{x(1)}" y2="{y(error)}"/>')
    for place, (_, one) in enumerate(every):
        tone = _TONES[place % len(_TONES)]
        if len(every) == 1:  # several bands would hide each other
            body.append(
                _band(
                    [
                        (x(point.coverage), y(min(top, point.risk.low)), y(min(top, point.risk.high)))
                        for point in one.curve
                    ],
                    tone,
                )
            )
        body.append(_line([(x(point.coverage), y(point.risk.value)) for point in one.curve], tone))
    if others:
        body += _legend([one for one, _ in every])
    half = min(selective.curve, key=lambda point: abs(point.coverage - 0.5))
    words = f"all tasks {error:.2f} errors, the surest {half.coverage:.0%} {half.risk.value:.2f} errors"
    return _svg(_WIDTH, _HEIGHT, f"Risk-coverage curve: {words}", "".join(body))


def cost_quality(points: Sequence[CostPoint], free: Sequence[tuple[str, float]]) -> str:
    """Agreement with the labels by what is handed to the teacher, the least sure first; `free` are (name, agreement)
    of systems that cost nothing. The dashed line hands over at random."""
    priced = all(point.dollars is not None for point in points)
    cost = [point.dollars or 0.0 if priced else point.asked for point in points]
    bottom = max(0.0, min([point.agreement.low for point in points] + [value for _, value in free]) - 0.03)
    unit = "US dollars a task for the teacher" if priced else "share of the tasks that the teacher gets"
    right = max(cost) or 1.0
    body, x, y = _axes(0, right, bottom, 1, unit, "agreement")
    first, last = points[0], points[-1]
    body.append(
        f'<line class="axis dashed" x1="{x(cost[0])}" y1="{y(first.agreement.value)}" x2="{x(cost[-1])}" '
        f'y2="{y(last.agreement.value)}"/>'
    )
    shown = [(x(at), y(point.agreement.value)) for at, point in zip(cost, points, strict=True)]
    every = zip(cost, points, strict=True)
    body.append(_band([(x(at), y(point.agreement.low), y(point.agreement.high)) for at, point in every], "accent"))
    body.append(_line(shown, "accent"))
    dots = [("router", "accent", shown[0], "start"), ("teacher", "good", shown[-1], "end")]
    dots += [(name, "muted", (x(0), y(value)), "start") for name, value in free]
    for name, tone, (at, up), anchor in dots:
        body.append(
            f'<circle class="{tone} dot" cx="{at}" cy="{up}" r="4"/><text class="tick" '
            f'x="{at + (7 if anchor == "start" else -7)}" y="{up + 15}" text-anchor="{anchor}">{escape(name)}</text>'
        )
    half = min(zip(cost, points, strict=True), key=lambda one: abs(one[1].asked - 0.5))
    words = (
        f"router alone {first.agreement.value:.2f}, with the teacher on {half[1].asked:.0%} "
        f"{half[1].agreement.value:.2f}"
    )
    return _svg(_WIDTH, _HEIGHT, f"Cost and quality: {words}", "".join(body))


def loss_curve(points: Sequence[LossPoint]) -> str:
    """Training and held-out loss by step."""
    series = [
        ("training", "accent", [(point.step, point.loss) for point in points if point.loss is not None]),
        ("held out", "good", [(point.step, point.eval_loss) for point in points if point.eval_loss is not None]),
    ]
    drawn = [one for one in series if one[2]]
    steps = [step for _, _, found in drawn for step, _ in found]
    losses = [loss for _, _, found in drawn for _, loss in found]
    body, x, y = _axes(min(0, *steps), max(*steps, min(steps) + 1), min(0, *losses), max(*losses, 1e-3), "step", "loss")
    for _, tone, found in drawn:
        shown = [(x(step), y(loss)) for step, loss in found]
        body.append(_line(shown, tone))
        body += [f'<circle class="{tone} dot" cx="{at}" cy="{up}" r="2.5"/>' for at, up in shown if len(shown) < 40]
    body += _legend([name for name, _, _ in drawn], [tone for _, tone, _ in drawn])
    words = "; ".join(f"{name} from {found[0][1]:.3f} to {found[-1][1]:.3f}" for name, _, found in drawn)
    return _svg(_WIDTH, _HEIGHT, f"Loss curve: {words}", "".join(body))


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], across: str) -> bytes:
    """Lines by name in one panel each, side by side, as a PNG; a panel or line without points is left out."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = {name: {one: points for one, points in lines.items() if points} for name, lines in panels.items()}
    drawn = {name: lines for name, lines in drawn.items() if lines}
    figure = Figure(figsize=(4.8 * max(1, len(drawn)), 3.4), dpi=144, layout="constrained")
    for place, (name, lines) in enumerate(drawn.items()):
        axes = figure.add_subplot(1, len(drawn), place + 1)
        for one, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=one, marker="o" if len(points) < 40 else None, markersize=3)
        axes.set(xlabel=across, ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    file = io.BytesIO()
    FigureCanvasAgg(figure)  # no display, whatever the environment says
    figure.savefig(file, format="png")
    return file.getvalue()


def _svg(width: float, height: float, alt: str, body: str, kind: str = "chart") -> str:
    return (
        f'<svg class="{kind}" role="img" aria-label="{escape(alt)}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}"><title>{escape(alt)}</title>{body}</svg>'
    )


def _legend(names: Sequence[str], tones: Sequence[str] | None = None) -> list[str]:
    """Names of lines, in the corner on the upper right; long names are cut."""
    at = _WIDTH - _RIGHT - 116
    return [
        f'<line class="{tone} thick" x1="{at}" y1="{24 + 18 * place}" x2="{at + 22}" y2="{24 + 18 * place}"/>'
        f'<text class="tick" x="{at + 30}" y="{28 + 18 * place}">{escape(name[:14])}</text>'
        for place, (name, tone) in enumerate(zip(names, tones or _TONES * len(names), strict=False))
    ]


def _axes(
    left: float, right: float, bottom: float, top: float, across: str, upward: str
) -> tuple[list[str], Scale, Scale]:
    """Grid, ticks and names of a chart, and the two scales."""
    span_x, span_y = right - left, top - bottom

    def x(value: float) -> float:
        return round(_LEFT + (value - left) / span_x * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (value - bottom) / span_y * (_HEIGHT - _TOP - _BOTTOM), 1)

    body = []
    for tick in _ticks(left, right):
        body.append(
            f'<line class="grid" x1="{x(tick)}" y1="{_TOP}" x2="{x(tick)}" y2="{_HEIGHT - _BOTTOM}"/>'
            f'<text class="tick" x="{x(tick)}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in _ticks(bottom, top):
        body.append(
            f'<line class="grid" x1="{_LEFT}" y1="{y(tick)}" x2="{_WIDTH - _RIGHT}" y2="{y(tick)}"/>'
            f'<text class="tick" x="{_LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>'
        )
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    body.append(f'<text class="label" x="{middle_x}" y="{_HEIGHT - 6}" text-anchor="middle">{across}</text>')
    body.append(
        f'<text class="label" x="13" y="{middle_y}" text-anchor="middle" '
        f'transform="rotate(-90 13 {middle_y})">{upward}</text>'
    )
    return body, x, y


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(size * unit for size in (1, 2, 2.5, 5, 10) if size * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _band(points: Sequence[tuple[float, float, float]], tone: str) -> str:
    """The interval around a line: x, and the y of its two ends."""
    around = [(x, low) for x, low, _ in points] + [(x, high) for x, _, high in reversed(points)]
    return f'<polygon class="{tone} band" points="{" ".join(f"{x},{y}" for x, y in around)}"/>'


def _line(points: Sequence[tuple[float, float]], tone: str) -> str:
    return f'<polyline class="{tone} line" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'

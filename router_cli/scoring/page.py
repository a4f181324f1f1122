"""What every report page is made of: the frame with its style, sections, tables, and figures with intervals.

A page is one file without scripts or outside resources; whatever came from an input file is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from router_cli.schema import Score
from router_cli.scoring import pictures
from router_cli.scoring.results import Difference

_TONES = {"better": "good", "worse": "bad", "cannot tell": "muted"}


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def header(over: str, summary: Sequence[str]) -> str:
    """The first words of a report: what was done, the figure, and what it is better than."""
    return (
        f"<header><p class='over'>{escape(over)}</p><h1>{escape(summary[0])}</h1>"
        f"<p class='lead'>{escape(summary[1])}</p></header>"
    )


def warnings(found: Sequence[str]) -> str:
    """The reasons to distrust the figures; nothing where there are none."""
    if not found:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in found)
    return f"<section class='warnings'><h2>Read with care</h2><ul>{items}</ul></section>"


def section(title: str, body: str, words: str = "") -> str:
    """A titled box with an explanation."""
    said = f"<p class='words'>{escape(words)}</p>" if words else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def picture(title: str, svg: str, words: str = "") -> str:
    """A box with one of `pictures`."""
    return section(title, f"<figure>{svg}</figure>", words)


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """Rows (`<tr>...</tr>`) under names of columns."""
    names = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    return f"<div class='scroll'><table><thead><tr>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def listed(facts: dict[str, str], notes: Sequence[str]) -> str:
    """What was done, as sentences and as pairs of name and value."""
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<ul class='words'>{said}</ul><dl>{pairs}</dl>"


def score(found: Score | None) -> str:
    """A figure with its interval."""
    if found is None:
        return "-"
    return f"<span class='figures'>{found.value:.3f} <small>{found.low:.3f} to {found.high:.3f}</small></span>"


def stacked(found: Score | None) -> str:
    """The same in a narrow column: the interval below."""
    return score(found).replace("<small>", "<small style='display:block'>")


def difference(found: Difference | None, reach: float) -> str:
    """A paired difference on an axis from -reach to reach, with what it says."""
    if found is None:
        return ""
    tone, value = _TONES[found.verdict], found.score
    return (
        f"{pictures.interval_bar(value, -reach, reach, tone, zero=True)}<span class='figures'>{value.value:+.3f} "
        f"<small>{value.low:+.3f} to {value.high:+.3f}</small></span>"
        f"<span class='verdict {tone}'>{escape(found.words)}</span>"
    )


def p(value: float) -> str:
    """A p-value with its sign."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def plain(value: float | None) -> str:
    """A figure without an interval."""
    return "-" if value is None else f"{value:.3f}"


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
svg .band{opacity:.13}svg .band.accent{fill:var(--accent)}
svg .line{fill:none;stroke-width:2.25;stroke-linejoin:round}
svg .dot.accent{fill:var(--accent)}svg .dot.good{fill:var(--good)}svg .dot.bad{fill:var(--bad)}
svg .dot.muted{fill:var(--muted)}
svg .cell{fill:var(--page)}svg .right{fill:var(--accent)}svg .wrong{fill:var(--bad)}
svg .count{fill:var(--ink);font-size:14px;font-weight:600}svg .count.on{fill:var(--card)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0;font-size:14px}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
@media print{body{background:#fff}section{break-inside:avoid}}
"""

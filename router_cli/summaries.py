"""What each command shows at its end: a (renderable, document) pair, for people and for --json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from router_cli import costs, prompts
from router_cli.schema import Prediction, Score
from router_cli.settings import Settings, fields

if TYPE_CHECKING:
    from router_cli.audit import AuditResult
    from router_cli.doctor import Finding
    from router_cli.from_outcomes import OutcomeLabels
    from router_cli.infer import InferResult
    from router_cli.labelling.estimate import Estimate
    from router_cli.labelling.labelfile import LabelResult
    from router_cli.quickstart import Quickstart
    from router_cli.scoring.results import Report
    from router_cli.scoring.worth_results import Replayed, WorthReport
    from router_cli.train import TrainResult

Shown = tuple[RenderableType, dict[str, Any]]


def labelled(result: LabelResult) -> Shown:
    """What `label` wrote, what it cost, and how the topologies fell."""
    total = sum(result.topologies.values())
    mix = ", ".join(f"{name} {count} ({count / total:.0%})" for name, count in result.topologies.items() if total)
    lines = [
        f"{total} labels in {result.output} ({result.labelled} new, {result.resumed} from before)",
        f"topologies: {mix or 'none'}",
    ]
    if result.split_votes:
        lines.append(f"{result.split_votes} labels are not what all votes said: see provenance.votes")
    lines += _bill(result)
    if result.normalised:
        lines.append(
            f"{result.normalised} answers were made canonical (role aliases, order): see provenance.normalised"
        )
    if result.rejected:
        lines.append(f"{result.rejected} tasks have no usable decision: see {result.rejected_path}")
    if result.unanswered:
        lines.append(f"{result.unanswered} tasks have no answer yet: the same command goes on with them")
    if result.skipped:
        lines.append(f"{result.skipped} lines could not be read and were skipped")
    if result.stopped:
        lines.append(result.stopped)
    return Text("\n".join(lines)), _document(result)


def _bill(result: LabelResult) -> list[str]:
    """What a paid run cost against what was expected, and what was wasted on the way."""
    usage, foreseen = result.usage, result.estimate
    lines = []
    if usage.prompt_tokens or usage.completion_tokens:
        lines.append(
            f"this run: {usage.attempts:,} requests, {usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens, "
            f"{costs.dollars(usage.cost_usd)}; all rows: {costs.dollars(result.usage_all.cost_usd)}"
        )
        if foreseen is not None and foreseen.cost_usd and usage.cost_usd is not None:
            # Of a run that ended early only a part was to be paid.
            whole = not (result.stopped or result.unanswered)
            off = f" ({usage.cost_usd / foreseen.cost_usd - 1:+.1%})" if whole else ""
            lines.append(f"estimate {costs.dollars(foreseen.cost_usd)}, bill {costs.dollars(usage.cost_usd)}{off}")
        if result.count_error is not None:
            lines.append(f"prompt tokens as counted by {result.tokenizer}: {result.count_error:+.1%} off")
    if result.wasted:
        lines.append(f"{result.wasted:,} of {result.requests:,} requests wasted: turned away by a rate limit")
    if result.astray_usd >= 0.00005:
        lines.append(f"up to {costs.dollars(result.astray_usd)} more for requests whose answer was lost")
    if result.lost:
        lines.append(f"{result.lost} questions of an interrupted run may have been paid for without a row")
    return lines


def estimated(estimate: Estimate) -> Shown:
    """What a run of `label` is to cost, for --dry-run."""
    return Text(str(estimate) if estimate.questions else "every task has its row: nothing to ask"), _document(estimate)


def outcome_labelled(result: OutcomeLabels) -> Shown:
    """What recorded executions gave labels for, and what they left out."""
    mix = ", ".join(f"{name} {count}" for name, count in result.topologies.items() if count)
    lines = [
        f"{result.labelled} labels in {result.output}, from {result.repeats:.3g} runs a topology on average",
        f"topologies: {mix}",
        f"{result.several} tasks have more topologies that are good enough: the cheapest is the label; "
        f"{result.unsolved} are solved by none",
    ]
    if result.without_evidence:
        lines.append(f"{result.without_evidence} tasks have no runs of two topologies and are left out")
    if result.without_text:
        lines.append(f"{result.without_text} tasks have no text and are left out")
    if result.repeats < 2:
        lines.append("most cells hold one run: these labels carry its luck, repeats would tell it apart")
    if result.pairs_path is not None:
        lines.append(f"{result.pairs} preference pairs in {result.pairs_path}")
    return Text("\n".join(lines)), _document(result)


def audited(result: AuditResult) -> Shown:
    """How far the teacher agrees with itself, how the topologies fall, and what a person should look at."""
    head = f"{result.answered} of {result.labels} labels in {result.output} asked about again"
    figures = Table(show_header=False, box=None, pad_edge=False)
    figures.add_row("same topology", _interval(result.topology))
    figures.add_row("same decision", _interval(result.decision))
    figures.add_row("Cohen's kappa", _interval(result.kappa) if result.kappa else "undefined: one topology alone")
    lines = [f"{change}: {count}" for change, count in result.changes.items()]
    for strategy, counts in result.balance.items():
        total = sum(counts.values())
        mix = ", ".join(f"{name} {count / total:.0%}" for name, count in counts.items())
        lines.append(f"{strategy}: {mix} of {total} answers")
    if result.candidates:
        why = ", ".join(f"{name} {count}" for name, count in result.candidates.items())
        lines.append(f"for a human look: {result.candidates_path} ({why})")
    lines.append(f"the second answers: {result.usage.attempts} requests, {costs.dollars(result.usage.cost_usd)}")
    if not result.complete:
        lines.append(f"{result.asked - result.answered} tasks got no answer: the same command asks them again")
    if result.stopped:
        lines.append(result.stopped)
    return Group(Text(head, style="bold"), figures, Text("\n".join(lines))), _document(result)


def trained(result: TrainResult) -> Shown:
    """What `train` made."""
    if result.adapter is None:
        return Text(f"{result.base.name} is at {result.base.folder}"), _document(result)
    if result.already_done:
        return Text(f"adapter in {result.adapter} (made before)"), _document(result)
    score = result.validation_macro_f1
    lines = [
        f"adapter in {result.adapter}: {result.train_examples} examples, {result.steps} steps, {result.seconds:.0f} s",
        f"loss {_number(result.first_loss)} -> {_number(result.last_loss)}; "
        + (
            f"topology macro-F1 {score:.3f} on {result.validation_examples} validation tasks"
            if score is not None
            else "no validation tasks"
        ),
        f'next: router infer --adapter {result.adapter} "Sort a list of integers"',
    ]
    return Text("\n".join(lines)), _document(result)


def decided(result: InferResult, as_json: bool) -> Shown:
    """One task as a small table, a file as a line about it, standard output as JSON lines."""
    if result.output is not None:
        lines = [f"{result.decided} decisions added to {result.output} ({result.resumed} from before)"]
        if result.fallbacks:
            lines.append(f"{result.fallbacks} of them are fallbacks: see the field fallback")
        lines += unsure(result)
        if result.skipped:
            lines.append(f"{result.skipped} lines could not be read and were skipped")
        return Text("\n".join(lines)), _document(result)
    rows = [row.model_dump(mode="json") for row in result.predictions]
    if len(rows) == 1:
        return decision_table(result.predictions[0]), rows[0]
    return Text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows)), {"predictions": rows}


def unsure(result: InferResult) -> list[str]:
    """What became of the decisions below the confidence asked for, and what that cost."""
    if result.threshold is None:
        return []
    count, usage = sum(result.unsure.values()), result.usage
    who = {"none": "decided by nobody", "decision": "the given decision"}
    mix = ", ".join(f"{who.get(name, name)} {number}" for name, number in result.unsure.items())
    lines = [f"{count} of {result.decided} below the confidence {result.threshold:g}" + (f": {mix}" if mix else "")]
    if usage is not None and usage.attempts:
        tokens = f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens"
        lines.append(f"the fallback's answers: {usage.attempts:,} requests, {tokens}, {costs.dollars(usage.cost_usd)}")
    return lines


def decision_table(row: Prediction) -> Table:
    """A decision for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    decision = row.decision
    if decision is None:
        table.add_row("topology", Text("none: not sure enough", style="bold"))
    else:
        table.add_row("topology", Text(decision.topology, style="bold"))
        joined = " -> " if decision.topology == "chain" else ", "
        table.add_row("roles", joined.join(decision.roles))
        if decision.manager_role:
            table.add_row("manager", decision.manager_role)
        table.add_row("entry", decision.entry_role)
        table.add_row("max steps", str(decision.max_steps))
    if row.topologies:
        shares = sorted(row.topologies.items(), key=lambda one: -one[1])
        table.add_row("probabilities", ", ".join(f"{name} {share:.2f}" for name, share in shares))
    for number, one in enumerate(row.alternatives or (), start=1):
        table.add_row(f"{number}. of all", f"{one.probability:.3f} {prompts.render(one.decision)}")
    if row.fallback:
        table.add_row("fallback", row.fallback)
    table.add_row("by", f"{row.backend}: {row.model}, {row.milliseconds:.0f} ms")
    return table


def judged(report: Report, settings: Settings) -> Shown:
    """The comparison and where the report lies."""
    folder = settings.eval.output_dir
    parts: list[RenderableType] = [Text(report.summary[0], style="bold"), Text(report.summary[1]), comparison(report)]
    parts.append(Text(f"{folder / 'report.html'} and {folder / 'report.json'}"))
    return Group(*parts), report.model_dump(mode="json")


def comparison(report: Report) -> Table:
    """Every system with its macro-F1 and accuracy, and what its difference to the router says; 74 columns wide."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("system", "macro-F1", "accuracy", "the router is", "by macro-F1 of"):
        table.add_column(name, no_wrap=True)
    for system in sorted(report.systems, key=lambda one: -one.macro_f1.value):
        found, score = system.macro_f1_difference, system.macro_f1
        table.add_row(
            Text(system.name, style="bold" if system.kind == "router" else ""),
            f"{score.value:.3f} ({score.low:.2f}-{score.high:.2f})",
            f"{system.accuracy.value:.3f}",
            found.verdict if found else "",
            f"{found.score.value:+.2f} ({found.score.low:+.2f} to {found.score.high:+.2f})" if found else "",
        )
    return table


def weighed(report: WorthReport, settings: Settings) -> Shown:
    """Every table's policies and verdicts, and where the report lies."""
    folder = settings.eval.output_dir
    parts: list[RenderableType] = []
    for one in report.tables:
        parts += [Text(one.summary[0], style="bold"), Text(one.summary[1]), worth_table(one), Text("")]
    parts += [Text(note) for note in report.notes]
    parts.append(Text(f"{folder / 'report.html'} and {folder / 'report.json'}"))
    return Group(*parts), report.model_dump(mode="json")


def worth_table(found: Replayed) -> Table:
    """Every policy with what it solves and costs a task, and what the first row's difference to it says; 78 columns."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    first = found.policies[0]
    paid = "$ a task" if found.unit == "USD" else "tokens" if found.unit == "tokens" else ""
    for name in ("policy", "solved", paid, "first row is", "by solved"):
        table.add_column(name, no_wrap=True)
    for row in found.policies:
        difference, solved = row.solved_difference, row.solved
        cost = row.dollars if found.unit == "USD" else row.tokens
        table.add_row(
            Text(row.name, style="bold" if row is first else ""),
            f"{solved.value:.3f} ({solved.low:.2f}-{solved.high:.2f})",
            "" if cost is None or not paid else f"{cost.value:.4f}" if found.unit == "USD" else f"{cost.value:,.0f}",
            difference.verdict if difference else "",
            f"{difference.score.value:+.2f} ({difference.score.low:+.2f} to {difference.score.high:+.2f})"
            if difference
            else "",
        )
    return table


def started(run: Quickstart) -> Shown:
    """The closing panel of the quickstart."""
    assert run.report is not None and run.trained is not None  # the loop has ended
    adapter = run.folder / "adapter"
    made = Table(show_header=False, box=None, pad_edge=False)
    for file, what in (
        ("labels.jsonl", "the teacher's decisions"),
        ("adapter/", f"LoRA on {run.base.name}, {run.trained.steps} steps"),
        ("predictions.jsonl", "its decisions for the test tasks"),
        ("report.html", "how good they are (report.json for programs)"),
    ):
        made.add_row(Text(file, style="bold"), what)
    times = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in run.seconds.items())
    decisions = [Group(Text(f"\n“{text}”", style="italic"), decision_table(row)) for text, row in run.examples]
    following = (
        f'router infer --adapter {adapter} "your own task"\n'
        "router label --data YOUR_TASKS.jsonl --output labels.jsonl\n"
        "router train --data labels.jsonl --model Qwen/Qwen3-8B --use-4bit --bf16"
    )
    body = Group(
        Text(f"Made in {run.folder}", style="bold cyan"),
        made,
        Text(f"{sum(run.seconds.values()):.0f} s: {times}\n"),
        Text(f"How good, on {run.report.counts.judged} held-out tasks (95 % intervals)", style="bold cyan"),
        comparison(run.report),
        Text("\nThree decisions", style="bold cyan"),
        *decisions,
        Text("\nNext", style="bold cyan"),
        Text(following),
    )
    document = {
        "folder": str(run.folder),
        "base": _document(run.base),
        "seconds": run.seconds,
        "training": _document(run.trained),
        "examples": [{"task": text, **row.model_dump(mode="json")} for text, row in run.examples],
        "report": run.report.model_dump(mode="json"),
    }
    return Panel(body, title="router quickstart", title_align="left"), document


def examined(findings: list[Finding]) -> Shown:
    """The doctor's findings, each with its fix."""
    marks = {"fine": ("ok", "green"), "note": ("--", "yellow"), "wrong": ("no", "bold red")}
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        mark, style = marks[finding.state]
        table.add_row(Text(mark, style=style), finding.name, Text(finding.words))
        if finding.fix:
            table.add_row("", "", Text(f"-> {finding.fix}", style="cyan"))
    return table, {"findings": [dataclasses.asdict(finding) for finding in findings]}


def configured(settings: Settings) -> Shown:
    """Every setting, its value and its origin."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("setting", "value", "from"):
        table.add_column(name, overflow="fold")
    document: dict[str, Any] = {}
    for key, _ in fields():
        section, name = key.split(".")
        value = getattr(getattr(settings, section), name)
        plain = "********" if isinstance(value, SecretStr) else value
        origin = settings.origin(key)
        document[key] = {"value": str(plain) if isinstance(plain, Path) else plain, "from": origin}
        shown = ",".join(plain) if isinstance(plain, list) else "" if plain is None else str(plain)
        table.add_row(Text(key), Text(shown), Text(origin, style="dim" if origin == "default" else "bold"))
    return table, document


def _interval(score: Score) -> str:
    return f"{score.value:.3f} ({score.low:.3f}-{score.high:.3f})"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _document(value: Any) -> Any:
    """A result object as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _document(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_document(one) for one in value]
    return str(value) if isinstance(value, Path) else value

"""What `router label` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from router_cli import costs
from router_cli.schema import Score
from router_cli.summaries.shown import Shown, document

if TYPE_CHECKING:
    from router_cli.audit import AuditResult
    from router_cli.from_outcomes import OutcomeLabels
    from router_cli.labelling.estimate import Estimate
    from router_cli.labelling.labelfile import LabelResult


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
    return Text("\n".join(lines)), document(result)


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
    return Text(str(estimate) if estimate.questions else "every task has its row: nothing to ask"), document(estimate)


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
    return Text("\n".join(lines)), document(result)


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
    return Group(Text(head, style="bold"), figures, Text("\n".join(lines))), document(result)


def _interval(score: Score) -> str:
    return f"{score.value:.3f} ({score.low:.3f}-{score.high:.3f})"

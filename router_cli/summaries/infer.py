"""What `router infer` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from router_cli import costs, prompts
from router_cli.schema import Prediction
from router_cli.summaries.shown import Shown, document

if TYPE_CHECKING:
    from router_cli.bulk import BulkResult
    from router_cli.infer import InferResult


def decided(result: InferResult, one: bool) -> Shown:
    """`one` task as a small table, a file as a line about it; under --json all rows, one too."""
    if result.output is not None:
        lines = [f"{result.decided} decisions added to {result.output} ({result.resumed} from before)"]
        if result.fallbacks:
            lines.append(f"{result.fallbacks} of them are fallbacks: see the field fallback")
        lines += unsure(result)
        if result.skipped:
            lines.append(f"{result.skipped} lines could not be read and were skipped")
        return Text("\n".join(lines)), document(result)
    rows = [row.model_dump(mode="json") for row in result.predictions]
    if one:
        return decision_table(result.predictions[0]), rows[0]
    return Text(""), {"predictions": rows}


def sharded(result: BulkResult) -> Shown:
    """A folder of shards as a few lines."""
    lines = [f"{result.shards} shards stand in {result.output} ({result.resumed} from before)"]
    lines.append(f"{result.decided} decisions added")
    if result.fallbacks:
        lines.append(f"{result.fallbacks} of them are fallbacks: see the field fallback")
    lines += unsure(result)
    if result.skipped:
        lines.append(f"{result.skipped} lines could not be read and were skipped")
    return Text("\n".join(lines)), document(result)


def unsure(result: InferResult | BulkResult) -> list[str]:
    """What became of the decisions below the confidence asked for, and what that cost."""
    if result.threshold is None:
        return []
    count, usage = sum(result.unsure.values()), getattr(result, "usage", None)
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
    table.add_column()
    table.add_column(overflow="fold")  # nothing of a decision or a path is cut
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

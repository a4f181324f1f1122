"""What `router run` shows: the result alone on stdout, how it came about on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from router_cli import costs, prompts
from router_cli.summaries.shown import Shown, document
from router_cli.teams.team import drawn

if TYPE_CHECKING:
    from router_cli.execute import Executed
    from router_cli.run import RunResult
    from router_cli.teams.team import Work


def ran(result: RunResult) -> Shown:
    """The team's result."""
    found: dict[str, Any] = document(result)
    return Text(result.result), found


def told(result: RunResult) -> Text:
    """Who decided what, what it took, and where the trace is."""
    sure = "" if result.probability is None else f" (probability {result.probability:.2f})"
    traces = ", ".join(str(one) for one in result.traces)
    climbed = []
    if len(result.teams) > 1 or result.fired:
        names = " -> ".join(team.topology for team in result.teams)
        climbed = [f"cascade: {names}" + (f", because of {', '.join(result.fired)}" if result.fired else "")]
    lines = [
        f"decided{sure}: {prompts.render(result.decision)}",
        *result.notes,
        *climbed,
        f"{_spent(result, result.turns)}; trace in {traces}",
    ]
    return Text("\n".join(lines), style="dim")


def _spent(one: RunResult | Work, turns: int) -> str:
    used = one.usage
    return (
        f"{turns} turns, {used.prompt_tokens:,} + {used.completion_tokens:,} tokens, "
        f"{costs.dollars(used.cost_usd)}, {one.seconds:.1f} s"
    )


def traced(done: Work, draw: bool) -> Shown:
    """A recorded run: who said what, or a picture of it."""
    found: dict[str, Any] = document(done)
    if draw:
        return Text(drawn(done)), found
    lines = [f"task: {done.task}", f"decided: {prompts.render(done.decision)}"]
    for number, turn in enumerate(done.turns, start=1):
        used = turn.said.usage
        took = f"{used.prompt_tokens:,} + {used.completion_tokens:,} tokens, {costs.dollars(used.cost_usd)}"
        lines += ["", f"--- turn {number}: {turn.role}, {took}, {turn.said.seconds:.1f} s", turn.said.text]
        lines += [f"({note})" for note in turn.notes]
    lines += ["", f"--- {done.ended}" + (f": {done.why}" if done.why else ""), _spent(done, len(done.turns))]
    return Text("\n".join(lines)), found


def executed(done: Executed) -> Text:
    """How much was executed, what of it was paid for now, and where the rows are."""
    used, paid = done.usage, done.paid
    lines = [
        f"{done.cells:,} executions, {used.prompt_tokens:,} + {used.completion_tokens:,} tokens, "
        f"{costs.dollars(used.cost_usd)} ({paid.attempts:,} requests and {costs.dollars(paid.cost_usd)} of it now); "
        f"rows in {done.outcomes}"
    ]
    if done.failed:
        lines.append(f"{done.failed} teams came to no result: their worker gave no answer; the same command asks again")
    return Text("\n".join(lines), style="dim")

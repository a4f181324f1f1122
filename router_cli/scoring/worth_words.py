"""What a replay's figures mean, in words: who solves more, at what cost, and what is a coin, a constant or noise."""

from __future__ import annotations

from router_cli.schema import Score
from router_cli.scoring.escalation import ENOUGH
from router_cli.scoring.metrics import entropy
from router_cli.scoring.wording import FEW_TASKS, hardly_varies, interval
from router_cli.scoring.worth_results import PolicyRow, Replayed, Solving

MANY_REPEATS = 1000
"""Where more would be needed, there is no difference to speak of."""


def summary(found: Replayed) -> tuple[str, str]:
    """How much the judged router solves at what cost, and what it is better and worse than."""
    first, n = found.policies[0], found.counts.judged
    who = "The router" if first.kind == "router" else first.name.capitalize()
    spent = f", at {money(first.dollars.value)} a task" if first.dollars else ""
    opening = f"{found.name}: {who} solves {interval(first.solved)} of {n} tasks{spent}."
    said: dict[str, list[str]] = {"better": [], "worse": [], "cannot tell": []}
    for row in found.policies[1:]:
        if row.solved_difference is not None:
            told = row.solved_difference.tasks
            said[row.solved_difference.verdict].append(row.name + (f" (about {told:,} tasks would)" if told else ""))
    parts = []
    if said["better"]:
        parts.append(f"it is better than {_join(said['better'])}")
    if said["worse"]:
        parts.append(f"it is worse than {_join(said['worse'])}")
    if said["cannot tell"]:
        parts.append(f"these tasks cannot tell it from {_join(said['cannot tell'])}")
    return opening, f"On solved tasks, {'; '.join(parts)}." if parts else "There is nothing to compare it with."


def warnings(found: Replayed) -> list[str]:
    """Reasons to distrust the figures, the gravest first."""
    first, counts = found.policies[0], found.counts
    said = [*_flaws(found), *_noise(found)] if first.kind == "router" else []
    if found.solving is not None and found.solving.over_average.verdict == "worse":
        said.append(
            "What the router says about solving is further from these runs than each topology's own average is: a "
            "choice by value would rest on it."
        )
    if counts.judged < FEW_TASKS:
        said.append(
            f"Only {counts.judged} judged tasks: fewer than {FEW_TASKS} tell little, whatever the intervals say."
        )
    if counts.without_prediction:
        said.append(f"{_count(counts.without_prediction, 'task')} without a prediction and left out.")
    if counts.invalid:
        said.append(f"{_count(counts.invalid, 'decision')} not valid: nobody ran, counted as unsolved.")
    if counts.fallen:
        said.append(
            f"{_count(counts.fallen, 'decision')} for a topology that was never executed on the task; the router's "
            "most probable executed one stands in."
        )
    return said


def _flaws(found: Replayed) -> list[str]:
    first = found.policies[0]
    most, share = max(first.mix.items(), key=lambda one: one[1], default=("", 0.0))
    if len(first.mix) == 1 and share == 1:
        return [f"The router is constant: every task gets {most}, so it is worth what always {most} is."]
    said = []
    if alarm := hardly_varies(most, share, entropy(first.mix.values())):
        said.append(f"The router {alarm}.")
    coin = next((row for row in found.policies if row.name == "same-mix coin"), None)
    if coin is not None and coin.solved_difference is not None and coin.solved_difference.verdict != "better":
        verdict, score = coin.solved_difference.verdict, coin.solved_difference.score
        worse = "worse than" if verdict == "worse" else "no better than"
        said.append(
            f"The router is {worse} a coin of its own mix: it solves {first.solved.value:.3f}, the coin "
            f"{coin.solved.value:.3f} (difference {score.value:+.3f}, {score.low:+.3f} to {score.high:+.3f})."
        )
    return said


def _noise(found: Replayed) -> list[str]:
    noise = found.noise
    if noise.gain is None or noise.half_width is None or not 0 < abs(noise.gain) <= noise.half_width:
        return []
    enough = noise.settled_by or 0
    settled = f"about {enough:,} repeats" if enough <= MANY_REPEATS else f"not even {MANY_REPEATS} repeats"
    where = "measured on the repeats" if noise.cells else "taken from other recorded reruns, for there are no repeats"
    return [
        f"The difference to the best fixed topology, {noise.gain:+.3f}, is inside rerun noise: running the same "
        f"decisions again moves it by up to {noise.half_width:.3f} (two identical runs differ on {noise.differing:.1%} "
        f"of the tasks, {where}); {settled} of every task and topology would settle it."
    ]


def notes(found: Replayed, penalty: float | None, trained: bool) -> list[str]:
    """What was done, so that the figures can be read."""
    counts, oracle = found.counts, found.oracle
    said = []
    if counts.of_one_topology:
        said.append(f"{_count(counts.of_one_topology, 'task')} left out: with one topology there is nothing to choose.")
    if counts.of_other_splits:
        said.append(f"{_count(counts.of_other_splits, 'task')} of other splits, not judged.")
    said.append(
        {
            "USD": "Cheaper means fewer dollars.",
            "tokens": "Not every run has a price: cheaper means fewer tokens.",
            "rank": f"Not every run counts its tokens: cheaper means earlier in {', '.join(found.topologies)}.",
        }[found.unit]
    )
    if penalty is not None and all(row.bill is None for row in found.policies):
        said.append("No bill: not every run has a price.")
    elif penalty is not None and all(row.name != "priced cascade" for row in found.policies):
        said.append(
            f"No cascade was chosen for this price: that takes {ENOUGH} tasks of a training split (`split`), "
            f"and a topology that solves more than {found.topologies[0]}."
        )
    if oracle.cross_fitted:
        said.append(
            "The oracle is cross-fitted over repeats; choosing and judging on the same runs would have flattered it by "
            f"{oracle.optimism:.3f}."
        )
    else:
        said.append(
            f"The oracle chooses and judges on the same runs: rerun noise alone gives it about {oracle.optimism:.3f} "
            f"where two identical runs differ on {found.noise.differing:.1%} of the tasks, and all of its gain over "
            f"the best fixed topology from {oracle.explained_at or 0:.1%} on."
        )
    if edge := frontier(found):
        listed = [
            f"{row.name} ({row.solved.value:.3f} at {money(cost) if found.unit == 'USD' else f'{cost:,.0f} tokens'})"
            for row, cost in edge
        ]
        said.append(f"The frontier, what nothing else beats in cost and solved tasks as measured: {', '.join(listed)}.")
    if (teacher := found.teacher) is not None:
        said.append(
            f"The teacher's labels, on {teacher.tasks} tasks, against a coin of their own mix: "
            f"{signed(teacher.over_coin.score)}, {teacher.over_coin.words}. Their regret, what following them solves "
            f"less than the oracle: {interval(teacher.regret)}."
        )
    if found.solving is not None:
        said.append(solving(found.solving))
    if any(row.kind == "cascade" for row in found.policies):
        said.append(
            "A cascade sees what its first runs show without hidden tests, and pays for every run that it takes."
        )
    if any(row.kind == "knn" for row in found.policies) and not trained:
        said.append("No training split has texts and runs: kNN answers out of fold.")
    return said


def solving(found: Solving) -> str:
    """How far what the router says about solving can be believed."""
    measured = found.calibration
    assert measured.brier is not None
    return (
        f"The router's P(solved | topology), on {measured.n:,} runs of {found.tasks} tasks: Brier "
        f"{interval(measured.brier)}, ECE {interval(measured.ece)} (a calibrated router shows "
        f"{measured.ece_when_calibrated:.3f}). Over always saying what each topology solves on average: "
        f"{signed(found.over_average.score)} of Brier, {found.over_average.words}."
    )


def frontier(found: Replayed) -> list[tuple[PolicyRow, float]]:
    """The policies that none beats, by the measured values, and what each costs, the cheapest first.

    One beats another that solves no less at a lower cost, or more at the same. The oracle, which nobody can be, is
    left out. Empty where costs are unknown.
    """
    if found.unit == "rank":
        return []
    priced = [(row, row.dollars if found.unit == "USD" else row.tokens) for row in found.policies]
    rows = [(row, cost.value) for row, cost in priced if cost is not None and row.kind != "oracle"]
    kept: list[tuple[PolicyRow, float]] = []
    for row, cost in sorted(rows, key=lambda one: (one[1], -one[0].solved.value)):
        if not kept or row.solved.value > kept[-1][0].solved.value:
            kept.append((row, cost))
    return kept


def money(amount: float) -> str:
    """A mean price a task: small ones keep their leading digits."""
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.2g}" if amount < 0.01 else f"${amount:.3f}"


def mix(row: PolicyRow) -> str:
    """`single 62%, chain 38%`."""
    return ", ".join(f"{name} {share:.0%}" for name, share in row.mix.items())


def signed(score: Score) -> str:
    """`+0.043 (-0.006 to +0.091)`."""
    return f"{score.value:+.3f} ({score.low:+.3f} to {score.high:+.3f})"


def _count(number: int, what: str) -> str:
    return f"{number} {what} is" if number == 1 else f"{number} {what}s are"


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

"""What the figures mean, in words: two sentences for everybody, and every reason to read them with care."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router_cli.schema import Score
from router_cli.scoring.results import Ceiling, Changed, Counts, Figures, Flip, Own, Side, Spending, System

FEW_TASKS = 30
COLLAPSED = 0.95
"""From this share of one topology on, a router hardly chooses any more."""
LOW_ENTROPY = 0.4
"""Bits. A mix below says as little: 92 % of one topology and 8 % of another have .40, four topologies alike 2."""
_NAMED = 5


@dataclass(frozen=True)
class Surroundings:
    """What the wording has to know beside the figures."""

    counts: Counts
    split_carried: bool
    baselines_fit: str
    # Judged tasks that stand, by id or by text, in the training split too.
    leaked: Sequence[str] = ()
    # The first unusable labels, in words.
    unusable: Sequence[str] = ()
    teachers: Mapping[str, int] = field(default_factory=dict)
    # Judged tasks that a compared system has no prediction for.
    missing_elsewhere: Mapping[str, int] = field(default_factory=dict)
    fallbacks: int = 0
    ceiling: Ceiling | None = None
    spending: Spending | None = None
    flip: Flip | None = None


def summary(figures: Figures) -> tuple[str, str]:
    """How good the router is, and what it is better than."""
    n, name = figures.accuracy.n, figures.systems[0].name
    who = "The router" if name == "router" else name
    first = (
        f"{who} gives {round(figures.accuracy.value * n)} of {n} tasks the labelled topology: accuracy "
        f"{interval(figures.accuracy)}, macro-F1 {interval(figures.macro_f1)}."
    )
    said: dict[str, list[str]] = {"better": [], "worse": [], "cannot tell": []}
    for system in figures.systems:
        if (found := system.macro_f1_difference) is not None:
            told = f" (about {found.tasks:,} tasks would)" if found.tasks else ""
            said[found.verdict].append(system.name + told)
    parts = []
    if said["better"]:
        parts.append(f"it is better than {_join(said['better'])}")
    if said["worse"]:
        parts.append(f"it is worse than {_join(said['worse'])}")
    if said["cannot tell"]:
        parts.append(f"these tasks cannot tell it from {_join(said['cannot tell'])}")
    return first, f"On macro-F1, {'; '.join(parts)}." if parts else "There is nothing to compare it with."


def warnings(figures: Figures, around: Surroundings) -> list[str]:
    """Reasons to distrust the figures, the gravest first."""
    n, counts, found = figures.accuracy.n, around.counts, []
    if around.leaked:
        found.append(
            f"{_count(len(around.leaked), 'judged task')} also in the training split, by id or by identical text: "
            f"{_some(around.leaked)}. The figures flatter whatever was trained there."
        )
    support = {row.name: row.support for row in figures.per_class if row.support}
    if len(support) == 1:
        found.append(f"All judged labels are {next(iter(support))}: nothing can be told about choosing a topology.")
    if said := collapsed(figures):
        found.append(f"The router {said}.")
    if figures.entropy.value > 0 and len(support) > 1 and figures.coin.p > 0.05:
        found.append(
            f"The router is no better than a coin of its own mix: it agrees with {figures.accuracy.value:.3f} of the "
            f"labels, the coin with {figures.coin.expected.value:.3f} (permutation test, p = {figures.coin.p:.2f})."
        )
    if n < FEW_TASKS:
        found.append(f"Only {n} judged tasks: fewer than {FEW_TASKS} tell little, whatever the intervals say.")
    if counts.missing_predictions:
        found.append(f"{_count(counts.missing_predictions, 'judged task')} without a prediction, counted as wrong.")
    for name, missing in around.missing_elsewhere.items():
        found.append(f"{name}: {_count(missing, 'judged task')} without a prediction, counted as wrong.")
    if counts.invalid:
        found.append(f"{_count(counts.invalid, 'prediction')} without a valid decision, counted as wrong.")
    if counts.duplicate_predictions:
        found.append(
            f"{_count(counts.duplicate_predictions, 'repeated prediction')} ignored: the first of a task counts."
        )
    if counts.predictions_without_label:
        found.append(f"{_count(counts.predictions_without_label, 'prediction')} without a label, not judged.")
    if counts.duplicate_labels:
        found.append(f"{_count(counts.duplicate_labels, 'repeated label')} ignored: the first of a task counts.")
    if counts.unusable_labels:
        found.append(f"{_count(counts.unusable_labels, 'label')} unusable and left out: {_some(around.unusable, 2)}.")
    if copied := around.teachers.get("heuristic"):
        found.append(
            f"{_count(copied, 'judged label')} from the offline heuristic: agreement says how well its rules were "
            "copied, and the heuristic's own row is no measure."
        )
    if len(around.teachers) > 1:
        mix = ", ".join(f"{name} {count}" for name, count in around.teachers.items())
        found.append(f"The judged labels come from several teachers ({mix}): agreement mixes their habits.")
    return found


def collapsed(own: Own) -> str:
    """What is said of a router that gives (nearly) all tasks the same topology; nothing of any other."""
    taken = {row.name: row.predicted for row in own.per_class if row.predicted}
    if not taken:
        return ""
    most = max(taken, key=lambda name: taken[name])
    if len(taken) == 1:
        return f"is constant: every valid decision is {most}"
    return hardly_varies(most, taken[most] / sum(taken.values()), own.entropy.value)


def hardly_varies(most: str, share: float, entropy: float) -> str:
    """The collapse alarm: one topology has `COLLAPSED` of the tasks, or the mix less than `LOW_ENTROPY` bits."""
    if share < COLLAPSED and entropy >= LOW_ENTROPY:
        return ""
    return (
        f"hardly varies: {share:.0%} of the tasks get {most}, {entropy:.2f} bits of entropy (alarm: {COLLAPSED:.0%} of "
        f"one topology, or below {LOW_ENTROPY} bits)"
    )


def versus(side: Side) -> str:
    """The router and a compared one, task by task."""
    one = side.versus
    return (
        f"{side.name}: the same topology on {one.same_topology.value:.1%} of the tasks, the same decision on "
        f"{one.same_decision.value:.1%}; the router alone is right on {one.only_router}, {side.name} alone on "
        f"{one.only_other} (McNemar p {'< 0.001' if one.mcnemar < 0.001 else f'= {one.mcnemar:.3f}'})."
    )


def flipped(one: Changed) -> str:
    """One line of the flip test."""
    return (
        f"Flip test, {one.name} ({one.what}): {one.topology.value:.1%} of {one.topology.n} decisions change topology "
        f"({one.topology.low:.1%} to {one.topology.high:.1%}), {one.decision.value:.1%} change at all."
    )


def taken(own: Spending) -> str:
    """What an answer takes: `12.3 ms (median; 95 % within 20.1), 210 + 30 tokens, $0.0004`."""
    said = []
    if own.median_milliseconds is not None and own.p95_milliseconds is not None:
        said.append(f"{own.median_milliseconds:,.1f} ms (median; 95 % within {own.p95_milliseconds:,.1f})")
    if own.prompt_tokens and own.completion_tokens:
        said.append(f"{own.prompt_tokens.value:,.0f} + {own.completion_tokens.value:,.0f} tokens")
    if own.dollars:
        said.append(f"${own.dollars.value:.2g}")
    return ", ".join(said)


def notes(figures: Figures, around: Surroundings) -> list[str]:
    """What was done, so that the figures can be read."""
    found = []
    if not around.split_carried:
        found.append("No label carries a split: all rows were judged.")
    found.append(around.baselines_fit)
    found.append(
        "Shares have Wilson intervals; macro-F1, differences and all other figures have percentile bootstrap "
        "intervals; all at 95 %. Differences are paired: both systems are resampled on the same tasks."
    )
    if empty := [row.name for row in figures.per_class if row.f1 is None]:
        found.append(f"{_join(empty)}: in no label and no prediction, left out of macro-F1.")
    if around.counts.predictions_of_other_splits:
        found.append(f"{_count(around.counts.predictions_of_other_splits, 'prediction')} for other splits, not judged.")
    if around.counts.normalised:
        found.append(
            f"{_count(around.counts.normalised, 'prediction')} read with role aliases resolved or roles reordered."
        )
    if around.fallbacks:
        found.append(f"{_count(around.fallbacks, 'judged prediction')} from a fallback, not from the router itself.")
    answered = figures.calibration.n if figures.calibration else 0
    if answered < figures.accuracy.n:
        found.append(
            f"Calibration and selective risk cover {answered} of {figures.accuracy.n} tasks: other answers bring no "
            "probability."
        )
    if around.teachers == {"recorded": figures.accuracy.n}:
        found.append("The labels are the decisions written beside the tasks, not a teacher model's.")
    elif not around.teachers:
        found.append("The labels do not record which teacher gave them.")
    if around.ceiling is None:
        found.append(
            "No label records repeated votes and no second label file names the same tasks, so the teacher's own "
            "repeatability, the ceiling, is not known."
        )
    else:
        one = around.ceiling
        who = "votes agree with its own labels" if one.source == "votes" else "second file agrees with the first"
        found.append(
            f"Ceiling: the teacher's {who} at {interval(one.agreement)}, over {one.agreement.n} tasks; the router "
            f"minus that: {one.router.score.value:+.3f} ({one.router.score.low:+.3f} to {one.router.score.high:+.3f}), "
            f"{one.router.words}."
        )
    if figures.spending and (said := taken(figures.spending)):
        found.append(f"A decision of the router takes {said}; its own machine's time has no price here.")
    if around.spending and (said := taken(around.spending)):
        found.append(f"A label of the teacher took {said}.")
    if around.flip:
        found += [flipped(one) for one in around.flip.changed]
    found += [versus(side) for side in figures.sides]
    return found


def interval(score: Score) -> str:
    """`0.712 (0.641 to 0.775)`."""
    return f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"


def difference(system: System) -> str:
    """A system's row in words, for people: the macro-F1 difference, its interval and what it says."""
    found = system.macro_f1_difference
    if found is None:
        return ""
    return f"{found.score.value:+.3f} ({found.score.low:+.3f} to {found.score.high:+.3f}): {found.words}"


def _count(number: int, what: str) -> str:
    return f"{number} {what} is" if number == 1 else f"{number} {what}s are"


def _some(names: Sequence[str], most: int = _NAMED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

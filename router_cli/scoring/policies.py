"""Ways to choose a formation for every task of a table, and what each would have solved and cost there.

Nothing runs: a choice is worth the mean of the runs that its cell records. A mixture is worth its expectation, so that
a coin brings no noise of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

from router_cli.scoring.outcomes import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Kind = Literal["router", "compare", "fixed", "random", "cascade", "knn", "labels", "oracle"]

NEIGHBOURS = 10
SAME_MIX, SAME_COST = "same-mix coin", "same-cost coin"
FOLDS = 5
# `HumanEval/7`, `HumanEval_7_below_zero`, `mbpp_7_count`: one task in the spellings of the benchmark's editions.
_NUMBERED = re.compile(r"(humaneval|mbpp)[_/](\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Policy:
    """What a policy would have got on each task of a table; NaN where it cannot be said.

    `values` has a row for each of solved, tokens, dollars, seconds and price, and a column a task. `choice` holds
    column numbers (-1: none) where every task gets one topology, None for mixtures and cascades.
    """

    name: str
    kind: Kind
    values: Array
    mix: dict[str, float]
    note: str = ""
    choice: Array | None = None

    @property
    def solved(self) -> Array:
        """Share of the runs that solve each task."""
        found: Array = self.values[0]
        return found

    @property
    def dollars(self) -> Array:
        """What each task costs."""
        found: Array = self.values[2]
        return found

    @property
    def price(self) -> Array:
        """What each task costs in the table's own unit."""
        found: Array = self.values[4]
        return found


@dataclass(frozen=True)
class Wish:
    """What a system wants for a task: a topology (None: no valid decision), and its probabilities where it has them.

    `solving` is how likely it holds each topology to solve the task.
    """

    topology: str | None
    probabilities: Mapping[str, float] | None = None
    solving: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Wished:
    """The wishes of a system, brought to a table. `score` is its probability of anything but the cheapest topology.

    `places` are the table's tasks that it says something about; the other fields follow them. `fallen` wishes named a
    topology that was never executed there.
    """

    places: tuple[int, ...]
    choice: Array
    score: Array | None
    invalid: int
    fallen: int


def keyed(wishes: Mapping[str, Wish]) -> dict[str, Wish]:
    """The wishes by id and by the benchmark's number, so that editions of a benchmark find each other."""
    found = dict(wishes)
    for name, wish in wishes.items():
        if (number := numbered(name)) is not None:
            found.setdefault(number, wish)
    return found


def numbered(name: str) -> str | None:
    """`mbpp 7` for an id of a benchmark's task in any of its spellings, else None."""
    found = _NUMBERED.match(name)
    return f"{found[1].lower()} {found[2]}" if found else None


def wish_for(wishes: Mapping[str, Wish], task: str) -> Wish | None:
    """What `keyed` wishes hold for a task, in whatever spelling of its id."""
    return wishes.get(task) or wishes.get(numbered(task) or "")


def bring(table: Table, wishes: Mapping[str, Wish]) -> Wished:
    """Look the tasks of a table up among `keyed` wishes; a topology that was not executed falls to one that was.

    With probabilities it falls to the most probable executed one, without them a team falls to the cheapest executed
    team, and single to the cheapest of all.
    """
    import numpy as np

    executed = table.executed
    places, choices, scores = [], [], []
    invalid = fallen = 0
    for place, task in enumerate(table.tasks):
        wish = wish_for(wishes, task)
        if wish is None:
            continue
        places.append(place)
        there = [name for j, name in enumerate(table.topologies) if executed[place, j]]
        named = wish.topology
        if named is None:
            invalid += 1
        elif named not in there:
            fallen += 1
            named = _fall(named, there, wish.probabilities)
        choices.append(-1 if named is None else table.topologies.index(named))
        known = wish.probabilities
        scores.append(np.nan if known is None else 1.0 - known.get(table.topologies[0], 0.0))
    score = np.array(scores)
    return Wished(
        tuple(places), np.array(choices, dtype=int), None if np.isnan(score).any() else score, invalid, fallen
    )


def _fall(named: str, there: Sequence[str], probabilities: Mapping[str, float] | None) -> str:
    if probabilities is not None:
        return max(there, key=lambda name: probabilities.get(name, 0.0))  # the cheapest of equals
    teams = [name for name in there if name != "single"]
    return teams[0] if named != "single" and teams else there[0]


# -- worth of a choice ------------------------------------------------------------------------------------------


def chosen(table: Table, name: str, kind: Kind, choice: Array, note: str = "") -> Policy:
    """One topology a task, by column number; -1 is no valid decision: nobody ran, nothing is solved or paid."""
    import numpy as np

    rows, none = np.arange(len(choice)), choice < 0

    taken = np.where(none, 0.0, values_of(table)[:, rows, choice])
    shares = {topology: float((choice == j).mean()) for j, topology in enumerate(table.topologies)}
    return Policy(name, kind, taken, {topology: share for topology, share in shares.items() if share}, note, choice)


def mixed(table: Table, name: str, kind: Kind, weights: Array) -> Policy:
    """A coin with these weights (topologies) on every task, over what was executed there: its expectation."""
    import numpy as np

    share = np.where(table.executed, weights, 0.0)
    total = share.sum(axis=1, keepdims=True)
    share = np.divide(share, total, out=np.full(share.shape, np.nan), where=total > 0)

    expected = np.where(share == 0, 0.0, share * values_of(table)).sum(axis=2)
    mix = {topology: float(weights[j]) for j, topology in enumerate(table.topologies) if weights[j]}
    return Policy(name, kind, expected, mix)


def values_of(table: Table) -> Array:
    """Solved, tokens, dollars, seconds and price of every cell, shape (5, tasks, topologies)."""
    import numpy as np

    return np.array([table.solved, table.tokens, table.dollars, table.seconds, table.price])


# -- policies ---------------------------------------------------------------------------------------------------


def always(table: Table) -> list[Policy]:
    """Every topology on all tasks, the cheapest first; a task on which it was not executed says nothing."""
    import numpy as np

    found = []
    for j, topology in enumerate(table.topologies):
        one = np.full(len(table.tasks), j)
        found.append(chosen(table, f"always {topology}", "fixed", one))
    return found


def coin(table: Table) -> Policy:
    """Any of the executed topologies, all with the same chance."""
    import numpy as np

    return mixed(table, "random", "random", np.full(len(table.topologies), 1 / len(table.topologies)))


def same_mix(table: Table, router: Policy, name: str = SAME_MIX) -> Policy:
    """A coin with the shares of a policy's own choices."""
    import numpy as np

    weights = np.array([router.mix.get(topology, 0.0) for topology in table.topologies])
    return mixed(table, name, "random", weights)


def luck(table: Table, router: Policy, draws: int, seed: int) -> Array:
    """How far the solved share of a policy's own choices, dealt out to the tasks at random, lies from its mean."""
    import numpy as np

    assert router.choice is not None
    coin, rng = same_mix(table, router).solved, np.random.default_rng(seed)
    known = np.flatnonzero(~np.isnan(coin))
    cells = np.where(table.executed, table.solved, coin[:, None])[known]
    cells = np.column_stack([cells, np.zeros(len(known))])  # the last for -1: nobody ran
    found: Array = np.array(
        [cells[np.arange(len(known)), rng.permutation(router.choice)[known]].mean() for _ in range(draws)]
    )
    found -= found.mean()
    return found


def same_price(table: Table, router: Policy, fixed: Sequence[Policy]) -> Policy | None:
    """The best coin between fixed topologies of a policy's mean cost; None where prices are unknown."""
    import numpy as np

    from router_cli.scoring.routing import hull

    if table.unit == "rank" or np.isnan(router.price).any():
        return None
    points = {(float(np.nanmean(one.price)), float(np.nanmean(one.solved))): j for j, one in enumerate(fixed)}
    edge = hull(list(points))
    spent = float(router.price.mean())
    weights = np.zeros(len(fixed))
    right = next((i for i, (cost, _) in enumerate(edge) if cost >= spent), len(edge))
    if right in (0, len(edge)):
        weights[points[edge[min(right, len(edge) - 1)]]] = 1.0
    else:
        (low, _), (high, _) = edge[right - 1], edge[right]
        weights[points[edge[right]]] = part = (spent - low) / (high - low)
        weights[points[edge[right - 1]]] = 1.0 - part
    return mixed(table, SAME_COST, "random", weights)


def cascade(table: Table, strong: int) -> Policy | None:
    """The cheapest topology first, column `strong` where that run's recorded evidence is a failure; both are paid.

    A run without evidence stands, as in `router run`: what cannot be known fires nothing. None where no run of the
    cheapest topology records evidence. A task that either was not executed on is NaN.
    """
    import numpy as np

    found = np.full((5, len(table.tasks)), np.nan)
    escalated, recorded = [], False
    first, then = values_of(table)[:, :, 0], values_of(table)[:, :, strong]
    for i, (runs, *_) in enumerate(table.runs):
        if not runs or not table.executed[i, strong]:
            continue
        recorded = recorded or any(run.evidence is not None for run in runs)
        share = sum(run.evidence is False for run in runs) / len(runs)
        kept = sum(run.solved for run in runs if run.evidence is not False) / len(runs)
        escalated.append(share)
        found[:, i] = first[:, i] + (0.0 if share == 0 else share * then[:, i])
        found[0, i] = kept + share * then[0, i]
    if not recorded or strong == 0:
        return None
    up = sum(escalated) / len(escalated)
    names = table.topologies
    note = f"{names[0]} first, {names[strong]} on the {up:.0%} whose recorded evidence is a failure"
    return Policy("cascade", "cascade", found, {names[0]: 1.0, names[strong]: up}, note)


def doubted(table: Table, strong: int) -> Policy | None:
    """The cheapest topology twice, column `strong` where the two act differently; all is paid.

    The mean over all pairs of recorded runs; None where no task has two that say how they act, NaN for those without.
    """
    import numpy as np

    found = np.full((5, len(table.tasks)), np.nan)
    first, then = values_of(table)[:, :, 0], values_of(table)[:, :, strong]
    differ = []
    for i, (runs, *_) in enumerate(table.runs):
        if len(runs) < 2 or any(run.acts is None for run in runs) or not table.executed[i, strong]:
            continue
        pairs = list(permutations(runs, 2))
        share = sum(one.acts != other.acts for one, other in pairs) / len(pairs)
        kept = sum(one.solved for one, other in pairs if one.acts == other.acts) / len(pairs)
        differ.append(share)
        found[:, i] = 2 * first[:, i] + (0.0 if share == 0 else share * then[:, i])
        found[0, i] = kept + share * then[0, i]
    if not differ or strong == 0:
        return None
    up = sum(differ) / len(differ)
    names = table.topologies
    note = f"{names[0]} twice, {names[strong]} on the {up:.0%} where the two act differently"
    return Policy("cascade by doubt", "cascade", found, {names[0]: 2.0, names[strong]: up}, note)


def nearest(table: Table, train: Table | None, seed: int) -> Policy | None:
    """kNN on the task texts: the topology that solved most of the nearest training tasks, ties to the cheaper.

    Without a training table (the same topologies in the same order), out of fold on the table itself. None where texts
    are missing or training tasks are too few.
    """
    import numpy as np

    if None in table.texts:
        return None
    texts = [str(text) for text in table.texts]
    if train is not None:
        known = [i for i, text in enumerate(train.texts) if text is not None]
        if len(known) < NEIGHBOURS:
            return None
        choice = _vote([str(train.texts[i]) for i in known], train.solved[known], texts)
        return chosen(table, "knn", "knn", choice, f"{NEIGHBOURS} nearest of {len(known)} training tasks")
    if len(texts) < FOLDS * NEIGHBOURS:
        return None
    fold = np.random.default_rng(seed).permutation(np.arange(len(texts)) % FOLDS)
    choice = np.zeros(len(texts), dtype=int)
    for held in range(FOLDS):
        inside, outside = np.flatnonzero(fold == held), np.flatnonzero(fold != held)
        choice[inside] = _vote([texts[i] for i in outside], table.solved[outside], [texts[i] for i in inside])
    choice = np.where(table.executed[np.arange(len(texts)), choice], choice, np.argmax(table.executed, axis=1))
    return chosen(table, "knn", "knn", choice, f"{NEIGHBOURS} nearest tasks of the other {FOLDS - 1} folds of {FOLDS}")


def _vote(texts: Sequence[str], solved: Array, asked: Sequence[str]) -> Array:
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    likeness = vectors.fit_transform(texts)
    close = np.argsort(-(vectors.transform(asked) @ likeness.T).toarray(), axis=1, kind="stable")[:, :NEIGHBOURS]
    near = solved[close]
    known = ~np.isnan(near)
    rate = np.where(known, near, 0.0).sum(axis=1) / np.maximum(1, known.sum(axis=1))
    best: Array = rate.argmax(axis=1)
    return best

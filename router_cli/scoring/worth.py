"""What a router is worth: its choices and those of every simpler policy, replayed over one table of recorded runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from router_cli.schema import Score
from router_cli.scoring import escalation, intervals, metrics, oracles, parts, policies, worth_words
from router_cli.scoring.outcomes import Table, subset
from router_cli.scoring.policies import Kind, Policy, Wish, Wished
from router_cli.scoring.solving import solving
from router_cli.scoring.worth_metrics import field_metrics
from router_cli.scoring.worth_results import PolicyRow, ReplayCounts, Replayed, TeacherRegret

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@dataclass(frozen=True)
class System:
    """Somebody's wishes, `policies.keyed`, by task."""

    name: str
    kind: Kind
    wishes: Mapping[str, Wish]


@dataclass(frozen=True)
class Choosing:
    """How a table is judged."""

    split: str
    resamples: int
    seed: int
    penalty: float | None


def weigh(table: Table, systems: Sequence[System], how: Choosing) -> Replayed | None:
    """Judge the first of `systems` (without one, the cheapest topology) against the others and every simpler policy.

    Only tasks with a choice, two executed topologies or more, are judged, and of these only those that the router says
    something about. None where there are none.
    """
    import numpy as np

    whole = how.split == "all" or set(table.splits) == {None}
    inside = np.array([whole or (split or "test") == how.split for split in table.splits])
    choice = table.executed.sum(axis=1) >= 2
    router = next((one for one in systems if one.kind == "router"), None)
    asked = np.ones(len(table.tasks), dtype=bool)
    if router is not None:
        asked[:] = False
        asked[list(policies.bring(table, router.wishes).places)] = True
    judged = subset(table, np.flatnonzero(inside & choice & asked).tolist())
    if not judged.tasks:
        return None
    learnt = np.array([split == "train" for split in table.splits]) & ~inside
    train = subset(table, np.flatnonzero(learnt).tolist()) if learnt.any() else None
    brought = {one.name: policies.bring(judged, one.wishes) for one in systems}
    counts = ReplayCounts(
        tasks=len(table.tasks),
        judged=len(judged.tasks),
        of_other_splits=int((~inside).sum()),
        of_one_topology=int((inside & ~choice).sum()),
        without_prediction=int((inside & choice & ~asked).sum()),
        invalid=brought[router.name].invalid if router else 0,
        fallen=brought[router.name].fallen if router else 0,
    )
    return _judge(judged, train, router, systems, brought, counts, how)


def _judge(
    table: Table,
    train: Table | None,
    router: System | None,
    systems: Sequence[System],
    brought: Mapping[str, Wished],
    counts: ReplayCounts,
    how: Choosing,
) -> Replayed:
    import numpy as np

    fixed = policies.always(table)
    rates = [float(np.nanmean(one.solved)) for one in fixed]
    strong = int(np.argmax(rates))
    own = [_told(table, one, brought[one.name]) for one in systems if brought[one.name].places]
    first = own[0] if own and own[0].kind == "router" else fixed[0]
    score = brought[first.name].score if first.kind == "router" else None
    oracle, crossed = oracles.oracle(table)
    others = [
        policies.coin(table),
        policies.same_mix(table, first) if first.kind == "router" else None,
        policies.same_price(table, first, fixed) if first.kind == "router" else None,
        policies.cascade(table, strong),
        policies.doubted(table, strong),
        _priced(table, train, router, strong, how),
        policies.nearest(table, train, how.seed),
        oracle,
    ]
    everybody = [first, *(one for one in (*own, *fixed) if one is not first), *(one for one in others if one)]
    rows = [_fair(table, first, row, how) for row in _rows(everybody, how)]
    metric, curve = field_metrics(table, first, score, fixed, strong, how.resamples, how.seed)
    noise = oracles.rerun_noise(table, first, fixed[strong], strong)
    found = Replayed(
        name=table.name,
        benchmark=table.benchmark,
        worker=table.worker,
        topologies=table.topologies,
        unit=table.unit,
        counts=counts,
        policies=tuple(rows),
        metrics=metric,
        noise=noise,
        oracle=oracles.fit(table, oracle, crossed, fixed, noise),
        teacher=_teacher(table, own, brought, oracle, how),
        curve=tuple(curve),
        solving=solving(table, router.wishes, how.resamples, how.seed) if router else None,
        summary=("", ""),
    )
    return found.model_copy(
        update={
            "summary": worth_words.summary(found),
            "warnings": tuple(worth_words.warnings(found)),
            "notes": tuple(worth_words.notes(found, how.penalty, train is not None)),
        }
    )


def _fair(table: Table, first: Policy, row: PolicyRow, how: Choosing) -> PolicyRow:
    """Against a coin of its own mix or cost, whom a router sends where is also luck: the interval allows for it."""
    found = row.solved_difference
    if row.name not in (policies.SAME_MIX, policies.SAME_COST) or found is None or first.choice is None:
        return row
    score = intervals.allowing(found.score, policies.luck(table, first, how.resamples, how.seed))
    return row.model_copy(update={"solved_difference": parts.told(score)})


def _priced(table: Table, train: Table | None, router: System | None, strong: int, how: Choosing) -> Policy | None:
    if how.penalty is None:
        return None
    return escalation.priced_cascade(table, train, router.wishes if router else None, strong, how.penalty)


def _told(table: Table, system: System, wished: Wished) -> Policy:
    """A system's choices as a policy; tasks that it says nothing about are NaN."""
    import numpy as np

    places = list(wished.places)
    part = policies.chosen(subset(table, places), system.name, system.kind, wished.choice)
    if len(places) == len(table.tasks):
        return replace(part, note=_fallen(wished))

    full = np.full((len(part.values), len(table.tasks)), np.nan)
    full[:, places] = part.values
    note = f"says something about {len(places)} of {len(table.tasks)} tasks"
    return replace(part, values=full, choice=None, note="; ".join(filter(None, (note, _fallen(wished)))))


def _fallen(wished: Wished) -> str:
    return f"{wished.fallen} of its topologies were not executed: replaced" if wished.fallen else ""


# -- the table of policies --------------------------------------------------------------------------------------


def _rows(everybody: Sequence[Policy], how: Choosing) -> list[PolicyRow]:
    import numpy as np

    first, n = everybody[0], len(everybody[0].solved)
    values: dict[str, Array] = {}
    for place, one in enumerate(everybody):
        named = zip(("solved", "tokens", "dollars", "seconds"), one.values, strict=False)
        values |= {f"{place} {name}": each for name, each in named}
        if how.penalty is not None:
            values[f"{place} bill"] = one.dollars + how.penalty * (1 - one.solved)
        values[f"{place} by solved"] = first.solved - one.solved
        values[f"{place} by dollars"] = first.dollars - one.dollars
    resampled = intervals.bootstrap(
        {name: partial(metrics.mean, one) for name, one in values.items()}, n, how.resamples, how.seed
    )

    def score(name: str) -> Score | None:
        # A mean over a part of what was run says nothing about money or time.
        place, _, kind = name.partition(" ")
        run = ~np.isnan(values[f"{place} by solved" if kind.startswith("by ") else f"{place} solved"])
        known = ~np.isnan(values[name])
        if not known.any() or not known[run].all():
            return None
        taken = values[name][known]
        if kind == "solved" and np.isin(taken, (0, 1)).all():
            return metrics.wilson(int(taken.sum()), len(taken))  # a bootstrap interval collapses at 0 and 1
        return resampled.score(name).model_copy(update={"n": len(taken)})

    rows = []
    for place, one in enumerate(everybody):
        solved = score(f"{place} solved")
        assert solved is not None  # every policy says something
        difference, test = None, None
        if place and (found := score(f"{place} by solved")) is not None:
            difference = parts.told(found)
            test = intervals.mcnemar(first.solved, one.solved)
        rows.append(
            PolicyRow(
                name=one.name,
                kind=one.kind,
                solved=solved,
                tokens=score(f"{place} tokens"),
                dollars=score(f"{place} dollars"),
                seconds=score(f"{place} seconds"),
                bill=score(f"{place} bill") if how.penalty is not None else None,
                mix=one.mix,
                solved_difference=difference,
                dollars_difference=score(f"{place} by dollars") if place else None,
                mcnemar=test,
                note=one.note,
            )
        )
    return rows


# -- the teacher -----------------------------------------------------------------------------------------------------


def _teacher(
    table: Table, own: Sequence[Policy], brought: Mapping[str, Wished], oracle: Policy, how: Choosing
) -> TeacherRegret | None:
    import numpy as np

    labels = next((one for one in own if one.kind == "labels"), None)
    if labels is None:
        return None
    coin = policies.same_mix(table, labels)
    known = np.flatnonzero(~np.isnan(labels.solved) & ~np.isnan(oracle.solved))
    if not len(known):
        return None
    values = {"coin": labels.solved - coin.solved, "regret": oracle.solved - labels.solved}
    measured = {name: partial(metrics.mean, each[known]) for name, each in values.items()}
    resampled = intervals.bootstrap(measured, len(known), how.resamples, how.seed)
    wished = brought[labels.name]
    part = subset(table, list(wished.places))
    dealt = policies.luck(part, policies.chosen(part, labels.name, "labels", wished.choice), how.resamples, how.seed)
    over = parts.told(intervals.allowing(resampled.score("coin"), dealt))
    return TeacherRegret(tasks=len(known), over_coin=over, regret=resampled.score("regret"))

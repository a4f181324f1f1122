"""What routers and simpler policies are worth on the carried tables: `python -m benchmarks.worth`.

Prints the table of docs/worth.md. Baselines of the same run: fixed topologies, a fair coin and one of each policy's own
mix (a cascade: of its own cost), kNN, the length rule, the cascade where evidence is recorded, and the oracle. What
learns from outcomes learns from those of MBPP-ET, of the same worker, and is judged on the others.

    LABELS ...          label files, judged as the teacher's labels on MBPP; their roles: `ROUTER_DECISION__ROLES`
    --routers FOLDER    also judge routers, all of the quickstart's recipe: FOLDER/rubric, its own; FOLDER/labels,
                        trained on LABELS; FOLDER/outcomes-WORKER, on the labels that MBPP-ET's outcomes give; and
                        FOLDER/solve-WORKER, on these outcomes with --objective solve, which chooses by value. Those
                        that are not there yet are trained: two to five minutes each on two cores
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from router_cli.backends.local import META
from router_cli.dataset import read_labels
from router_cli.from_outcomes import label_from_outcomes
from router_cli.infer import infer
from router_cli.jsonl import write_rows
from router_cli.quickstart import TRAINING, quickstart
from router_cli.replay import replay, write_tasks
from router_cli.schema import Score
from router_cli.scoring import intervals, metrics, oracles, policies
from router_cli.scoring.baselines import fit_baselines, out_of_fold
from router_cli.scoring.outcomes import Table, read_outcomes, tables
from router_cli.scoring.policies import Policy
from router_cli.scoring.worth_results import Replayed
from router_cli.sections import OUTCOME_TABLES, SMALL_MODEL
from router_cli.settings import Settings, load
from router_cli.space import DecisionSpace
from router_cli.tasks import read_tasks
from router_cli.teachers.heuristic import decide
from router_cli.train import train

TAUGHT = "mbpp-et-mapcoder"
WORKERS = ("gpt-3.5-turbo", "gpt-4-turbo")
LAST_LAYERS = 10  # a third of SmolLM2's, as in the quickstart


@dataclass(frozen=True)
class Line:
    """A policy of a table: what it solves and costs, and its paired differences in solved share, where they exist."""

    name: str
    solved: Score
    dollars: float | None
    over: dict[str, tuple[Score, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", nargs="*")
    parser.add_argument("--routers", type=Path)
    parser.add_argument("--resamples", type=int, default=2000)
    given = parser.parse_args()
    print("| table | policy | solved | $ a task | minus single | minus chain | minus a coin of its mix |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in OUTCOME_TABLES:
            for table in tables(read_outcomes(name)):
                for place, line in enumerate(judged(name, table, given, Path(scratch))):
                    print(shown(table.name if place == 0 else "", line), flush=True)


def judged(name: str, table: Table, given: argparse.Namespace, folder: Path) -> Iterator[Line]:
    """Every policy on one table of a carried file."""
    options: dict[str, Any] = {"outcomes": name, "worker": table.worker, "output_dir": str(folder)}
    settings = load({f"eval.{key}": ("", value) for key, value in options.items()})
    settings = settings.with_values(eval__resamples=given.resamples)
    how = given.resamples, settings.eval.seed
    fixed = policies.always(table)
    for one in (*fixed, policies.coin(table)):
        yield against(table, one, {}, *how)
    texts = None not in table.texts
    wishes: dict[str, Path] = {}
    if texts:
        tasks = write_tasks(settings, folder / "tasks.jsonl")
        wishes = {"rules": rules(tasks, folder / "rules.jsonl")}
        if table.worker in WORKERS:
            wishes["length rule"] = length_rule(name, table, folder / "length.jsonl", settings.eval.seed)
        if given.routers:
            wishes |= routed(name, table.worker, tasks, given)
    if given.labels and name.startswith("mbpp"):
        wishes["GPT-4's labels"] = labelled(given.labels, folder / "labelled.jsonl")
    for who, predictions in wishes.items():
        yield line(replay(settings.with_values(eval__predictions=str(predictions))).tables[0], who)
    if (near := policies.nearest(table, None, settings.eval.seed)) is not None:
        yield against(table, near, {"coin": policies.same_mix(table, near)}, *how)
    strong = max(range(len(fixed)), key=lambda place: float(fixed[place].solved.mean()))
    if (climbs := policies.cascade(table, strong)) is not None:
        yield against(table, climbs, {"coin": policies.same_price(table, climbs, fixed)}, *how)
    if table.worker in WORKERS and not name.startswith("mbpp"):
        yield learnt_cascade(table, *how)
    yield against(table, oracles.oracle(table)[0], {}, *how)


def line(found: Replayed, name: str) -> Line:
    """The judged system of a replay, with its differences to the fixed topologies and to a coin of its own mix."""
    row, over = found.policies[0], {}
    for kind, other in (("single", "always single"), ("chain", "always chain"), ("coin", "same-mix coin")):
        for one in found.policies:
            if one.name == other and one.solved_difference:
                over[kind] = one.solved_difference.score, one.solved_difference.words
    return Line(name, row.solved, row.dollars.value if row.dollars else None, over)


def against(table: Table, one: Policy, others: Mapping[str, Policy | None], resamples: int, seed: int) -> Line:
    """A policy with its differences to the fixed topologies, but for itself, and to `others`, paired by task."""
    import numpy as np

    fixed = dict(zip(table.topologies, policies.always(table), strict=True))
    pairs = {kind: other for kind, other in {**fixed, **others}.items() if other is not None and other.name != one.name}
    values = {kind: one.solved - other.solved for kind, other in pairs.items()}
    measured = {kind: partial(metrics.mean, value) for kind, value in {"": one.solved, **values}.items()}
    found = intervals.bootstrap(measured, len(one.solved), resamples, seed)
    hits, single = int(one.solved.sum()), np.isin(one.solved, (0, 1)).all()
    solved = metrics.wilson(hits, len(one.solved)) if single else found.score("")
    scores = {kind: found.score(kind) for kind in values}
    if "coin" in scores and one.choice is not None:
        scores["coin"] = intervals.allowing(scores["coin"], policies.luck(table, one, resamples, seed))
    over = {kind: (score, str(intervals.verdict(score))) for kind, score in scores.items()}
    cost = float(one.dollars.mean())
    return Line(one.name, solved, None if np.isnan(cost) else cost, over)


def shown(table: str, one: Line) -> str:
    """One row of the printed table."""

    def told(kind: str) -> str:
        if kind not in one.over:
            return ""
        score, words = one.over[kind]
        return f"{score.value:+.3f} ({score.low:+.3f} to {score.high:+.3f}): {words}"

    cost = "" if one.dollars is None else f"{one.dollars:.4f}"
    solved = f"{one.solved.value:.3f} ({one.solved.low:.3f} to {one.solved.high:.3f}), {one.solved.n}"
    return f"| {table} | {one.name} | {solved} | {cost} | {told('single')} | {told('chain')} | {told('coin')} |"


# -- who decides ------------------------------------------------------------------------------------------------


def rules(tasks: str, output: Path) -> Path:
    """The offline teacher's decisions."""
    space = DecisionSpace(tuple(load().decision.roles))
    rows = (
        {"task_id": task.id, "decision": decide(task.text, space)[0].model_dump(mode="json")}
        for task in read_tasks([tasks])
    )
    write_rows(output, rows)
    return output


def length_rule(name: str, table: Table, output: Path, seed: int) -> Path:
    """A small decision tree on characters and words, fitted on MBPP-ET's outcome labels; there, out of fold."""
    (taught,) = tables(read_outcomes(TAUGHT, table.worker))
    asked = [str(text) for text in table.texts]
    if name.startswith("mbpp"):
        found = out_of_fold(asked, best(table), table.topologies, seed)
    else:
        known = [str(text) for text in taught.texts]
        found = fit_baselines(known, best(taught), asked, table.topologies, seed)
    rule = next(one for one in found if one.name == "length")
    space = DecisionSpace(tuple(load().decision.roles))
    rows = []
    for task, text, place in zip(table.tasks, asked, rule.labels, strict=True):
        own = DecisionSpace(space.roles, (table.topologies[int(place)],))
        rows.append({"task_id": task, "decision": decide(text, own)[0].model_dump(mode="json")})
    write_rows(output, rows)
    return output


def labelled(paths: Sequence[str], output: Path) -> Path:
    """The teacher's labels as predictions; the old generator names MBPP's tasks by their number alone."""
    decision = load().decision
    space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
    rows: dict[str, dict[str, Any]] = {}
    for one in read_labels(list(paths), space, on_unusable=lambda *_: None):
        name = f"mbpp_{one.task_id}" if one.task_id.isdigit() else one.task_id
        rows.setdefault(name, {"task_id": name, "decision": one.decision.model_dump(mode="json")})
    write_rows(output, rows.values())
    return output


def best(table: Table) -> list[int]:
    """The outcome labels: the cheapest topology that solves the task, the cheapest of all where none does."""
    import numpy as np

    return [int(np.argmax(row)) for row in np.nan_to_num(table.solved)]


def routed(name: str, worker: str, tasks: str, given: argparse.Namespace) -> dict[str, Path]:
    """Predictions of the trained routers; those that learnt from MBPP say nothing of MBPP itself."""
    folder = given.routers
    asked: dict[str, tuple[Path, dict[str, Any]]] = {"router, rubric": (rubric(folder / "rubric"), {})}
    if not name.startswith("mbpp"):
        if given.labels:
            asked["router, GPT-4's labels"] = taught(given.labels, folder / "labels"), {}
        if worker in WORKERS:
            asked["router, outcomes"] = outcomes(folder / f"outcomes-{worker}", worker, "imitate"), {}
            asked["router, by value"] = outcomes(folder / f"solve-{worker}", worker, "solve"), by_value(worker)
    found = {}
    for who, (adapter, how) in asked.items():
        # The two tables of MBPP ask the same.
        found[who] = folder / f"{adapter.parent.name}.{'mbpp' if name.startswith('mbpp') else name}.jsonl"
        if not found[who].exists():
            whole = found[who].with_suffix(".part")
            values = {"adapter": adapter, "data": [tasks], "output": str(whole), **how}
            infer(load().with_values(**{f"infer__{key}": value for key, value in values.items()}))
            whole.rename(found[who])
    return found


def rubric(folder: Path) -> Path:
    """The quickstart's router."""
    if not (folder / "report.json").exists():
        quickstart(load().with_values(quickstart__output_dir=folder))
    return folder / "adapter"


def taught(labels: Sequence[str], folder: Path) -> Path:
    """A router trained on the teacher's labels."""
    return trained(load().with_values(train__data=list(labels)), folder / "adapter")


def outcomes(folder: Path, worker: str, objective: str) -> Path:
    """A router trained on what this worker's runs on MBPP-ET say, of the topologies that they know."""
    labels = folder / "labels.jsonl"
    known = tables(read_outcomes(TAUGHT, worker))[0].topologies
    settings = load().with_values(decision__topologies=list(known), train__objective=objective)
    if not labels.exists():
        made = {"from_outcomes": TAUGHT, "worker": worker, "output": str(labels)}
        label_from_outcomes(settings.with_values(**{f"label__{key}": value for key, value in made.items()}))
    return trained(settings.with_values(train__data=[str(labels)]), folder / "adapter")


def trained(settings: Settings, adapter: Path) -> Path:
    """An adapter by the quickstart's recipe, once."""
    if not (adapter / META).exists():
        values = {"model": SMALL_MODEL, "output_dir": adapter, "lora_last_layers": LAST_LAYERS}
        train(settings.with_values(**TRAINING, **{f"train__{key}": value for key, value in values.items()}))
    return adapter


def by_value(worker: str) -> dict[str, Any]:
    """Prices of MBPP-ET, and that value of a solved task at which both fixed topologies are worth the same there.

    There the choice matters most: a lower value makes single right nearly everywhere, a higher one the chain.
    """
    (learnt,) = tables(read_outcomes(TAUGHT, worker))
    cheap, dear = policies.always(learnt)
    worth = (dear.dollars.mean() - cheap.dollars.mean()) / (dear.solved.mean() - cheap.solved.mean())
    prices = zip(learnt.topologies, (cheap.dollars.mean(), dear.dollars.mean()), strict=True)
    return {"value_of_solving": float(worth), "price": [f"{name}={price:.6f}" for name, price in prices]}


# -- a cascade that learns when to go on ------------------------------------------------------------------------


def learnt_cascade(table: Table, resamples: int, seed: int) -> Line:
    """One agent first, the chain where the first run's tokens foretell a failure: what a system sees for nothing.

    The forecast (logistic regression on the logarithms of prompt and completion tokens) and its threshold, the one that
    gains most over the coin of the same cost, come from MBPP and MBPP-ET, of the same worker.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    taught = [tables(read_outcomes(name, table.worker))[0] for name in ("mbpp-mapcoder", TAUGHT)]
    failed = np.concatenate([1 - one.solved[:, 0] for one in taught])
    model = LogisticRegression().fit(np.concatenate([seen(one) for one in taught]), failed)
    forecasts = [model.predict_proba(seen(one))[:, 1] for one in taught]

    def gain(threshold: float) -> float:
        return sum(
            float(np.mean(over_line(one, fore >= threshold))) for one, fore in zip(taught, forecasts, strict=True)
        )

    threshold = max(np.unique(np.concatenate(forecasts)), key=gain)
    up = model.predict_proba(seen(table))[:, 1] >= threshold
    policy = cascaded(table, up)
    values = {
        "solved": policy.solved,
        "single": policy.solved - table.solved[:, 0],
        "chain": policy.solved - table.solved[:, 1],
        "coin": over_line(table, up),
    }
    measured = {key: partial(metrics.mean, value) for key, value in values.items()}
    found = intervals.bootstrap(measured, len(up), resamples, seed)
    over = {key: (found.score(key), str(intervals.verdict(found.score(key)))) for key in ("single", "chain", "coin")}
    name = f"cascade by tokens, {up.mean():.0%} escalated (coin: of its cost)"
    return Line(name, found.score("solved"), float(policy.dollars.mean()), over)


def seen(table: Table) -> Any:
    """What the first run shows before anybody judges it: the logarithms of its prompt and completion tokens.

    Standardised by table: prompts of HumanEval are longer than MBPP's whatever comes of them, and a system that has
    seen some tasks of its own knows their mean.
    """
    import numpy as np

    first = [cells[0][0] for cells in table.runs]
    logs = np.log1p([[run.prompt_tokens or 0, run.completion_tokens or 0] for run in first])
    return (logs - logs.mean(axis=0)) / logs.std(axis=0)


def cascaded(table: Table, up: Any) -> Policy:
    """The cheapest topology, and the next one as well where `up`; both are paid."""
    import numpy as np

    first, then = policies.values_of(table)[:, :, 0], policies.values_of(table)[:, :, 1]
    values = first + np.where(up, then, 0.0)
    values[0] = np.where(up, then[0], first[0])
    return Policy("cascade", "cascade", values, {})


def over_line(table: Table, up: Any) -> Any:
    """Solved by the cascade minus solved by the coin between the fixed topologies that costs as much, by task."""
    policy = cascaded(table, up)
    low, high = table.dollars[:, 0].mean(), table.dollars[:, 1].mean()
    share = min(1.0, max(0.0, float((policy.dollars.mean() - low) / (high - low))))
    return policy.solved - (1 - share) * table.solved[:, 0] - share * table.solved[:, 1]


if __name__ == "__main__":
    main()

"""A router on labels that a teacher really gave, against simpler classifiers.

`python -m benchmarks.labels --data FILE`
K-fold cross-validation over the file's rows, stratified by topology: in each fold `train` learns from the other folds'
rows (those nearly of a held-out text are left out), `infer` decides the held-out ones, and every baseline of `router
eval` is fitted on the very same rows. Prints macro-F1 and AUROC of the topology, where the positive class is every
formation but `single`: a task's score is the probability that it needs a team.

AUROC is the mean over folds, since scores of different fits are not on one scale; macro-F1 counts all rows at once.
Intervals are bootstrapped over tasks, those of differences on the same resamples (the fits themselves are not drawn
anew, so that they say nothing about another training of the same recipe).

A fold's adapter and predictions stay under `--work`, so the same command goes on where it was stopped. The recipe is
the quickstart's; `--set train.epochs=2` changes it, under another `--work`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from router_cli import dataset
from router_cli.backends.local import features
from router_cli.console import Console
from router_cli.infer import infer
from router_cli.jsonl import read_rows, write_json, write_rows
from router_cli.models import resolve
from router_cli.progress import Progress
from router_cli.quickstart import TRAINING, _layers
from router_cli.schema import Example
from router_cli.scoring import baselines, intervals, metrics
from router_cli.settings import Settings, load
from router_cli.space import TOPOLOGIES, DecisionSpace
from router_cli.train import train

ROUTER = "router"
SEED = 42


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="label file of any shape that `router train` reads")
    parser.add_argument("--model", default="smollm2-135m", help="base model of the router and of the linear probe")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=lambda text: [int(part) for part in text.split(",")], help="these folds alone")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark-labels"))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another recipe")
    parser.add_argument("--baselines", action="store_true", help="train nothing: the rivals alone")
    chosen = parser.parse_args()
    progress: Progress = Console()
    settings = recipe(chosen.data, chosen.model, dict(one.split("=", 1) for one in chosen.set), progress)
    space = DecisionSpace(
        tuple(settings.decision.roles), tuple(settings.decision.topologies), settings.decision.step_bound
    )
    examples = list(dataset.read_labels([chosen.data], space))
    place = folds(examples, chosen.folds)
    states = probe_features(examples, settings, chosen.work, progress)
    found: dict[str, dict[int, list[float]]] = {}
    for fold in chosen.only or range(chosen.folds):
        own = settings.with_values(train__data=[str(fold_file(chosen.data, examples, place, fold, chosen.work))])
        learnt = [example.task_id for example in dataset.build(own, space).train]
        if not chosen.baselines:
            found.setdefault(ROUTER, {}).update(routed(own, examples, chosen.work / f"fold{fold}", progress))
        file = chosen.work / f"fold{fold}.rivals.json"
        if not file.exists():
            write_json(file, rivals(examples, learnt, place, fold, states, space))
        for name, rows in json.loads(file.read_text(encoding="utf-8")).items():
            found.setdefault(name, {}).update({int(i): shares for i, shares in rows.items()})
    report(found, examples, place, space.topologies, chosen.work)


def recipe(data: str, model: str, changed: dict[str, str], progress: Progress) -> Settings:
    """The quickstart's training, for the roles and the topologies of the data."""
    plain = load()
    rows = list(dataset.read_labels([data], DecisionSpace(dataset.roles_of([data]))))
    seen = {example.decision.topology for example in rows}
    layers = _layers(resolve(model, plain, progress))
    given = {
        "decision.roles": ",".join(dataset.roles_of([data])),
        "decision.topologies": ",".join(name for name in TOPOLOGIES if name in seen),
        "train.model": model,
        # The test fold judges: nothing else is held out, and the last epoch is the one that is taken.
        "train.validation_share": 0,
        "train.lora_last_layers": max(1, layers // 3),
        **{key.replace("__", "."): value for key, value in TRAINING.items()},
        **changed,
    }
    return load({key: (f"--set {key}", value) for key, value in given.items()})


def folds(examples: list[Example], count: int) -> list[int]:
    """Every row's fold."""
    from sklearn.model_selection import StratifiedKFold

    names = [example.decision.topology for example in examples]
    split = StratifiedKFold(count, shuffle=True, random_state=SEED).split(names, names)
    place = [0] * len(examples)
    for fold, (_, held_out) in enumerate(split):
        for i in held_out:
            place[int(i)] = fold
    return place


def fold_file(data: str, examples: list[Example], place: list[int], fold: int, work: Path) -> Path:
    """The rows as `router train` takes them: those of the fold are the test split, the others bring no split."""
    rows = [
        {"id": example.task_id, "task": example.text, "decision": example.decision.model_dump(mode="json")}
        | ({"split": "test"} if own == fold else {})
        for example, own in zip(examples, place, strict=True)
    ]
    file = work / f"fold{fold}.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    write_rows(file, rows)
    return file


def routed(settings: Settings, examples: list[Example], folder: Path, progress: Progress) -> dict[int, list[float]]:
    """Train and decide one fold: row -> probabilities in the order of the topologies."""
    output = folder.with_name(f"{folder.name}.predictions.jsonl")
    train(settings.with_values(train__output_dir=folder), progress)
    served = settings.with_values(
        infer__adapter=folder, infer__data=settings.train.data, infer__split="test", infer__output=str(output)
    )
    infer(served, progress=progress)
    number = {example.task_id: i for i, example in enumerate(examples)}
    names = settings.decision.topologies
    return {
        number[str(row["task_id"])]: [row["topologies"][name] for name in names] for _, row in read_rows(str(output))
    }


def probe_features(examples: list[Example], settings: Settings, work: Path, progress: Progress) -> Any:
    """The linear probe's matrix, computed once."""
    import numpy as np

    file = work / "states.npy"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        np.save(file, features([example.text for example in examples], settings.train.model, settings, progress))
    return np.load(file)


def rivals(
    examples: list[Example], learnt: list[str], place: list[int], fold: int, states: Any, space: DecisionSpace
) -> dict[str, dict[int, list[float]]]:
    """Every baseline's probabilities for the fold's rows, fitted on the rows that the router learnt from."""
    known = set(learnt)
    fitted = [i for i, example in enumerate(examples) if example.task_id in known]
    held_out = [i for i, own in enumerate(place) if own == fold]
    judged = baselines.fit_baselines(
        [examples[i].text for i in fitted],
        [space.topologies.index(examples[i].decision.topology) for i in fitted],
        [examples[i].text for i in held_out],
        space.topologies,
        SEED + fold,
        (states[fitted], states[held_out]),
    )
    return {
        one.name: {i: row.tolist() for i, row in zip(held_out, one.probabilities, strict=True)}
        for one in judged
        if one.name != "random"
    }


def auroc(team: Any, scores: Any, place: Any, weights: Any) -> Any:
    """Mean over folds of the share of pairs (a team's task, a single's) that the scores order rightly, ties half."""
    import numpy as np

    found = []
    for fold in np.unique(place):
        here, there = np.flatnonzero((place == fold) & team), np.flatnonzero((place == fold) & ~team)
        right = np.sign(scores[here][:, None] - scores[there][None, :]) / 2 + 0.5
        of_teams, of_singles = weights[..., here], weights[..., there]
        pairs = of_teams.sum(-1) * of_singles.sum(-1)
        found.append(((of_teams @ right) * of_singles).sum(-1) / np.where(pairs > 0, pairs, np.nan))
    return np.nanmean(found, axis=0)


def report(
    found: dict[str, dict[int, list[float]]],
    examples: list[Example],
    place: list[int],
    topologies: tuple[str, ...],
    work: Path,
) -> None:
    """Print the table and keep the figures."""
    import numpy as np

    rows = sorted(next(iter(found.values())))
    gold = np.array([topologies.index(examples[i].decision.topology) for i in rows])
    team = np.array([examples[i].decision.topology != "single" for i in rows])
    where = np.array([place[i] for i in rows])
    judged: dict[str, metrics.Metric] = {}
    for name, each in found.items():
        shares = np.array([each[i] for i in rows])
        judged[f"F1 {name}"] = partial(metrics.macro_f1, gold, shares.argmax(1), len(topologies))
        score = 1 - shares[:, topologies.index("single")]
        judged[f"AUROC {name}"] = partial(auroc, team, score, where)
    drawn = intervals.bootstrap(judged, len(rows))
    print(f"{len(rows)} tasks, {team.mean():.0%} for a team; 95 % intervals")
    print("| | macro-F1 | AUROC | router minus it: macro-F1 | AUROC |\n|---|---|---|---|---|")
    for name in found:
        cells = [shown(drawn.score(f"{metric} {name}")) for metric in ("F1", "AUROC")]
        if ROUTER in found and name != ROUTER:
            cells += [
                shown(drawn.difference(f"{metric} {ROUTER}", f"{metric} {name}"), "+") for metric in ("F1", "AUROC")
            ]
        print(f"| {name} | {' | '.join(cells)} |")
    write_json(work / "figures.json", {name: drawn.score(name).model_dump(mode="json") for name in judged})


def shown(score: Any, sign: str = "") -> str:
    return f"{score.value:{sign}.3f} ({score.low:{sign}.3f} to {score.high:{sign}.3f})"


if __name__ == "__main__":
    main()

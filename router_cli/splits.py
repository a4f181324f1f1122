"""Which examples are trained on and which are held out: split by task, stratified, independent of the rows' order.

Order is decided by a hash of seed and text, so that another row in the file, or the rows shuffled, moves few others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from router_cli.schema import Example, Split
from router_cli.tasks import near_duplicates, normalised


def place(
    examples: Sequence[Example], test: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[tuple[str, str]]]:
    """Give every example without a split one, and name the pairs of near-duplicates whose given splits differ.

    Near-duplicates and rows of one task stay together: where one of them has a split, the others follow, and those
    that would follow into the test split are left out.
    """
    everything = [*examples, *test]
    near = near_duplicates(example.text for example in everything)
    given = [example.split for example in everything]
    straddling = [
        (everything[i].task_id, everything[j].task_id)
        for i, j, _ in near
        if given[i] and given[j] and given[i] != given[j]
    ]
    if None not in given:
        return list(examples), straddling
    together = _groups(everything, [(i, j) for i, j, _ in near])
    splits: dict[int, Split] = {}
    free: list[list[int]] = []
    for group in together:
        theirs = [given[i] for i in group]
        follow = next((split for split in ("test", "validation", "train") if split in theirs), None)
        if follow is None:
            free.append(group)
        else:
            splits |= dict.fromkeys(group, follow)
    splits |= dict.fromkeys(_held_out(free, everything, share, seed), "validation")
    placed = []
    for i, example in enumerate(examples):
        split = example.split or splits.get(i, "train")
        if split != "test":
            placed.append(example.model_copy(update={"split": split}))
    return placed, straddling


def _groups(examples: Sequence[Example], pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The connected groups of examples that are near-duplicates of each other or bear the same id (union-find)."""
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    named: dict[str, int] = {}
    for i, j in [*pairs, *((named.setdefault(one.task_id, i), i) for i, one in enumerate(examples))]:
        parent[root(j)] = root(i)
    members: dict[int, list[int]] = {}
    for i in range(len(examples)):
        members.setdefault(root(i), []).append(i)
    return list(members.values())


def _held_out(groups: Sequence[list[int]], examples: Sequence[Example], share: float, seed: int) -> list[int]:
    """Whole groups with about `share` of the rows of every topology, and never all of one topology."""
    strata: dict[str, list[list[int]]] = {}
    for group in sorted(groups, key=lambda group: min(_rank(examples[i], seed) for i in group)):
        counts = Counter(examples[i].decision.topology for i in group)
        strata.setdefault(max(sorted(counts), key=counts.__getitem__), []).append(group)
    chosen: list[int] = []
    due = 0.0  # carried on, so that many small classes do not round to nothing
    for _, stratum in sorted(strata.items()):
        left = sum(map(len, stratum))
        due += share * left
        for group in stratum:
            if len(group) <= due + 0.5 and len(group) < left:
                chosen += group
                due -= len(group)
                left -= len(group)
    return chosen


def subset(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """At most `limit` examples with the same shares of topologies, in the order in which they came.

    The choice depends on texts and seed alone, not on that order (largest remainders).
    """
    if limit >= len(examples):
        return list(examples)
    classes: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda example: _rank(example, seed)):
        classes.setdefault(example.decision.topology, []).append(example)
    exact = {topology: limit * len(members) / len(examples) for topology, members in sorted(classes.items())}
    quota = {topology: int(value) for topology, value in exact.items()}
    by_remainder = sorted(exact, key=lambda topology: quota[topology] - exact[topology])
    for topology in by_remainder[: limit - sum(quota.values())]:
        quota[topology] += 1
    chosen = {id(example) for topology, members in classes.items() for example in members[: quota[topology]]}
    return [example for example in examples if id(example) in chosen]


def _rank(example: Example, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{normalised(example.text)}".encode()).hexdigest()

"""`router eval --flip`: how many decisions change though the task does not.

Three ways to ask the same thing otherwise: typing errors, another opening line, and the roles in another order. A
router that changes its mind over them hears the form and not the task.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from router_cli.progress import SILENT, Progress
from router_cli.schema import Decision, Task
from router_cli.scoring.gold import cjk
from router_cli.scoring.metrics import wilson
from router_cli.scoring.results import Changed, Flip

if TYPE_CHECKING:
    from router_cli.backends.local import LocalBackend

TYPOS = 0.05
"""Share of the words that get one: two letters swapped, which is the error that fingers make most."""
BATCH = 32

_WORD = re.compile(r"[A-Za-z]{4,}")
_OPENING = {False: "Please help me with the following.\n\n", True: "请帮我处理下面的任务。\n\n"}


def flip_test(backend: LocalBackend, tasks: Sequence[Task], seed: int, progress: Progress = SILENT) -> Flip:
    """Decide for `tasks` as they are and in each other way; the shares of topologies and decisions that change."""
    space = backend.space
    texts = [task.text for task in tasks]
    asked: list[tuple[str, str, LocalBackend, list[str]]] = [
        ("typos", f"two letters swapped in {TYPOS:.0%} of the words", backend, [typos(one, seed) for one in texts]),
        ("header", "another opening line", backend, [_OPENING[cjk(one)] + one for one in texts]),
    ]
    if len(space.roles) > 1:
        other = backend.over(replace(space, roles=space.roles[::-1]))
        asked.append(("roles", "the list of roles turned round", other, texts))
    with progress.bar("flip test", (1 + len(asked)) * len(texts)) as bar:

        def decide(one: LocalBackend, said: Sequence[str]) -> list[Decision | None]:
            found: list[Decision | None] = []
            for start in range(0, len(said), BATCH):
                part = one.decide(said[start : start + BATCH])
                # In the backend's own space an order of roles that means nothing is one and the same.
                found += [space.resolve(choice.decision.model_dump(mode="json")).decision for choice in part]
                bar.advance(len(part))
            return found

        first = decide(backend, texts)
        changed = []
        for name, what, one, said in asked:
            second = decide(one, said)
            pairs = list(zip(first, second, strict=True))
            topologies = sum(_topology(a) != _topology(b) for a, b in pairs)
            changed.append(
                Changed(
                    name=name,
                    what=what,
                    topology=wilson(topologies, len(texts)),
                    decision=wilson(sum(a != b for a, b in pairs), len(texts)),
                )
            )
    return Flip(tasks=len(texts), changed=tuple(changed))


def _topology(decision: Decision | None) -> str | None:
    return decision.topology if decision else None


def typos(text: str, seed: int) -> str:
    """The text with two neighbouring letters swapped in every twentieth word of four letters or more, one at least.

    First and last letters stay, and so do texts without such a word. The same for the same text and seed.
    """
    words = list(_WORD.finditer(text))
    if not words:
        return text
    rng = random.Random(f"{seed}:{text}")
    letters = list(text)
    for word in rng.sample(words, max(1, round(TYPOS * len(words)))):
        at = rng.randrange(word.start() + 1, word.end() - 2)
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)

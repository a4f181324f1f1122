"""Few-shot examples: solved tasks that a teacher is shown before the one it is asked about.

They come from the user's own file (`label.examples`), or from the training split of the project's tasks
(`label.shots`): tasks that a router is validated or tested on never stand in a teacher's prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from router_cli import dataset, prompts, tasks
from router_cli.errors import InputError, SettingsError
from router_cli.schema import Example, Task
from router_cli.sections import MOST_EXAMPLES
from router_cli.settings import Settings
from router_cli.space import DecisionSpace


@dataclass(frozen=True)
class Examples:
    """`shown` stand in every prompt; `spare` holds at most one more of each topology, for the tasks among `shown`."""

    shown: tuple[Example, ...] = ()
    spare: tuple[Example, ...] = ()

    @cached_property
    def id(self) -> str | None:
        """A short name of what is shown, part of what a label row is resumed by; None without examples."""
        return prompts.examples_id((*self.shown, *self.spare))

    def beside(self, text: str) -> tuple[Example, ...]:
        """The examples for a task of that text: it never is its own example.

        The spare one of the same topology takes its place: a topology that is missing from the prompt of just its own
        tasks would say something about them.
        """
        same = self._by_text.get(tasks.normalised(text)) if self.shown else None
        if same is None:
            return self.shown
        instead = [one for one in self.spare if one.decision.topology == same.decision.topology]
        return tuple(one for example in self.shown for one in (instead if example is same else [example]))

    @cached_property
    def _by_text(self) -> dict[str, Example]:
        return {tasks.normalised(example.text): example for example in self.shown}


NO_EXAMPLES = Examples()


def choose(settings: Settings) -> Examples:
    """The examples of `label.examples` or `label.shots`, checked against the decision space; none without either.

    Raises SettingsError where the settings do not go together, InputError naming file and line.
    """
    wanted, decision = settings.label, settings.decision
    given = [key for key in ("examples", "shots") if getattr(wanted, key) is not None]
    if not given:
        return NO_EXAMPLES
    named = [f"label.{key} ({settings.origin(f'label.{key}')})" for key in given]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(named)}: exclude each other, give one of them")
    if wanted.teacher != "openai":
        raise SettingsError(f"{named[0]}: the teacher {wanted.teacher} takes no examples; leave it out")
    space = DecisionSpace(tuple(decision.roles), tuple(decision.topologies), decision.step_bound)
    if wanted.examples is not None:
        return Examples(tuple(_from_file(wanted.examples, space)))
    assert wanted.shots is not None  # one of the two is given
    try:
        return _from_rubric(wanted.shots, space)
    except ValueError as error:
        raise SettingsError(f"{named[0]}: {error}") from None


def _from_file(path: str, space: DecisionSpace) -> Iterator[Example]:
    """Label rows or task rows with a decision, in the file's order."""

    def refuse(line: int, raw: str, problem: str) -> None:
        raise InputError(f"{path}:{line}: {problem}")

    seen: dict[str, str] = {}
    for example in dataset.read_labels([path], space, on_unusable=refuse):
        if example.split == "test":
            raise InputError(f"{path}: {example.task_id} is of the test split, which no teacher may be shown; drop it")
        text = tasks.normalised(example.text)
        if text in seen:
            raise InputError(f"{path}: {example.task_id} is the same task as {seen[text]}; drop one of the two")
        seen[text] = example.task_id
        if len(seen) > MOST_EXAMPLES:
            raise InputError(f"{path}: holds more than {MOST_EXAMPLES} examples, and all of them go with every request")
        yield example


def _from_rubric(count: int, space: DecisionSpace) -> Examples:
    """`count` tasks of the training split, the topologies in turn, each time of a kind and a part seldom taken yet.

    The same ones every time. Raises ValueError where the topologies in force cannot all be shown.
    """
    if count < len(space.topologies):
        raise ValueError(f"must be at least {len(space.topologies)}, one example of each topology, got {count}")
    left: dict[str, list[tuple[Task, Example]]] = {topology: [] for topology in space.topologies}
    for task in tasks.read_tasks([tasks.OWN_TASKS]):
        resolved = space.resolve(task.decision)
        if task.split == "train" and resolved.decision is not None:
            example = Example(
                task_id=task.id,
                text=task.text,
                decision=resolved.decision,
                split=task.split,
                sample_type="rubric",
                normalised=resolved.normalised,
            )
            left[resolved.decision.topology].append((task, example))
    taken: Counter[str | None] = Counter()

    def take(topology: str) -> Example:
        if not left[topology]:
            raise ValueError(
                f"the project's own tasks have too few examples of {topology} for the roles {', '.join(space.roles)}; "
                "give your own with --examples"
            )
        best = min(left[topology], key=lambda one: (taken[one[0].kind], taken[_part(one[0])]))
        left[topology].remove(best)
        taken.update([best[0].kind, _part(best[0])])
        return best[1]

    shown = [take(space.topologies[number % len(space.topologies)]) for number in range(count)]
    return Examples(tuple(shown), tuple(take(topology) for topology in space.topologies))


def _part(task: Task) -> str:
    """The field that one of the project's own tasks is from: its ids read `web-017`."""
    return task.id.rpartition("-")[0]

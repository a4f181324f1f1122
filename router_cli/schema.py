"""The records that pass between the verbs: frozen pydantic models, nothing else.

Task -> Label -> Example -> (adapter) -> Prediction -> Score
                                         Outcome    ->
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

Topology = Literal["single", "chain", "decentralized", "centralized"]
Split = Literal["train", "validation", "test"]


class Record(BaseModel):
    """Base of all records: frozen, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Decision(Record):
    """Which formation a task gets. Whether it is valid for given roles is `space.DecisionSpace`'s to say."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    topology: Topology
    roles: tuple[str, ...]
    manager_role: str | None
    entry_role: str
    max_steps: int


class Task(Record):
    """One coding task as the router sees it. Hidden tests and reference solutions are never part of it."""

    id: str
    text: str
    source: Literal["humaneval", "mbpp", "generic"] = "generic"
    lang: str | None = None
    kind: str | None = None
    split: Split | None = None
    # The decision that the task's own row brought along, as it stood there: unchecked.
    decision: dict[str, Any] | None = None


class Usage(Record):
    """What a label cost. `cost_usd` is None where the price of the model is unknown."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None
    attempts: int = 1


class Provenance(Record):
    """Where a label comes from."""

    teacher: str
    model: str
    prompt_version: str
    roles: tuple[str, ...]
    strategy: str
    key: str
    usage: Usage = Usage()
    # Where a task was asked about several times: the share of the answers with the chosen topology, and the topology of
    # each (None: an answer that was no use).
    agreement: float | None = None
    votes: tuple[Topology | None, ...] = ()
    # What was changed to make the answer canonical (role aliases, order of roles), in words; empty is as answered.
    normalised: tuple[str, ...] = ()
    reason: str | None = None


class Message(Record):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Label(Record):
    """A chat-format training row: a task with the teacher's decision."""

    messages: tuple[Message, ...]
    sample_type: str
    origin_task_id: str
    decision: Decision
    split: Split | None = None
    provenance: Provenance | None = None


class Rejection(Record):
    """A task whose answers could not be used, with the last raw answer."""

    origin_task_id: str
    task: str
    violations: tuple[str, ...]
    raw: str
    provenance: Provenance


class Example(Record):
    """A training example: the task's text, the decision to learn, and the split it belongs to.

    `solved` says of each topology that was executed on the task how many of its runs solved it, of how many.
    """

    task_id: str
    text: str
    decision: Decision
    split: Split | None = None
    sample_type: str
    normalised: tuple[str, ...] = ()
    solved: dict[str, tuple[int, int]] = {}


class Alternative(Record):
    """One of the most likely decisions, with its own probability (of the whole decision, not of its topology)."""

    decision: Decision
    probability: float = Field(ge=0.0, le=1.0)


_OPTIONAL = {"alternatives", "usage", "solving", "decision_probability"}


class Prediction(Record):
    """One row of `router infer`. `probability` is that of the chosen topology, `decision_probability` that of the whole
    decision; it is there only where it is known.

    `fallback` names who decided in the router's place; `decision` is None where nobody did. `alternatives`, the
    likeliest first, are there only where they were asked for, and `usage` only where somebody counted it; `solving`,
    the probability that each topology solves the task, where the topology was chosen by value.
    """

    task_id: str
    decision: Decision | None
    probability: float | None = Field(default=None, ge=0.0, le=1.0)
    topologies: dict[str, float] | None = None
    backend: str
    model: str
    milliseconds: float
    fallback: str | None = None
    alternatives: tuple[Alternative, ...] | None = None
    usage: Usage | None = None
    solving: dict[str, float] | None = None
    decision_probability: float | None = Field(default=None, ge=0.0, le=1.0)

    @model_serializer(mode="wrap")
    def _without_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        row: dict[str, Any] = dump(self)
        return {key: value for key, value in row.items() if value is not None or key not in _OPTIONAL}


class Outcome(Record):
    """One recorded execution of a task by a formation."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    task_id: str
    topology: Topology | None
    solved: bool
    repeat: int = 0
    worker: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    seconds: float | None = None
    # Whether the run passed what an agent may see (visible examples, base tests): what a cascade escalates on.
    evidence: bool | None = None
    # Equal where two runs of a task act alike, as far as an agent can see (examples, else code).
    acts: str | None = None
    benchmark: str | None = None
    # The task's own text and split, on one of its rows at least.
    text: str | None = None
    split: Split | None = None


class Score(Record):
    """One measured figure with its 95 % interval over `n` tasks."""

    value: float
    low: float
    high: float
    n: int

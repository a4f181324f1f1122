"""The decision space: which decisions are valid for given roles and topologies.

The rules, for a role list R and an upper bound of steps B:

    single         one role; no manager; the entry is that role; one step
    chain          two or more roles in order; no manager; the entry is the first; as many steps as roles
    decentralized  two or more roles; no manager; the entry among them; len(roles) to B steps
    centralized    two or more roles; the manager among them and the entry; len(roles) to B steps

Roles come from R without duplicates. Where order carries no meaning (all but chain), the canonical order is R's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from router_cli.schema import Decision, Topology

TOPOLOGIES: tuple[str, ...] = get_args(Topology)
FIELDS: tuple[str, ...] = tuple(Decision.model_fields)

# Names that people and older label files use for one and the same role.
ALIASES: tuple[frozenset[str], ...] = (
    frozenset({"planner", "code-planner"}),
    frozenset({"builder", "code-generation"}),
    frozenset({"tester", "checker", "code-testing"}),
    frozenset({"refractor", "refactor", "code-refactoring"}),
)


@dataclass(frozen=True)
class Violation:
    """One broken rule: a stable name and a sentence that a teacher model can act on."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass(frozen=True)
class Resolved:
    """What became of a raw decision: the decision, or why there is none, and what was normalised."""

    decision: Decision | None
    violations: tuple[Violation, ...] = ()
    normalised: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecisionSpace:
    """All decisions valid for `roles`, `topologies` and at most `step_bound` steps."""

    roles: tuple[str, ...]
    topologies: tuple[str, ...] = TOPOLOGIES
    step_bound: int = 12
    _order: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", {role: i for i, role in enumerate(self.roles)})

    # -- checking ---------------------------------------------------------------------------------------------

    def violations(self, raw: object) -> tuple[Violation, ...]:
        """Name every rule that `raw` (a decision as a mapping) breaks; empty for a valid decision."""
        if isinstance(raw, Decision):
            raw = raw.model_dump()
        if not isinstance(raw, Mapping):
            return (Violation("not_an_object", f"expected a JSON object, got {_kind(raw)}"),)
        return tuple(self._shape(raw)) or tuple(self._rules(raw))

    def _shape(self, raw: Mapping[str, Any]) -> Iterator[Violation]:
        for name in FIELDS:
            if name not in raw:
                yield Violation("missing_field", f"the field {name} is missing")
        for name in raw:
            if name not in FIELDS:
                yield Violation("unknown_field", f"the field {name} is not part of a decision")
        if "topology" in raw and not isinstance(raw["topology"], str):
            yield Violation("wrong_type", f"topology must be a string, got {_kind(raw['topology'])}")
        roles = raw.get("roles", [])
        if not isinstance(roles, list | tuple) or not all(isinstance(role, str) for role in roles):
            yield Violation("wrong_type", "roles must be a list of strings")
        if not isinstance(raw.get("manager_role"), str | None):
            yield Violation("wrong_type", f"manager_role must be a string or null, got {_kind(raw['manager_role'])}")
        if "entry_role" in raw and not isinstance(raw["entry_role"], str):
            yield Violation("wrong_type", f"entry_role must be a string, got {_kind(raw['entry_role'])}")
        steps = raw.get("max_steps", 1)
        if not isinstance(steps, int) or isinstance(steps, bool):
            yield Violation("wrong_type", f"max_steps must be a whole number, got {_kind(steps)}")

    def _rules(self, raw: Mapping[str, Any]) -> Iterator[Violation]:
        topology, roles = raw["topology"], tuple(raw["roles"])
        manager, entry, steps = raw["manager_role"], raw["entry_role"], raw["max_steps"]
        if topology not in self.topologies:
            yield Violation("unknown_topology", f"topology must be one of {_join(self.topologies)}, got {topology!r}")
            return
        for role in dict.fromkeys(roles):
            if role not in self._order:
                yield Violation("unknown_role", f"the role {role!r} is not in the list {_join(self.roles)}")
        if len(set(roles)) < len(roles):
            yield Violation("duplicate_role", "each role may stand in roles once")
        if topology == "single":
            if len(roles) != 1:
                yield Violation("role_count", f"single takes exactly one role, got {len(roles)}")
        elif len(roles) < 2:
            yield Violation("role_count", f"{topology} takes at least two roles, got {len(roles)}")
        if topology == "centralized":
            if manager is None:
                yield Violation("manager_missing", "centralized needs a manager_role")
            elif manager not in roles:
                yield Violation("manager_not_in_roles", f"manager_role {manager!r} must be one of roles")
        elif manager is not None:
            yield Violation("manager_forbidden", f"manager_role must be null for {topology}")
        if entry not in roles:
            yield Violation("entry_not_in_roles", f"entry_role {entry!r} must be one of roles")
        elif topology == "centralized" and manager in roles and entry != manager:
            yield Violation("entry_not_manager", "entry_role must be the manager_role for centralized")
        elif topology == "chain" and entry != roles[0]:
            yield Violation("entry_not_first", "entry_role must be the first of roles for chain")
        low, high = self.steps(topology, len(roles))
        if not low <= steps <= high:
            wanted = str(low) if low == high else f"{low} to {high}"
            yield Violation("steps_out_of_range", f"max_steps must be {wanted} here, got {steps}")

    def steps(self, topology: str, roles: int) -> tuple[int, int]:
        """The least and greatest `max_steps` of a topology with that many roles."""
        if topology == "single":
            return 1, 1
        return (roles, roles) if topology == "chain" else (roles, max(roles, self.step_bound))

    def resolve(self, raw: object) -> Resolved:
        """Make a raw decision canonical, or say why it is none.

        Only two things are changed, and both are recorded: a role's alias that the role list makes unambiguous,
        and the order of roles where order carries no meaning. Everything else is a violation.
        """
        if isinstance(raw, Decision):
            raw = raw.model_dump()
        changes: list[str] = []
        if isinstance(raw, Mapping):
            raw = self._without_aliases(raw, changes)
        found = self.violations(raw)
        if found:
            return Resolved(None, found, tuple(changes))
        assert isinstance(raw, Mapping)  # violations() has just shown it
        roles = tuple(raw["roles"])
        if raw["topology"] != "chain" and (ordered := self.canonical_order(roles)) != roles:
            changes.append("roles put in the order of the role list")
            roles = ordered
        return Resolved(Decision(**{**raw, "roles": roles}), (), tuple(changes))

    def _without_aliases(self, raw: Mapping[str, Any], changes: list[str]) -> dict[str, Any]:
        def plain(role: Any) -> Any:
            if not isinstance(role, str) or (real := self.role_named(role)) is None or real == role:
                return role
            note = f"role {role} read as {real}"
            if note not in changes:
                changes.append(note)
            return real

        fixed = dict(raw)
        if isinstance(fixed.get("roles"), list | tuple):
            fixed["roles"] = [plain(role) for role in fixed["roles"]]
        for name in ("manager_role", "entry_role"):
            if name in fixed:
                fixed[name] = plain(fixed[name])
        return fixed

    def role_named(self, name: str) -> str | None:
        """The role of the list that `name` means: itself, or the only one it is an alias of; else None."""
        if name in self._order:
            return name
        meant = [role for group in ALIASES if name in group for role in self.roles if role in group]
        return meant[0] if len(meant) == 1 else None

    def canonical_order(self, roles: Sequence[str]) -> tuple[str, ...]:
        """`roles` in the order of the role list."""
        return tuple(sorted(roles, key=self._order.__getitem__))

    # -- enumerating ------------------------------------------------------------------------------------------

    def enumerate(self) -> Iterator[Decision]:
        """Every canonical decision, lazily: for ten roles a chain alone has 9.9 million."""
        for topology in self.topologies:
            for roles in self.role_choices(topology):
                for manager, entry in self.entries(topology, roles):
                    low, high = self.steps(topology, len(roles))
                    for steps in range(low, high + 1):
                        yield Decision(
                            topology=topology,  # type: ignore[arg-type]  # one of TOPOLOGIES
                            roles=roles,
                            manager_role=manager,
                            entry_role=entry,
                            max_steps=steps,
                        )

    def role_choices(self, topology: str) -> Iterator[tuple[str, ...]]:
        """The role lists of a topology, shortest first."""
        if topology == "single":
            yield from ((role,) for role in self.roles)
            return
        pick = itertools.permutations if topology == "chain" else itertools.combinations
        for count in range(2, len(self.roles) + 1):
            yield from pick(self.roles, count)

    def entries(self, topology: str, roles: tuple[str, ...]) -> list[tuple[str | None, str]]:
        """The (manager_role, entry_role) pairs that a topology allows for `roles`."""
        if topology == "centralized":
            return [(role, role) for role in roles]
        if topology == "decentralized":
            return [(None, role) for role in roles]
        return [(None, roles[0])]

    def size(self) -> int:
        """How many canonical decisions there are, without enumerating them."""
        n, total = len(self.roles), 0
        for topology in self.topologies:
            if topology == "single":
                total += n
            elif topology == "chain":
                total += sum(math.perm(n, k) for k in range(2, n + 1))
            else:
                for k in range(2, n + 1):
                    low, high = self.steps(topology, k)
                    total += math.comb(n, k) * k * (high - low + 1)
        return total

    def json_schema(self) -> dict[str, Any]:
        """The decision as a strict JSON schema, in the subset that OpenAI's structured output takes.

        What the subset cannot say (which fields go together, no duplicates) stays with `violations`.
        """
        role = {"type": "string", "enum": list(self.roles)}
        fields: dict[str, Any] = {
            "topology": {"type": "string", "enum": list(self.topologies)},
            "roles": {"type": "array", "items": role},
            "manager_role": {"anyOf": [role, {"type": "null"}]},
            "entry_role": role,
            "max_steps": {"type": "integer"},
        }
        return {"type": "object", "properties": fields, "required": list(FIELDS), "additionalProperties": False}


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _join(names: Sequence[str]) -> str:
    return ", ".join(names)

"""The decision space: what it enumerates is valid, what is broken is refused by name, what is changed is recorded."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from router_cli import prompts
from router_cli.schema import Decision
from router_cli.space import ALIASES, FIELDS, TOPOLOGIES, DecisionSpace, Violation

ROLES = ("planner", "builder", "tester", "refractor")
SPACE = DecisionSpace(ROLES)
KNOWN = {name for group in ALIASES for name in group}

# Names as people may write them: any script, quotes, braces, spaces inside; no commas, which separate them.
names = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters=","), min_size=1, max_size=12).filter(
    lambda name: name == name.strip() and "think>" not in name and name not in KNOWN
)
role_lists = st.lists(names | st.sampled_from(ROLES), min_size=1, max_size=5, unique=True).map(tuple)
spaces = st.builds(
    DecisionSpace,
    role_lists,
    st.lists(st.sampled_from(TOPOLOGIES), min_size=1, unique=True).map(tuple),
    st.integers(2, 9),
)


def decisions(space: DecisionSpace) -> st.SearchStrategy[Decision]:
    """Any decision of a space, by choosing its parts."""
    topologies = [name for name in space.topologies if name == "single" or len(space.roles) > 1]
    assume(topologies)

    def parts(topology: str) -> st.SearchStrategy[Decision]:
        return st.sampled_from(list(space.role_choices(topology))).flatmap(
            lambda roles: st.builds(
                lambda ends, steps: Decision(
                    topology=topology,  # type: ignore[arg-type]
                    roles=roles,
                    manager_role=ends[0],
                    entry_role=ends[1],
                    max_steps=steps,
                ),
                st.sampled_from(space.entries(topology, roles)),
                st.integers(*space.steps(topology, len(roles))),
            )
        )

    return st.sampled_from(topologies).flatmap(parts)


def broken(space: DecisionSpace, raw: Any) -> set[str]:
    return {violation.name for violation in space.violations(raw)}


def single(**changes: Any) -> dict[str, Any]:
    row = {"topology": "single", "roles": ["builder"], "manager_role": None, "entry_role": "builder", "max_steps": 1}
    return row | changes


def team(topology: str, *roles: str, **changes: Any) -> dict[str, Any]:
    manager = roles[0] if topology == "centralized" else None
    row = {"topology": topology, "roles": list(roles), "manager_role": manager, "entry_role": roles[0]}
    return row | {"max_steps": len(roles)} | changes


# -- enumeration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("bound", [2, 4, 12])
def test_everything_enumerated_is_valid_canonical_and_counted(count: int, bound: int) -> None:
    space = DecisionSpace(tuple(f"r{n}" for n in range(count)), step_bound=bound)
    everything = list(space.enumerate())
    assert len(everything) == len(set(everything)) == space.size()
    for decision in everything:
        resolved = space.resolve(decision)
        assert (resolved.decision, resolved.violations, resolved.normalised) == (decision, (), ())


def test_nothing_valid_is_left_out_of_the_enumeration() -> None:
    space = DecisionSpace(("a", "b"), step_bound=3)
    roles = [list(pick) for count in range(4) for pick in itertools.product("ab", repeat=count)]
    candidates = (
        dict(zip(FIELDS, values, strict=True))
        for values in itertools.product(TOPOLOGIES, roles, [None, "a", "b"], ["a", "b"], range(-1, 5))
    )
    valid = {resolved.decision for raw in candidates if (resolved := space.resolve(raw)).decision}
    assert valid == set(space.enumerate())


def test_four_roles_have_640_decisions() -> None:
    assert SPACE.size() == 640 and DecisionSpace(ROLES, ("single",)).size() == 4


@given(spaces)
def test_size_needs_no_enumeration(space: DecisionSpace) -> None:
    assert space.size() == sum(1 for _ in space.enumerate())


def test_a_single_role_leaves_only_the_single_agent() -> None:
    assert [decision.topology for decision in DecisionSpace(("solo",)).enumerate()] == ["single"]


# -- violations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (None, "not_an_object"),
        ("single", "not_an_object"),
        ([single()], "not_an_object"),
        ({key: value for key, value in single().items() if key != "manager_role"}, "missing_field"),
        (single(reason="easy"), "unknown_field"),
        (single(topology=1), "wrong_type"),
        (single(roles="builder"), "wrong_type"),
        (single(roles=[1]), "wrong_type"),
        (single(roles=None), "wrong_type"),
        (single(manager_role=False), "wrong_type"),
        (single(entry_role=None), "wrong_type"),
        (single(max_steps="1"), "wrong_type"),
        (single(max_steps=1.0), "wrong_type"),
        (single(max_steps=True), "wrong_type"),
        (single(topology="star"), "unknown_topology"),
        (single(roles=["wizard"], entry_role="wizard"), "unknown_role"),
        (team("chain", "builder", "builder"), "duplicate_role"),
        (single(roles=["builder", "tester"]), "role_count"),
        (team("chain", "builder"), "role_count"),
        (team("decentralized", "builder"), "role_count"),
        (team("centralized", "builder"), "role_count"),
        (team("centralized", "planner", "builder", manager_role=None), "manager_missing"),
        (team("centralized", "planner", "builder", manager_role="tester"), "manager_not_in_roles"),
        (single(manager_role="builder"), "manager_forbidden"),
        (team("chain", "planner", "builder", manager_role="planner"), "manager_forbidden"),
        (team("decentralized", "planner", "builder", manager_role="planner"), "manager_forbidden"),
        (single(entry_role="tester"), "entry_not_in_roles"),
        (team("decentralized", "planner", "builder", entry_role="tester"), "entry_not_in_roles"),
        (team("centralized", "planner", "builder", entry_role="builder"), "entry_not_manager"),
        (team("chain", "planner", "builder", entry_role="builder"), "entry_not_first"),
        (single(max_steps=2), "steps_out_of_range"),
        (single(max_steps=0), "steps_out_of_range"),
        (team("chain", "planner", "builder", max_steps=3), "steps_out_of_range"),
        (team("centralized", "planner", "builder", max_steps=1), "steps_out_of_range"),
        (team("centralized", "planner", "builder", max_steps=13), "steps_out_of_range"),
        (team("decentralized", "planner", "builder", max_steps=13), "steps_out_of_range"),
    ],
)
def test_each_broken_rule_is_refused_by_its_name_alone(raw: Any, name: str) -> None:
    assert broken(SPACE, raw) == {name}
    assert SPACE.resolve(raw).decision is None


def mutate(space: DecisionSpace, decision: Decision, name: str, draw: Any) -> dict[str, Any]:
    """A valid decision broken in the way that `name` names."""
    raw, roles = decision.model_dump(), list(decision.roles)
    others = [role for role in space.roles if role not in roles]
    low, high = space.steps(decision.topology, len(roles))
    if name == "missing_field":
        del raw[draw(st.sampled_from(FIELDS))]
    elif name == "unknown_field":
        raw["confidence"] = 0.9
    elif name == "wrong_type":
        wrong = {"topology": 1, "roles": "all", "manager_role": 1, "entry_role": None, "max_steps": "1"}
        field = draw(st.sampled_from(FIELDS))
        raw[field] = wrong[field]
    elif name == "unknown_topology":
        raw["topology"] = draw(st.sampled_from([t for t in (*TOPOLOGIES, "star", "") if t not in space.topologies]))
    elif name == "unknown_role":
        raw["roles"] = draw(st.permutations([*roles[1:], "no such role\0"]))
    elif name == "duplicate_role":
        raw["roles"] = [*roles, draw(st.sampled_from(roles))]
    elif name == "role_count":
        raw["roles"] = [*roles, *others] if decision.topology == "single" else roles[:1]
    elif name == "manager_missing":
        raw["manager_role"] = None
    elif name == "manager_not_in_roles":
        raw["manager_role"] = draw(st.sampled_from(others) if others else st.just("nobody"))
    elif name == "manager_forbidden":
        raw["manager_role"] = draw(st.sampled_from(roles))
    elif name == "entry_not_in_roles":
        raw["entry_role"] = draw(st.sampled_from(others) if others else st.just("nobody"))
    elif name in ("entry_not_manager", "entry_not_first"):
        raw["entry_role"] = draw(st.sampled_from([role for role in roles if role != decision.entry_role]))
    elif name == "steps_out_of_range":
        raw["max_steps"] = draw(st.integers(max_value=low - 1) | st.integers(min_value=high + 1))
    return raw


# Each kind of violation, and the topologies whose decisions can be broken that way.
MUTATIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("missing_field", "unknown_field", "wrong_type", "unknown_topology", "unknown_role"), TOPOLOGIES),
    **dict.fromkeys(("duplicate_role", "role_count", "entry_not_in_roles", "steps_out_of_range"), TOPOLOGIES),
    **dict.fromkeys(("manager_missing", "manager_not_in_roles", "entry_not_manager"), ("centralized",)),
    "manager_forbidden": ("single", "chain", "decentralized"),
    "entry_not_first": ("chain",),
}


@pytest.mark.parametrize("name", MUTATIONS)
@settings(max_examples=40)
@given(data=st.data())
def test_every_mutation_of_a_valid_decision_is_refused_by_its_name(name: str, data: st.DataObject) -> None:
    roles = data.draw(role_lists.filter(lambda roles: len(roles) > 1))
    space = DecisionSpace(roles, (data.draw(st.sampled_from(MUTATIONS[name])),), data.draw(st.integers(2, 9)))
    resolved = space.resolve(mutate(space, data.draw(decisions(space)), name, data.draw))
    assert resolved.decision is None
    assert name in {violation.name for violation in resolved.violations}
    assert all(isinstance(violation, Violation) and "\n" not in str(violation) for violation in resolved.violations)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*ROLES, *TOPOLOGIES]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(FIELDS), inner, max_size=6),
    max_leaves=12,
)


@given(anything | st.fixed_dictionaries(dict.fromkeys(FIELDS, anything)))
def test_nothing_raises_and_only_valid_decisions_come_out(raw: Any) -> None:
    resolved = SPACE.resolve(raw)
    assert (resolved.decision is None) == bool(resolved.violations)
    if resolved.decision is not None:
        assert SPACE.violations(resolved.decision) == ()


# -- what is made canonical -----------------------------------------------------------------------------------


@given(st.data())
def test_order_is_restored_where_it_means_nothing_and_kept_in_a_chain(data: st.DataObject) -> None:
    space = data.draw(spaces)
    decision = data.draw(decisions(space))
    roles = data.draw(st.permutations(decision.roles))
    raw = decision.model_dump() | {"roles": roles}
    resolved = space.resolve(raw)
    if decision.topology == "chain":
        assert resolved.decision is None or resolved.decision.roles == tuple(roles)
        assert resolved.normalised == ()
    else:
        assert resolved.decision == decision
        assert bool(resolved.normalised) == (tuple(roles) != decision.roles)


@pytest.mark.parametrize("group", ALIASES, ids=lambda group: min(group))
def test_aliases_are_read_as_the_only_role_they_can_mean_and_recorded(group: frozenset[str]) -> None:
    for real, alias in itertools.permutations(group, 2):
        space = DecisionSpace(("boss", real))
        raw = team("centralized", alias, "boss")
        resolved = space.resolve(raw)
        assert resolved.decision == Decision(**team("centralized", real, "boss") | {"roles": ("boss", real)})
        assert resolved.normalised[0] == f"role {alias} read as {real}"
        assert len(resolved.normalised) == 2  # the alias is recorded once, whatever fields it stood in; and the order


def test_an_alias_of_two_roles_in_the_list_is_refused() -> None:
    space = DecisionSpace(("tester", "checker", "builder"))
    resolved = space.resolve(single(roles=["code-testing"], entry_role="code-testing"))
    assert {violation.name for violation in resolved.violations} == {"unknown_role"} and not resolved.normalised
    # What stands in the list itself is never ambiguous.
    assert space.resolve(single(roles=["checker"], entry_role="checker")).normalised == ()


def test_two_aliases_of_one_role_are_a_duplicate() -> None:
    resolved = SPACE.resolve(team("chain", "tester", "checker"))
    assert [violation.name for violation in resolved.violations] == ["duplicate_role"]


def test_names_alike_but_for_case_are_different_roles() -> None:
    assert broken(SPACE, single(roles=["Builder"], entry_role="Builder")) == {"unknown_role"}


# -- as text --------------------------------------------------------------------------------------------------

prose = st.text(st.characters(exclude_characters="{}<", exclude_categories=("Cs",)), max_size=30)


@given(st.data(), prose, prose, st.sampled_from(["{}", "```json\n{}\n```", "<think>{{ {{\n</think>\n\n{}", "[{}]"]))
def test_text_round_trips_inside_fences_prose_and_think_blocks(
    data: st.DataObject, before: str, after: str, frame: str
) -> None:
    space = data.draw(spaces)
    decision = data.draw(decisions(space))
    answer = before + frame.format(prompts.render(decision)) + after
    resolved = prompts.parse(answer, space)
    assert (resolved.decision, resolved.violations, resolved.normalised) == (decision, (), ())


@given(st.data())
def test_the_json_schema_takes_every_decision_and_names_every_field(data: st.DataObject) -> None:
    space = data.draw(spaces)
    decision, schema = json.loads(prompts.render(data.draw(decisions(space)))), space.json_schema()
    assert list(schema["properties"]) == schema["required"] == list(FIELDS)
    assert decision["topology"] in schema["properties"]["topology"]["enum"]
    allowed = schema["properties"]["roles"]["items"]["enum"]
    assert set(decision["roles"]) <= set(allowed) and decision["entry_role"] in allowed

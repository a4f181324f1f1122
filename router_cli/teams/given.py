"""A decision that a person gives, and the plain team of each topology."""

from __future__ import annotations

from router_cli import prompts
from router_cli.errors import UsageError
from router_cli.schema import Decision
from router_cli.space import DecisionSpace


def given_decision(given: str, space: DecisionSpace) -> Decision:
    """A decision as the user wrote it: JSON, or the name of a topology, which takes all roles in their order.

    Raises UsageError naming what is not valid in it.
    """
    if given in space.topologies:
        alone = "builder" if "builder" in space.roles else space.roles[0]
        roles = (alone,) if given == "single" else space.roles
        steps = 1 if given == "single" else len(roles) + (given == "centralized")
        manager = roles[0] if given == "centralized" else None
        given = prompts.render(
            Decision(
                topology=given,  # type: ignore[arg-type]  # one of the space's
                roles=roles,
                manager_role=manager,
                entry_role=roles[0],
                max_steps=min(steps, space.step_bound),
            )
        )
    resolved = prompts.parse(given, space)
    if resolved.decision is None:
        why = "; ".join(str(violation) for violation in resolved.violations)
        raise UsageError(f"--decision: {why}; expected {', '.join(space.topologies)} or a decision as JSON")
    return resolved.decision

"""The teacher that decides nothing: it hands on the decision which the task's own row brought along."""

from __future__ import annotations

import json

from router_cli.prompts import Strategy
from router_cli.schema import Task
from router_cli.space import DecisionSpace, Violation
from router_cli.teachers import Answer, OfflineTeacher


class RecordedTeacher(OfflineTeacher):
    """Reads `Task.decision` under the roles, topologies and step bound in force; whatever breaks them is rejected."""

    name = model = "recorded"

    async def ask(self, task: Task, space: DecisionSpace, strategy: Strategy, sample: int = 0) -> Answer:
        """The row's own decision, made canonical; `strategy` changes nothing."""
        if task.decision is None:
            missing = Violation("no_recorded_decision", "the task's row brings no decision along")
            return Answer(None, self.model, violations=(missing,))
        resolved = space.resolve(task.decision)
        return Answer(
            resolved.decision,
            self.model,
            violations=resolved.violations,
            normalised=resolved.normalised,
            raw=json.dumps(task.decision, ensure_ascii=False),
        )

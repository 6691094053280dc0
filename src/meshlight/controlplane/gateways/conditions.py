"""Status conditions of the Gateway API: made, and carried over where they say the same. Pure."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from meshlight.kube.resources import Object


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition; `reason` and `type` as the Gateway API spells them."""

    type: str
    status: bool
    reason: str
    message: str = ""

    def written(self, generation: int, now: datetime.datetime) -> Object:
        """As an object's status has it."""
        return {
            "type": self.type,
            "status": "True" if self.status else "False",
            "reason": self.reason,
            "message": self.message,
            "observedGeneration": generation,
            "lastTransitionTime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


def settled(wanted: list[Object], present: list[Object]) -> list[Object]:
    """The wanted conditions, with the time of transition of those whose status did not change."""
    before = {condition.get("type"): condition for condition in present}
    result = []
    for condition in wanted:
        old = before.get(condition["type"])
        if old is not None and old.get("status") == condition["status"] and old.get("lastTransitionTime"):
            condition = {**condition, "lastTransitionTime": old["lastTransitionTime"]}
        result.append(condition)
    return result

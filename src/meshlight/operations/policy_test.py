"""`meshlight policy test`: what a proposed policy would do to given connections, before it is applied. Pure.

The connections are judged twice, as the mesh is and as it would be with the files' objects laid over it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshlight.operations import parties, why
from meshlight.operations.mesh_snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Trial:
    """One connection before and after."""

    source: str
    destination: str
    before: str
    after: str
    because: str

    @property
    def changed(self) -> bool:
        """Whether the proposal makes a difference."""
        return self.before != self.after


def trials(
    before: Snapshot, after: Snapshot, connections: Iterable[tuple[str, str]], namespace: str
) -> list[Trial]:
    """Judge connections in both worlds. Raises UnknownParty."""
    found = []
    for source, destination in connections:
        old, new = (
            why.explain(
                snapshot,
                parties.source(snapshot, source, namespace),
                parties.destination(snapshot, destination, namespace),
            )
            for snapshot in (before, after)
        )
        found.append(Trial(source, destination, old.verdict, new.verdict, _reason(new)))
    return found


def _reason(explanation: why.Explanation) -> str:
    """The step that decided: the first that refuses, else the last."""
    for route in explanation.routes:
        for step in route.steps:
            if step.verdict in (why.DENIED, why.UNREACHABLE):
                return f"{step.stage}: {step.text}"
    last = explanation.routes[-1].steps[-1] if explanation.routes and explanation.routes[-1].steps else None
    return f"{last.stage}: {last.text}" if last else ""

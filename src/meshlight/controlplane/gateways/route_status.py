"""The status of routes, for each parent, with the Gateway API's conditions. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshlight.controlplane.envoy.routing import ParentReference, Problem, Route
from meshlight.controlplane.gateways.conditions import Condition, settled
from meshlight.kube.resources import Object


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a route at one parent; `refusal` None: it is attached."""

    parent: ParentReference
    controller: str
    refusal: Problem | None


def conditions(route_problems: Iterable[Problem], refusal: Problem | None) -> list[Condition]:
    """The conditions of a route at a parent."""
    problems = list(route_problems)
    unaccepted = [problem for problem in problems if problem.resolved]
    unresolved = [problem for problem in problems if not problem.resolved]
    if refusal is not None:
        accepted = Condition("Accepted", False, refusal.reason, refusal.message)
    elif unaccepted:
        message = "; ".join(problem.message for problem in unaccepted)
        accepted = Condition("Accepted", False, unaccepted[0].reason, message)
    else:
        accepted = Condition("Accepted", True, "Accepted", "Route was valid")
    if unresolved:
        message = "; ".join(dict.fromkeys(problem.message for problem in unresolved))
        resolved = Condition("ResolvedRefs", False, unresolved[0].reason, message)
    else:
        resolved = Condition("ResolvedRefs", True, "ResolvedRefs", "All references resolved")
    return [accepted, resolved]


def status(
    obj: Object, route: Route, outcomes: list[Outcome], problems: list[Problem], now: datetime.datetime
) -> Object:
    """The whole status. What other controllers wrote about their parents stays."""
    before: list[Object] = (obj.get("status") or {}).get("parents") or []
    refs: list[Object] = (obj.get("spec") or {}).get("parentRefs") or []
    ours = {outcome.controller for outcome in outcomes} | CONTROLLERS
    entries = [entry for entry in before if entry.get("controllerName") not in ours]
    for outcome in outcomes:
        ref = refs[outcome.parent.index]
        old = next((e for e in before if _same(e, ref, outcome.controller)), {})
        written = [
            condition.written(route.generation, now) for condition in conditions(problems, outcome.refusal)
        ]
        entries.append(
            {
                "parentRef": ref,
                "controllerName": outcome.controller,
                "conditions": settled(written, old.get("conditions") or []),
            }
        )
    return {"parents": entries}


CONTROLLERS = frozenset(
    {"istio.io/gateway-controller", "istio.io/mesh-controller", "io.cilium/gateway-controller"}
)


def _same(entry: Mapping[str, object], ref: Object, controller: str) -> bool:
    return entry.get("controllerName") == controller and entry.get("parentRef") == ref

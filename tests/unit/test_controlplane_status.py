"""The condition on AuthorizationPolicies: what it says, and that it is written only when it differs."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from meshlight.controlplane.envoy.policies import Target
from meshlight.controlplane.policy import compile_policy
from meshlight.controlplane.status import CONDITION, Verdict, conditions, verdict, waypoint_verdict

NOW = datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC)
METHODS = [{"to": [{"operation": {"methods": ["GET"]}}]}]


def policy(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p", "namespace": "shop", "generation": 3}, "spec": spec}


@pytest.mark.parametrize(
    ("spec", "accepted", "reason", "words"),
    [
        ({}, True, "Accepted", "attached to ztunnel"),
        ({"rules": METHODS}, True, "UnsupportedValue", "allows nothing"),
        ({"action": "DENY", "rules": METHODS}, True, "UnsupportedValue", "denies more"),
        ({"action": "AUDIT"}, False, "UnsupportedValue", "no effect"),
    ],
)
def test_verdicts(spec: dict[str, Any], accepted: bool, reason: str, words: str) -> None:
    found = verdict(compile_policy(policy(**spec), "istio-system"), [])
    assert found is not None
    assert (found.accepted, found.reason) == (accepted, reason)
    assert words in found.message
    if spec.get("rules"):
        assert "spec.rules[0].to[0].operation.methods" in found.message


def test_policies_of_waypoints_have_no_verdict() -> None:
    assert verdict(compile_policy(policy(targetRefs=[{"kind": "Service"}]), "istio-system"), []) is None


def test_a_refusal_is_told_with_its_proxy() -> None:
    found = verdict(compile_policy(policy(), "istio-system"), ["ztunnel-1.istio-system: no such enum"])
    assert found == Verdict(False, "Rejected", "refused by ztunnel-1.istio-system: no such enum")


def test_conditions_are_written_once_and_others_kept() -> None:
    obj = policy()
    other = {"type": "WaypointAccepted", "status": "True"}
    obj["status"] = {"conditions": [other]}
    wanted = Verdict(True, "Accepted", "attached to ztunnel")
    fresh = conditions(obj, wanted, NOW)
    assert fresh is not None
    assert fresh[0] == other
    assert fresh[1]["type"] == CONDITION
    assert fresh[1]["observedGeneration"] == 3
    obj["status"] = {"conditions": fresh}
    later = NOW + datetime.timedelta(hours=1)
    assert conditions(obj, wanted, later) is None
    failed = conditions(obj, Verdict(False, "Rejected", "x"), later)
    assert failed is not None
    assert failed[1]["lastTransitionTime"] == "2026-05-01T13:00:00Z"
    obj["metadata"]["generation"] = 4
    again = conditions(obj, wanted, later)
    assert again is not None
    assert again[1]["lastTransitionTime"] == "2026-05-01T12:00:00Z", "its status did not change"
    assert conditions(obj, None, later) == [other]
    assert conditions(policy(), None, later) is None


@pytest.mark.parametrize(
    ("bound", "reason"),
    [({"web": "shop/waypoint"}, "Accepted"), ({"web": ""}, "AncestorNotBound"), ({}, "TargetNotFound")],
)
def test_policies_with_targets_are_about_waypoints(bound: dict[str, str], reason: str) -> None:
    found = waypoint_verdict([Target("Service", "shop", "web")], lambda target: bound.get(target.name))
    assert found is not None and (found.accepted, found.reason) == (reason == "Accepted", reason)
    assert waypoint_verdict([], lambda target: None) is None

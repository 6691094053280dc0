"""Conditions on AuthorizationPolicies: what became of a policy, where its author looks.

`WaypointAccepted` of one with `targetRefs`: whether what it names is there and has a waypoint.
`ZtunnelAccepted` of the others, False when the node proxies do not have it: it is of an action they do not
know, or one of them refused it. What cannot be enforced as written is named, field by field. Written only
when it differs, so that any number of replicas agree without a leader.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from meshlight.controlplane.discovery import Connection, Discovery
from meshlight.controlplane.envoy.policies import Target, targets_of
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.logs import Scope
from meshlight.controlplane.policy import CompiledPolicy
from meshlight.controlplane.resources import AUTHORIZATION_TYPE
from meshlight.controlplane.xds import Rejection
from meshlight.kube.client import ApiError, ApiUnreachable, Cache, Client
from meshlight.kube.resources import AUTHORIZATION_POLICIES, Object

CONDITION = "ZtunnelAccepted"
WAYPOINT_CONDITION = "WaypointAccepted"
_RETRY_SECONDS = 5.0

log = Scope("status")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a condition says."""

    accepted: bool
    reason: str
    message: str


def verdict(policy: CompiledPolicy, refusals: list[str]) -> Verdict | None:
    """The verdict on a policy; None for one that the node proxies are not concerned with.

    As in Istio, a policy of which a part cannot be enforced is accepted, with the reason UnsupportedValue.
    """
    if policy.authorization is None and not policy.findings:
        return None
    if refusals:
        return Verdict(False, "Rejected", "refused by " + "; ".join(sorted(refusals)))
    if policy.findings:
        found = "; ".join(f"{finding.path}: {finding.message}" for finding in policy.findings)
        accepted = policy.authorization is not None
        return Verdict(accepted, "UnsupportedValue", f"{found}. {_consequence(policy)}")
    return Verdict(True, "Accepted", "attached to ztunnel")


def waypoint_verdict(targets: Iterable[Target], bound_to: Callable[[Target], str | None]) -> Verdict | None:
    """The verdict on a policy with targets; None without any.

    `bound_to` names the waypoint or gateway that enforces a target: an empty name means that the target is
    there and nothing enforces it, None that it is not there.
    """
    found = {target: bound_to(target) for target in targets}
    if not found:
        return None
    if enforcing := sorted({name for name in found.values() if name}):
        return Verdict(True, "Accepted", "bound to " + ", ".join(enforcing))
    missing = sorted(f"{t.kind} {t.namespace}/{t.name}" for t, name in found.items() if name is None)
    if missing:
        return Verdict(False, "TargetNotFound", f"{', '.join(missing)} was not found")
    waiting = sorted(f"{target.kind} {target.namespace}/{target.name}" for target in found)
    return Verdict(False, "AncestorNotBound", f"{', '.join(waiting)} is not bound to a waypoint")


def _consequence(policy: CompiledPolicy) -> str:
    if policy.authorization is None:
        return "The policy has no effect at ztunnel; bind it to a waypoint with targetRefs."
    if policy.authorization.action:
        return (
            "The rest of each such rule denies by itself, which denies more than is asked; to enforce it as "
            "written, bind it to a waypoint with targetRefs."
        )
    return (
        "Each such rule allows nothing, which allows less than is asked; to enforce it as written, bind it to "
        "a waypoint with targetRefs."
    )


def conditions(
    obj: Object, wanted: Verdict | None, now: datetime.datetime, kind: str = CONDITION
) -> list[Object] | None:
    """The object's conditions with ours of a `kind` among them; None when they say so already."""
    present: list[Object] = (obj.get("status") or {}).get("conditions") or []
    others = [condition for condition in present if condition.get("type") != kind]
    ours = next((condition for condition in present if condition.get("type") == kind), None)
    if wanted is None:
        return None if ours is None else others
    status, generation = "True" if wanted.accepted else "False", obj["metadata"].get("generation", 1)
    fresh = {
        "type": kind,
        "status": status,
        "reason": wanted.reason,
        "message": wanted.message,
        "observedGeneration": generation,
        "lastTransitionTime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if ours is not None and ours.get("status") == status:
        fresh["lastTransitionTime"] = ours.get("lastTransitionTime", fresh["lastTransitionTime"])
    return None if fresh == ours else [*others, fresh]


class PolicyStatus:
    """Keeps the conditions of every AuthorizationPolicy true."""

    def __init__(self, client: Client, policies: Cache, discovery: Discovery) -> None:
        self._client, self._policies, self._discovery = client, policies, discovery
        self._due: asyncio.Queue[ObjectKey] = asyncio.Queue()
        self._queued: set[ObjectKey] = set()
        self._refusals: dict[ObjectKey, dict[Connection, str]] = {}
        policies.on_change(self._changed)
        discovery.on_verdict(self._refused)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        key = ObjectKey.of(new or old or {})
        if old is None or new is None or old.get("spec") != new.get("spec"):
            self._refusals.pop(key, None)  # of what it said before
        self._add(key)

    def recheck(self) -> None:
        """What policies name came, went or is bound differently: look at those with targets again."""
        for (namespace, name), obj in self._policies.objects.items():
            spec = obj.get("spec") or {}
            if spec.get("targetRefs") or spec.get("targetRef"):
                self._add(ObjectKey(namespace, name))

    def _bound_to(self, target: Target) -> str | None:
        """As `waypoint_verdict` asks it."""
        index, envoy = self._discovery.index, self._discovery.envoy
        key = ObjectKey(target.namespace, target.name)
        if target.kind == "Gateway":
            return str(key) if key in envoy.gateways else None
        if target.kind == "GatewayClass":
            classes = {gateway.gateway_class for gateway in envoy.gateways.values()}
            return f"every Gateway of class {target.name}" if target.name in classes else ""
        if target.kind == "Service":
            if index.service(key) is None:
                return None
            waypoint = index.waypoints.served_by(key)
            return str(waypoint.key) if waypoint else ""
        return ""

    def _refused(self, connection: Connection, rejection: Rejection | None) -> None:
        if rejection is None:
            for key in [key for key, by in self._refusals.items() if by.pop(connection, None)]:
                self._add(key)
        elif rejection.type_url == AUTHORIZATION_TYPE:
            # Proxies name the resource in their message; where none is named, all that was sent is suspect.
            named = [name for name in rejection.names if name in rejection.message] or rejection.names
            for name in named:
                key = ObjectKey(*name.split("/", 1))
                said = f"{connection.session.proxy.name}: {rejection.message}"
                self._refusals.setdefault(key, {})[connection] = said
                self._add(key)

    def _add(self, key: ObjectKey) -> None:
        if key not in self._queued:
            self._queued.add(key)
            self._due.put_nowait(key)

    async def run(self) -> None:
        """Work until cancelled; begins once all policies are known."""
        await self._discovery.synced.wait()
        for namespace, name in self._policies.objects:
            self._add(ObjectKey(namespace, name))
        while True:
            key = await self._due.get()
            self._queued.discard(key)
            try:
                await self._write(key)
            except (ApiError, ApiUnreachable) as error:
                log.warn("status not written", policy=key, error=str(error), retry_after=_RETRY_SECONDS)
                asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._add, key)

    async def _write(self, key: ObjectKey) -> None:
        obj = self._policies.get(key.name, key.namespace)
        policy = self._discovery.index.policies.outcome(key)
        if obj is None or policy is None:
            return
        now = datetime.datetime.now(datetime.UTC)
        targets = targets_of(obj, self._discovery.index.mesh.root_namespace)
        bound = waypoint_verdict(targets, self._bound_to)
        after = conditions(obj, bound, now, WAYPOINT_CONDITION)
        if after is not None:
            obj = {**obj, "status": {**(obj.get("status") or {}), "conditions": after}}
        wanted = verdict(policy, list(self._refusals.get(key, {}).values()))
        fresh = conditions(obj, wanted, now) or after
        if fresh is None:
            return
        patch = {"status": {"conditions": fresh}}
        try:
            await self._client.patch(
                AUTHORIZATION_POLICIES, key.name, patch, key.namespace, subresource="status"
            )
        except ApiError as error:
            if error.code != 404:  # deleted meanwhile
                raise

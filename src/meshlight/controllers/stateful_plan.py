"""What a StatefulSet does next, and what its pods and claims look like. Pure.

Rules: Kubernetes' "StatefulSets" (ordinals, ordered and parallel management, partitions, retention of claims).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from meshlight.controllers.pods import (
    from_template,
    is_available,
    is_finished,
    is_ready,
    is_terminating,
    labels,
    phase,
    reference,
)
from meshlight.controllers.revisions import HASH
from meshlight.kube.resources import Object

POD_NAME = "statefulset.kubernetes.io/pod-name"
POD_INDEX = "apps.kubernetes.io/pod-index"


@dataclass(frozen=True, slots=True)
class Revision:
    """A template with the name of its ControllerRevision."""

    name: str
    template: Object

    @classmethod
    def of(cls, revision: Object) -> Revision:
        """From a ControllerRevision."""
        template = {k: v for k, v in revision["data"]["spec"]["template"].items() if k != "$patch"}
        return cls(revision["metadata"]["name"], template)


@dataclass(frozen=True, slots=True)
class Create:
    """Make the pod of an ordinal."""

    ordinal: int
    revision: Revision


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a pod: it is too many, has ended, or is of an old revision."""

    pod: Object


Step = Create | Delete


def ordinals(item: Object) -> tuple[int, int]:
    """(the first ordinal, how many)."""
    start = int((item["spec"].get("ordinals") or {}).get("start") or 0)
    return start, int(item["spec"].get("replicas", 1))


def wanted(item: Object, ordinal: int) -> bool:
    """Whether a pod of this ordinal is to be."""
    start, count = ordinals(item)
    return start <= ordinal < start + count


def ordinal_of(item: Object, pod: Object) -> int | None:
    """A pod's ordinal; None for a pod that has another's name."""
    match = re.fullmatch(re.escape(item["metadata"]["name"]) + r"-(0|[1-9][0-9]*)", pod["metadata"]["name"])
    return int(match[1]) if match else None


def by_ordinal(item: Object, pods: Iterable[Object]) -> dict[int, Object]:
    """The set's pods in order."""
    found = {n: p for p in pods if (n := ordinal_of(item, p)) is not None}
    return dict(sorted(found.items()))


def partition(item: Object) -> int:
    """The ordinal below which pods keep the old revision."""
    rolling = (item["spec"].get("updateStrategy") or {}).get("rollingUpdate") or {}
    return int(rolling.get("partition") or 0)


def _on_delete(item: Object) -> bool:
    return bool((item["spec"].get("updateStrategy") or {}).get("type") == "OnDelete")


def _revision_for(item: Object, ordinal: int, current: Revision, update: Revision) -> Revision:
    """Of which revision a new pod is."""
    if _on_delete(item):
        return update
    start, _ = ordinals(item)
    before = int((item.get("status") or {}).get("currentReplicas") or 0)
    limit = partition(item)
    old = ordinal < start + (limit if limit else before)
    return current if old and current.name != update.name else update


def plan(
    item: Object, pods: Mapping[int, Object], current: Revision, update: Revision, now: datetime
) -> list[Step]:
    """The next steps: at most one at a time in order, all that are possible in parallel."""
    parallel = item["spec"].get("podManagementPolicy") == "Parallel"
    start, count = ordinals(item)
    least = item["spec"].get("minReadySeconds") or 0
    steps: list[Step] = []
    for ordinal in range(start, start + count):
        pod = pods.get(ordinal)
        if pod is None:
            steps.append(Create(ordinal, _revision_for(item, ordinal, current, update)))
            if not parallel:
                return steps
            continue
        if is_finished(pod) and not is_terminating(pod):
            steps.append(Delete(pod))
            if not parallel:
                return steps
            continue
        if not parallel and (is_terminating(pod) or not is_available(pod, least, now)):
            return steps
    condemned = [n for n in pods if not wanted(item, n)]
    unhealthy = [n for n in pods if is_terminating(pods[n]) or not is_ready(pods[n])]
    for ordinal in sorted(condemned, reverse=True):
        pod = pods[ordinal]
        if is_terminating(pod):
            if not parallel:
                return steps
            continue
        if not parallel and any(n < ordinal or is_terminating(pods[n]) for n in unhealthy if n != ordinal):
            return steps  # others first: going on would leave fewer well ones
        steps.append(Delete(pod))
        if not parallel:
            return steps
    if steps or _on_delete(item):
        return steps
    return _update(item, pods, update, now)


def _update(item: Object, pods: Mapping[int, Object], update: Revision, now: datetime) -> list[Step]:
    """The highest pod of an old revision, once all above it are well."""
    start, count = ordinals(item)
    least = item["spec"].get("minReadySeconds") or 0
    for ordinal in range(start + count - 1, start + partition(item) - 1, -1):
        pod = pods.get(ordinal)
        if pod is None or is_terminating(pod):
            return []
        if labels(pod).get(HASH) != update.name:
            return [Delete(pod)]
        if not is_available(pod, least, now):
            return []
    return []


def pod(item: Object, ordinal: int, revision: Revision) -> Object:
    """The pod of an ordinal."""
    name = f"{item['metadata']['name']}-{ordinal}"
    extra = {HASH: revision.name, POD_NAME: name, POD_INDEX: str(ordinal)}
    made = from_template(item, reference(item, "apps/v1", "StatefulSet"), revision.template, extra)
    del made["metadata"]["generateName"]
    made["metadata"]["name"] = name
    spec = made["spec"]
    spec["hostname"] = name
    if item["spec"].get("serviceName"):
        spec["subdomain"] = item["spec"]["serviceName"]
    templates = [t["metadata"]["name"] for t in item["spec"].get("volumeClaimTemplates") or []]
    kept = [v for v in spec.get("volumes") or [] if v["name"] not in templates]
    own = [{"name": t, "persistentVolumeClaim": {"claimName": f"{t}-{name}"}} for t in templates]
    if kept or own:
        spec["volumes"] = [*kept, *own]
    return made


def claim_names(item: Object, ordinal: int) -> list[str]:
    """Names of the claims of an ordinal."""
    templates = item["spec"].get("volumeClaimTemplates") or []
    return [f"{t['metadata']['name']}-{item['metadata']['name']}-{ordinal}" for t in templates]


def claims(item: Object, ordinal: int) -> list[Object]:
    """The claims of an ordinal."""
    found = []
    for template, name in zip(
        item["spec"].get("volumeClaimTemplates") or [], claim_names(item, ordinal), strict=True
    ):
        given = template.get("metadata") or {}
        selector = (item["spec"].get("selector") or {}).get("matchLabels") or {}
        metadata: Object = {
            "name": name,
            "namespace": item["metadata"]["namespace"],
            "labels": {**(given.get("labels") or {}), **selector},
        }
        if given.get("annotations"):
            metadata["annotations"] = given["annotations"]
        if owners := list(claim_owners(item, None).values()):
            metadata["ownerReferences"] = owners
        found.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": metadata,
                "spec": copy.deepcopy(template["spec"]),
            }
        )
    return found


def claim_owners(item: Object, leaving: Object | None) -> dict[str, Object]:
    """Who takes a claim along when it is deleted: the set, and the pod that leaves for good, by kind."""
    policy = item["spec"].get("persistentVolumeClaimRetentionPolicy") or {}
    owners: dict[str, Object] = {}
    if policy.get("whenDeleted") == "Delete":
        owners["StatefulSet"] = {**reference(item, "apps/v1", "StatefulSet"), "controller": False}
    if leaving is not None and policy.get("whenScaled") == "Delete":
        owners = {"Pod": {**reference(leaving, "v1", "Pod"), "controller": False}}
    for owner in owners.values():
        del owner["controller"], owner["blockOwnerDeletion"]
    return owners


def status(
    item: Object,
    pods: Mapping[int, Object],
    current: Revision,
    update: Revision,
    collisions: int,
    now: datetime,
) -> Object:
    """The status of a StatefulSet with these pods."""
    least = item["spec"].get("minReadySeconds") or 0
    every: Sequence[Object] = list(pods.values())
    started = [p for p in every if not is_finished(p)]
    staying = [p for p in started if not is_terminating(p)]
    made: Object = {
        "observedGeneration": item["metadata"].get("generation", 0),
        "replicas": len(started),
        "readyReplicas": sum(is_ready(p) and phase(p) == "Running" for p in started),
        "availableReplicas": sum(is_available(p, least, now) and phase(p) == "Running" for p in started),
        "currentReplicas": sum(labels(p).get(HASH) == current.name for p in staying),
        "updatedReplicas": sum(labels(p).get(HASH) == update.name for p in staying),
        "currentRevision": current.name,
        "updateRevision": update.name,
    }
    through = made["updatedReplicas"] == made["replicas"] == made["readyReplicas"]
    if not _on_delete(item) and through and made["replicas"] == int(item["spec"].get("replicas", 1)):
        made["currentReplicas"], made["currentRevision"] = made["updatedReplicas"], update.name
    if collisions:
        made["collisionCount"] = collisions
    return made

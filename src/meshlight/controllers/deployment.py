"""Turns each Deployment into ReplicaSets, so that a new template replaces the old step by step.

The shell around `rollout` (how many) and `deployment_status` (what is said); scaling carries the
resourceVersion it was computed from, so a lagging cache ends in a conflict and a retry.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from meshlight.controllers import deployment_status, rollout
from meshlight.controllers.ownership import Dependents
from meshlight.controllers.pods import (
    clock,
    controller_of,
    is_finished,
    is_terminating,
    labels,
    notes,
    reference,
    template_hash,
)
from meshlight.controllers.rollout import Bounds, SetState
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import DEPLOYMENTS, Object
from meshlight.kube.selectors import match_labels

REVISION = "deployment.kubernetes.io/revision"
HISTORY = "deployment.kubernetes.io/revision-history"
DESIRED = "deployment.kubernetes.io/desired-replicas"
MOST = "deployment.kubernetes.io/max-replicas"
HASH = "pod-template-hash"
_OWN = (REVISION, HISTORY, DESIRED, MOST, "deprecated.deployment.rollback.to")
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_WORKERS = 2


def same_template(item: Object, template: Object) -> bool:
    """Whether a ReplicaSet was made of this template; the hash label is not part of it."""

    def plain(found: Object) -> Any:
        metadata = dict(found.get("metadata") or {})
        kept = {k: v for k, v in (metadata.get("labels") or {}).items() if k != HASH}
        return {"labels": kept, "annotations": metadata.get("annotations") or {}, "spec": found["spec"]}

    return bool(plain(item["spec"]["template"]) == plain(template))


def current(item: Object, sets: Sequence[Object]) -> Object | None:
    """The ReplicaSet of the Deployment's template: of several the oldest."""
    found = [s for s in sets if same_template(s, item["spec"]["template"])]
    return min(found, key=lambda s: (s["metadata"]["creationTimestamp"], s["metadata"]["name"]), default=None)


def number_of(item: Object) -> int:
    """A ReplicaSet's revision."""
    text = notes(item).get(REVISION, "0")
    return int(text) if text.isdigit() else 0


def revision(fresh: Object | None, olds: Sequence[Object]) -> int:
    """The number of the present template: one more than any other's, kept while it is the newest."""
    newest = max((number_of(s) for s in olds), default=0)
    present = number_of(fresh) if fresh else 0
    return present if present > newest else newest + 1


def set_annotations(item: Object, before: Object | None, number: int, bounds: Bounds) -> dict[str, str]:
    """The annotations of the newest ReplicaSet: the Deployment's, and the bookkeeping."""
    old = notes(before) if before else {}
    found = {k: v for k, v in notes(item).items() if k not in _OWN and k != _LAST_APPLIED}
    found = {**old, **found, REVISION: str(number), **counts_known(bounds)}
    if before and number_of(before) and number_of(before) < number:
        history = [h for h in old.get(HISTORY, "").split(",") if h]
        found[HISTORY] = ",".join([*history, str(number_of(before))])
    return found


def counts_known(bounds: Bounds) -> dict[str, str]:
    """What a ReplicaSet remembers of the Deployment's size, for proportional scaling."""
    return {DESIRED: str(bounds.wanted), MOST: str(bounds.most)}


def state(item: Object) -> SetState:
    """A ReplicaSet as the arithmetic sees it."""
    most = notes(item).get(MOST, "0")
    return SetState(
        item["metadata"]["name"],
        int(item["spec"].get("replicas", 1)),
        int((item.get("status") or {}).get("availableReplicas") or 0),
        item["metadata"].get("creationTimestamp") or "",
        int(most) if most.isdigit() else 0,
    )


def rescaled(sets: Sequence[Object], bounds: Bounds) -> bool:
    """Whether `replicas` has changed since the ReplicaSets were last told."""
    active = [s for s in sets if s["spec"].get("replicas", 1)]
    known = [notes(s).get(DESIRED) for s in active]
    return any(k is not None and k != str(bounds.wanted) for k in known)


class Deployments:
    """Reconciles Deployments from the caches of Deployments, ReplicaSets and pods."""

    def __init__(
        self, client: Client, deployments: Cache, sets: Dependents, pods: Dependents, recorder: Recorder
    ) -> None:
        self.client, self.deployments, self.sets, self.pods = client, deployments, sets, pods
        self.recorder = recorder
        self.queue = WorkQueue("deployment", self.reconcile, _WORKERS)
        deployments.on_change(self._changed)
        sets.cache.on_change(self._set_changed)
        pods.cache.on_change(self._pod_changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        metadata = (new or old or {})["metadata"]
        self.queue.add((metadata["namespace"], metadata["name"]))

    def _set_changed(self, old: Object | None, new: Object | None) -> None:
        for found in (old, new):
            if found is None:
                continue
            namespace = found["metadata"]["namespace"]
            owner = controller_of(found)
            if owner and owner["kind"] == "Deployment":
                self.queue.add((namespace, owner["name"]))
            elif owner is None:
                for key, item in self.deployments.objects.items():
                    if key[0] == namespace and match_labels(item["spec"].get("selector"), labels(found)):
                        self.queue.add(key)

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        """Recreate waits for the last old pod to be gone."""
        gone = old is not None and (new is None or (is_finished(new) and not is_finished(old)))
        owner = controller_of(old) if gone and old else None
        if old is None or not owner or owner["kind"] != "ReplicaSet":
            return
        found = self.sets.cache.get(owner["name"], old["metadata"]["namespace"])
        above = controller_of(found) if found else None
        if above and above["kind"] == "Deployment":
            key = (old["metadata"]["namespace"], above["name"])
            item = self.deployments.objects.get(key)
            if item and (item["spec"].get("strategy") or {}).get("type") == "Recreate":
                self.queue.add(key)

    async def reconcile(self, key: Key) -> None:
        """Take one step of the rollout of one Deployment and write its status."""
        item = self.deployments.objects.get(key)
        if item is None:
            return
        sets = await self.sets.claim(item, "apps/v1", "Deployment")
        if is_terminating(item):
            await self._write_status(item, sets, current(item, sets))
            return
        bounds = Bounds.of(item["spec"])
        fresh = current(item, sets)
        if item["spec"].get("paused") or rescaled(sets, bounds):
            await self._resize(item, sets, fresh, bounds)
        else:
            fresh = await self._roll(item, sets, fresh, bounds)
        await self._write_status(item, self._fresh(sets, fresh), self._latest(fresh))

    def _latest(self, found: Object | None) -> Object | None:
        """A ReplicaSet as it is after this reconciliation's writes."""
        if found is None:
            return None
        metadata = found["metadata"]
        return self.sets.cache.get(metadata["name"], metadata["namespace"])

    def _fresh(self, sets: Sequence[Object], made: Object | None) -> list[Object]:
        known = {s["metadata"]["name"]: s for s in sets}
        if made is not None:
            known[made["metadata"]["name"]] = made
        return [now for s in known.values() if (now := self._latest(s)) is not None]

    async def _resize(self, item: Object, sets: Sequence[Object], fresh: Object | None, bounds: Bounds) -> None:
        """Follow a change of `replicas` alone."""
        olds = [state(s) for s in sets if s is not fresh]
        rolling = (item["spec"].get("strategy") or {}).get("type") != "Recreate"
        counts = rollout.scaled(bounds, state(fresh) if fresh else None, olds, rolling=rolling)
        for each in sets:
            await self._scale(item, each, counts.get(each["metadata"]["name"]), bounds)

    async def _roll(
        self, item: Object, sets: Sequence[Object], fresh: Object | None, bounds: Bounds
    ) -> Object | None:
        """One step towards the template; returns its ReplicaSet."""
        olds = [s for s in sets if s is not fresh]
        number = revision(fresh, olds)
        recreate = (item["spec"].get("strategy") or {}).get("type") == "Recreate"
        left = self._pods_left(olds) if recreate else 0
        if recreate and (left or any(s["spec"].get("replicas", 1) for s in olds)) and fresh is None:
            for name, count in rollout.recreate_step(bounds, None, [state(s) for s in olds], left).items():
                await self._scale(item, next(s for s in olds if s["metadata"]["name"] == name), count, bounds)
            return None
        if fresh is None:
            first = bounds.wanted if recreate else rollout.first_count(bounds, [state(s) for s in olds])
            fresh = await self._create(item, first, number, bounds)
            await self._number(item, number)
        else:
            fresh = await self._annotate(item, fresh, number, bounds)
            await self._number(item, number)
            states = [state(s) for s in olds]
            if recreate:
                counts = rollout.recreate_step(bounds, state(fresh), states, left)
            else:
                counts = rollout.rolling_step(bounds, state(fresh), states)
            for each in [fresh, *olds]:
                if each["metadata"]["name"] in counts:
                    await self._scale(item, each, counts[each["metadata"]["name"]], bounds)
        if deployment_status.complete(item, self._fresh(sets, fresh), self._latest(fresh)):
            await self._prune(olds, item["spec"].get("revisionHistoryLimit", 10))
        return fresh

    def _pods_left(self, olds: Sequence[Object]) -> int:
        return sum(not is_finished(p) for s in olds for p in self.pods.of(s["metadata"]["uid"]))

    async def _scale(self, item: Object, found: Object, count: int | None, bounds: Bounds) -> None:
        metadata, before = found["metadata"], int(found["spec"].get("replicas", 1))
        known = counts_known(bounds) if before or count else {}
        same_notes = all(notes(found).get(k) == v for k, v in known.items())
        if (count is None or count == before) and same_notes:
            return
        patch: Object = {
            "metadata": {"resourceVersion": metadata["resourceVersion"], "annotations": known},
            "spec": {"replicas": before if count is None else count},
        }
        await self.sets.patch(found, patch)
        if count is not None and count != before:
            self._scaled(item, metadata["name"], before, count)

    def _scaled(self, item: Object, name: str, before: int, after: int) -> None:
        way = "up" if after > before else "down"
        words = f"Scaled {way} replica set {name} from {before} to {after}"
        self.recorder.record(item, "Normal", "ScalingReplicaSet", words)

    async def _annotate(self, item: Object, fresh: Object, number: int, bounds: Bounds) -> Object:
        wanted = set_annotations(item, fresh, number, bounds)
        spec: Object = {}
        if (least := item["spec"].get("minReadySeconds", 0)) != fresh["spec"].get("minReadySeconds", 0):
            spec["minReadySeconds"] = least
        if wanted == notes(fresh) and not spec:
            return fresh
        version = {"resourceVersion": fresh["metadata"]["resourceVersion"]}
        patch: Object = {"metadata": {**version, "annotations": wanted}}
        if spec:
            patch["spec"] = spec
        return await self.sets.patch(fresh, patch) or fresh

    async def _number(self, item: Object, number: int) -> None:
        if notes(item).get(REVISION) != str(number):
            patch = {"metadata": {"annotations": {REVISION: str(number)}}}
            metadata = item["metadata"]
            made = await self.client.patch(DEPLOYMENTS, metadata["name"], patch, metadata["namespace"])
            self.deployments.wrote(made)

    async def _create(self, item: Object, count: int, number: int, bounds: Bounds) -> Object | None:
        metadata = item["metadata"]
        salt = int((item.get("status") or {}).get("collisionCount") or 0)
        digest = template_hash(item["spec"]["template"], salt)
        template = copy.deepcopy(item["spec"]["template"])
        marked = {**((template.get("metadata") or {}).get("labels") or {}), HASH: digest}
        template["metadata"] = {**(template.get("metadata") or {}), "labels": marked}
        selector = copy.deepcopy(item["spec"]["selector"])
        selector["matchLabels"] = {**(selector.get("matchLabels") or {}), HASH: digest}
        made: Object = {
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {
                "name": f"{metadata['name']}-{digest}",
                "namespace": metadata["namespace"],
                "labels": marked,
                "annotations": set_annotations(item, None, number, bounds),
                "ownerReferences": [reference(item, "apps/v1", "Deployment")],
            },
            "spec": {"replicas": count, "selector": selector, "template": template},
        }
        if least := item["spec"].get("minReadySeconds"):
            made["spec"]["minReadySeconds"] = least
        try:
            created = await self.sets.create(made)
        except ApiError as error:
            if error.code == 409 and error.reason == "AlreadyExists":
                await self._collide(item, salt)
            raise
        if count:
            self._scaled(item, created["metadata"]["name"], 0, count)
        return created

    async def _collide(self, item: Object, salt: int) -> None:
        """Another ReplicaSet has the name: the next try makes another one."""
        metadata = item["metadata"]
        patch = {"status": {"collisionCount": salt + 1}}
        made = await self.client.patch(
            DEPLOYMENTS, metadata["name"], patch, metadata["namespace"], subresource="status"
        )
        self.deployments.wrote(made)

    async def _prune(self, olds: Sequence[Object], limit: int) -> None:
        """Delete the oldest empty ReplicaSets beyond the history that is kept for `rollout undo`."""
        empty = [
            s
            for s in olds
            if not s["spec"].get("replicas", 1)
            and not (s.get("status") or {}).get("replicas", 0)
            and not is_terminating(s)
        ]
        for stale in sorted(empty, key=number_of)[: max(0, len(empty) - limit)]:
            await self.sets.delete(stale)

    async def _write_status(self, item: Object, sets: Sequence[Object], fresh: Object | None) -> None:
        metadata = item["metadata"]
        item = self.deployments.get(metadata["name"], metadata["namespace"]) or item
        now = clock()
        made = deployment_status.status(item, sets, fresh, now)
        known = item.get("status") or {}
        if any(known.get(k, 0) != v for k, v in made.items()):
            try:
                answer = await self.client.patch(
                    DEPLOYMENTS,
                    metadata["name"],
                    {"status": made},
                    metadata["namespace"],
                    subresource="status",
                )
            except ApiError as error:
                if error.code != 404:
                    raise
                return
            self.deployments.wrote(answer)
            item = answer
        if (wait := deployment_status.deadline_in(item, now)) is not None:
            self.queue.add_after((metadata["namespace"], metadata["name"]), wait)

"""StatefulSets: pods with ordinals, stable names and claims of their own, made, scaled and updated in order.

The shell around `stateful_plan`; templates of earlier revisions come from ControllerRevisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from meshlight.controllers import stateful_plan
from meshlight.controllers.ownership import Dependents, side_by_side
from meshlight.controllers.pods import clock, controller_of, is_terminating, labels, soonest
from meshlight.controllers.revisions import Revisions, names_in_use
from meshlight.controllers.stateful_plan import Create, Delete, Revision, Step
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import PERSISTENT_VOLUME_CLAIMS, STATEFUL_SETS, Object
from meshlight.kube.selectors import match_labels


class StatefulSets:
    """Reconciles StatefulSets from the caches of StatefulSets, pods, claims and revisions."""

    def __init__(
        self,
        client: Client,
        items: Cache,
        pods: Dependents,
        claims: Cache,
        revisions: Dependents,
        recorder: Recorder,
    ) -> None:
        self.client, self.items, self.pods, self.claims = client, items, pods, claims
        self.revisions, self.recorder = Revisions(revisions, "StatefulSet"), recorder
        self.queue = WorkQueue("statefulset", self.reconcile)
        items.on_change(self._changed)
        pods.cache.on_change(self._pod_changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        metadata = (new or old or {})["metadata"]
        self.queue.add((metadata["namespace"], metadata["name"]))

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        for pod in (old, new):
            if pod is None:
                continue
            namespace = pod["metadata"]["namespace"]
            owner = controller_of(pod)
            if owner and owner["kind"] == "StatefulSet":
                self.queue.add((namespace, owner["name"]))
            elif owner is None and labels(pod):
                for key, item in self.items.objects.items():
                    if key[0] == namespace and match_labels(item["spec"].get("selector"), labels(pod)):
                        self.queue.add(key)

    async def reconcile(self, key: Key) -> None:
        """Take one StatefulSet a step further and write its status."""
        item = self.items.objects.get(key)
        if item is None or is_terminating(item):
            return
        await self.pods.claim(item, "apps/v1", "StatefulSet")
        update, collisions = await self.revisions.sync(item)
        current = self._current(item, update)
        now = clock()
        pods = self._pods(item)
        for step in stateful_plan.plan(item, pods, Revision.of(current), Revision.of(update), now):
            await self._do(item, step)
        await self._keep_claims(item)
        pods = self._pods(item)
        made = stateful_plan.status(item, pods, Revision.of(current), Revision.of(update), collisions, now)
        known = item.get("status") or {}
        if any(known.get(k, 0) != v for k, v in made.items()):
            answer = await self.client.patch(
                STATEFUL_SETS, key[1], {"status": made}, key[0], subresource="status"
            )
            self.items.wrote(answer)
        live = names_in_use(list(pods.values()), key[1], whole=True)
        live |= {made["currentRevision"], made["updateRevision"]}
        await self.revisions.prune(item, live, item["spec"].get("revisionHistoryLimit", 10))
        least = item["spec"].get("minReadySeconds") or 0
        if (wait := soonest(pods.values(), least, now)) is not None:
            self.queue.add_after(key, wait)

    def _current(self, item: Object, update: Object) -> Object:
        """The revision that pods are updated from."""
        name = (item.get("status") or {}).get("currentRevision")
        found = [r for r in self.revisions.of(item) if r["metadata"]["name"] == name]
        return found[0] if found else update

    def _pods(self, item: Object) -> dict[int, Object]:
        return stateful_plan.by_ordinal(item, self.pods.of(item["metadata"]["uid"]))

    async def _do(self, item: Object, step: Step) -> None:
        name = item["metadata"]["name"]
        match step:
            case Create(ordinal, revision):
                pod = stateful_plan.pod(item, ordinal, revision)
                await self._make_claims(item, ordinal, pod)
                try:
                    made = await self.pods.create(pod)
                except ApiError as error:
                    if error.reason == "AlreadyExists":
                        # Another's pod has the name, or ours is not shown yet: the watch tells.
                        words = f"create Pod {pod['metadata']['name']} in StatefulSet {name} failed error: "
                        self.recorder.record(item, "Warning", "FailedCreate", words + error.message)
                    elif "being terminated" in error.message:
                        return
                    else:
                        words = f"create Pod {pod['metadata']['name']} in StatefulSet {name} failed error: "
                        self.recorder.record(item, "Warning", "FailedCreate", words + error.message)
                    raise
                words = f"create Pod {made['metadata']['name']} in StatefulSet {name} successful"
                self.recorder.record(item, "Normal", "SuccessfulCreate", words)
            case Delete(pod):
                await self._hand_over(item, pod)
                await self.pods.delete(pod)
                words = f"delete Pod {pod['metadata']['name']} in StatefulSet {name} successful"
                self.recorder.record(item, "Normal", "SuccessfulDelete", words)

    # Claims.

    async def _make_claims(self, item: Object, ordinal: int, pod: Object) -> None:
        namespace = item["metadata"]["namespace"]
        for claim in stateful_plan.claims(item, ordinal):
            name = claim["metadata"]["name"]
            known = self.claims.get(name, namespace)
            if known is not None:
                if is_terminating(known):
                    raise ApiError(409, "Conflict", f'persistentvolumeclaim "{name}" is being deleted')
                continue
            try:
                self.claims.wrote(await self.client.create(PERSISTENT_VOLUME_CLAIMS, claim))
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
                continue
            words = (
                f"create Claim {name} Pod {pod['metadata']['name']} in StatefulSet "
                f"{item['metadata']['name']} success"
            )
            self.recorder.record(item, "Normal", "SuccessfulCreate", words)

    async def _keep_claims(self, item: Object) -> None:
        """Claims belong to the set, to the pod that goes, or to nobody, as the retention policy says."""
        if not item["spec"].get("volumeClaimTemplates"):
            return
        first, count = stateful_plan.ordinals(item)
        await side_by_side(
            partial(self._own, item, name, stateful_plan.claim_owners(item, None))
            for ordinal in range(first, first + count)
            for name in stateful_plan.claim_names(item, ordinal)
        )

    async def _hand_over(self, item: Object, pod: Object) -> None:
        """A pod that goes for good takes its claims with it, if the policy says so."""
        ordinal = stateful_plan.ordinal_of(item, pod)
        if ordinal is None or stateful_plan.wanted(item, ordinal):
            return
        for name in stateful_plan.claim_names(item, ordinal):
            await self._own(item, name, stateful_plan.claim_owners(item, pod))

    async def _own(self, item: Object, name: str, owners: Mapping[str, Any]) -> None:
        claim = self.claims.get(name, item["metadata"]["namespace"])
        if claim is None or is_terminating(claim):
            return
        known = claim["metadata"].get("ownerReferences") or []
        kept = [o for o in known if o["kind"] not in ("StatefulSet", "Pod")]
        wanted = [*kept, *owners.values()]
        if [o["uid"] for o in wanted] == [o["uid"] for o in known]:
            return
        patch = {"metadata": {"ownerReferences": wanted or None}}
        metadata = claim["metadata"]
        answer = await self.client.patch(PERSISTENT_VOLUME_CLAIMS, name, patch, metadata["namespace"])
        self.claims.wrote(answer)

"""HorizontalPodAutoscalers: scales workloads by what their pods use, every fifteen seconds.

The shell around `autoscaling`: it asks `metrics.k8s.io` and writes the `scale` subresource.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime

from meshlight.controllers import autoscaling
from meshlight.controllers.autoscaling import History, NoMetrics, Reading
from meshlight.controllers.pods import clock, condition, labels, stamp
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube import selectors
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.pod_resources import amounts
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import AUTOSCALERS, DEPLOYMENTS, REPLICA_SETS, STATEFUL_SETS, Object

PERIOD = 15.0
_METRICS = "/apis/metrics.k8s.io/v1beta1/namespaces/{}/pods"
_TARGETS = {(r.group, r.kind): r for r in (DEPLOYMENTS, REPLICA_SETS, STATEFUL_SETS)}


class Autoscalers:
    """Reconciles autoscalers from the caches of autoscalers and pods."""

    def __init__(self, client: Client, items: Cache, pods: Cache, recorder: Recorder) -> None:
        self.client, self.items, self.pods, self.recorder = client, items, pods, recorder
        self.queue = WorkQueue("autoscaler", self.reconcile)
        self._history: dict[str, History] = {}
        items.on_change(self._changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        if new is None and old is not None:
            self._history.pop(old["metadata"]["uid"], None)
        elif new is not None and (old is None or old["spec"] != new["spec"]):
            self.queue.add((new["metadata"]["namespace"], new["metadata"]["name"]))

    async def reconcile(self, key: Key) -> None:
        """Look at one autoscaler's metrics and scale its target."""
        item = self.items.objects.get(key)
        if item is None:
            return
        self.queue.add_after(key, PERIOD)
        now = clock()
        target = item["spec"]["scaleTargetRef"]
        resource = _TARGETS.get(((target.get("apiVersion") or "").rpartition("/")[0], target["kind"]))
        try:
            if resource is None:
                raise NoMetrics("FailedGetScale", f"{target['kind']} cannot be scaled by an autoscaler here")
            path = resource.path(key[0], target["name"]) + "/scale"
            scale = await self.client.request("GET", path)
        except (ApiError, NoMetrics) as error:
            words = f"the HPA controller was unable to get the target's current scale: {error}"
            self.recorder.record(item, "Warning", "FailedGetScale", str(error))
            await self._write(item, {}, [("AbleToScale", "False", "FailedGetScale", words)], now)
            return
        await self._scale(item, path, scale, now)

    async def _scale(self, item: Object, path: str, scale: Object, now: datetime) -> None:
        replicas = int(scale["spec"].get("replicas", 0))
        seen = int((scale.get("status") or {}).get("replicas", 0))
        status: Object = {"currentReplicas": seen, "desiredReplicas": replicas}
        able = ("AbleToScale", "True", "ReadyForNewScale", "recommended size matches current size")
        if replicas == 0:
            words = "scaling is disabled since the replica count of the target is zero"
            await self._write(item, status, [able, ("ScalingActive", "False", "ScalingDisabled", words)], now)
            return
        try:
            readings = await self._readings(item, scale, replicas)
        except NoMetrics as error:
            self.recorder.record(item, "Warning", error.reason, error.message)
            await self._write(
                item, status, [able, ("ScalingActive", "False", error.reason, error.message)], now
            )
            return
        most = max(readings, key=lambda r: r.replicas)
        history = self._history.setdefault(item["metadata"]["uid"], History())
        wanted, limited = autoscaling.settled(item["spec"], most.replicas, replicas, history, time.monotonic())
        status |= {"desiredReplicas": wanted, "currentMetrics": [r.current for r in readings]}
        if wanted != replicas:
            await self.client.request(
                "PATCH", path, {"spec": {"replicas": wanted}}, content_type="application/merge-patch+json"
            )
            history.changed.append((time.monotonic(), wanted - replicas))
            way = "above" if wanted > replicas else "below"
            words = f"New size: {wanted}; reason: {most.name} {way} target"
            self.recorder.record(item, "Normal", "SuccessfulRescale", words)
            status["lastScaleTime"] = stamp(now)
            said = f"the HPA controller was able to update the target scale to {wanted}"
            able = ("AbleToScale", "True", "SucceededRescale", said)
        metric = f"the HPA was able to successfully calculate a replica count from {most.name}"
        bounded = (
            "ScalingLimited",
            "False",
            "DesiredWithinRange",
            "the desired count is within the acceptable range",
        )
        if limited and limited != "stabilized":
            words = f"the desired replica count is held at {wanted} by its bounds or policies"
            bounded = ("ScalingLimited", "True", limited, words)
        await self._write(
            item, status, [able, ("ScalingActive", "True", "ValidMetricFound", metric), bounded], now
        )

    async def _readings(self, item: Object, scale: Object, replicas: int) -> list[Reading]:
        namespace = item["metadata"]["namespace"]
        selector = (scale.get("status") or {}).get("selector") or ""
        chosen = selectors.labels(selector)
        pods = [p for k, p in self.pods.objects.items() if k[0] == namespace and chosen(labels(p))]
        path = _METRICS.format(namespace)
        try:
            listed = await self.client.request("GET", path, params={"labelSelector": selector})
        except ApiError as error:
            raise NoMetrics("FailedGetResourceMetric", f"unable to fetch metrics: {error.message}") from error
        used = {
            m["metadata"]["name"]: {c["name"]: amounts(c["usage"]) for c in m["containers"]}
            for m in listed.get("items") or []
        }
        found, failure = [], NoMetrics("InvalidMetrics", "the autoscaler has no metrics")
        for metric in item["spec"].get("metrics") or []:
            try:
                found.append(autoscaling.reading(metric, pods, used, replicas))
            except NoMetrics as error:
                failure = error
        if not found:
            raise failure
        return found

    async def _write(
        self, item: Object, status: Object, conditions: Sequence[tuple[str, str, str, str]], now: datetime
    ) -> None:
        known = item.get("status") or {}
        made = {"observedGeneration": item["metadata"].get("generation", 0), **status}
        said = []
        for kind, value, reason, message in conditions:
            before = condition(item, kind)
            since = before.get("lastTransitionTime") if before.get("status") == value else stamp(now)
            said.append(
                {
                    "type": kind,
                    "status": value,
                    "reason": reason,
                    "message": message,
                    "lastTransitionTime": since,
                }
            )
        made["conditions"] = said
        if all(known.get(k) == v for k, v in made.items()):
            return
        metadata = item["metadata"]
        try:
            answer = await self.client.patch(
                AUTOSCALERS, metadata["name"], {"status": made}, metadata["namespace"], subresource="status"
            )
        except ApiError as error:
            if error.code != 404:
                raise
            return
        self.items.wrote(answer)

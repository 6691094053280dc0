"""Jobs: runs pods until enough have succeeded, and says how it ended.

The shell around `job_plan`. Finished pods are counted exactly once: listed in the status first, then their
finalizer goes, then they become part of the numbers; a crash in between repeats a step that changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime
from functools import partial

from meshlight.controllers import indexes, job_plan
from meshlight.controllers.job_plan import FAILURES, IGNORED, INDEX, TRACKING, End, Tally
from meshlight.controllers.ownership import Dependents, side_by_side
from meshlight.controllers.pods import (
    clock,
    condition,
    controller_of,
    from_template,
    is_terminating,
    moment,
    reference,
    stamp,
)
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import JOBS, Object

_BURST = 500
_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_WORKERS = 2


def pod_of(job: Object, index: int | None, pods: Sequence[Object]) -> Object:
    """A pod of a Job, the one of a completion index if it has them."""
    made = from_template(job, reference(job, "batch/v1", "Job"), job["spec"]["template"])
    metadata, name = made["metadata"], job["metadata"]["name"]
    metadata["finalizers"] = [*(metadata.get("finalizers") or []), TRACKING]
    if index is None:
        return made
    counted, ignored = job_plan.earlier_failures(pods, index)
    marks = {**(metadata.get("annotations") or {}), INDEX: str(index)}
    if job["spec"].get("backoffLimitPerIndex") is not None:
        marks |= {FAILURES: str(counted), IGNORED: str(ignored)}
    metadata["annotations"] = marks
    metadata["labels"][INDEX] = str(index)
    suffix = "".join(random.choices(_LETTERS, k=5))
    metadata["name"] = f"{name[: 57 - len(str(index))]}-{index}-{suffix}"
    del metadata["generateName"]
    made["spec"].setdefault("hostname", f"{name}-{index}"[:63])
    variable = {
        "name": "JOB_COMPLETION_INDEX",
        "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX}']"}},
    }
    for field in ("initContainers", "containers"):
        for container in made["spec"].get(field) or []:
            if not any(e["name"] == variable["name"] for e in container.get("env") or []):
                container["env"] = [*(container.get("env") or []), variable]
    return made


def is_ended(job: Object) -> bool:
    """Whether a Job is complete or has failed."""
    return any(condition(job, kind).get("status") == "True" for kind in ("Complete", "Failed"))


class Jobs:
    """Reconciles Jobs from the caches of Jobs and pods."""

    def __init__(self, client: Client, jobs: Cache, pods: Dependents, recorder: Recorder) -> None:
        self.client, self.jobs, self.pods, self.recorder = client, jobs, pods, recorder
        self.queue = WorkQueue("job", self.reconcile, _WORKERS)
        jobs.on_change(self._changed)
        pods.cache.on_change(self._pod_changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        metadata = (new or old or {})["metadata"]
        self.queue.add((metadata["namespace"], metadata["name"]))

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        for pod in (old, new):
            owner = controller_of(pod) if pod else None
            if pod and owner and owner["kind"] == "Job":
                self.queue.add((pod["metadata"]["namespace"], owner["name"]))
                if self.jobs.get(owner["name"], pod["metadata"]["namespace"]) is None:
                    self.queue.add((pod["metadata"]["namespace"] + "\0", pod["metadata"]["name"]))

    async def reconcile(self, key: Key) -> None:
        """Take one Job a step further."""
        if key[0].endswith("\0"):
            await self._orphan(key[0][:-1], key[1])
            return
        job = self.jobs.objects.get(key)
        if job is None or is_terminating(job):
            for pod in self.pods.of(job["metadata"]["uid"]) if job else ():
                await self._untrack(pod)
            return
        if job["spec"].get("managedBy", "kubernetes.io/job-controller") != "kubernetes.io/job-controller":
            return
        if is_ended(job):
            await self._after(key, job)
            return
        now = clock()
        job = await self._begin(job, now)
        pods = await self.pods.claim(job, "batch/v1", "Job")
        found = job_plan.tally(job, pods)
        while job_plan.uncounted(job, found):  # others may finish while the first are counted
            job = await self._count(job, found)
            pods = self.pods.of(job["metadata"]["uid"])
            found = job_plan.tally(job, pods)
        if (end := job_plan.end_of(job, found, now)) is not None:
            await self._end(job, found, end, now)
            return
        wanted = job_plan.need(job, found, now)
        refused: ApiError | None = None
        try:
            await side_by_side(partial(self._delete, job, p) for p in wanted.delete)
            await side_by_side(partial(self._create, job, pods, n) for n in wanted.create[:_BURST])
        except ApiError as error:
            refused = error
        job = await self._write(job, job_plan.tally(job, self.pods.of(job["metadata"]["uid"])), [])
        if refused is not None:
            raise refused
        self._wake(key, job, wanted.wait, now)

    def _wake(self, key: Key, job: Object, wait: float, now: datetime) -> None:
        if wait:
            self.queue.add_after(key, wait)
        deadline, started = job["spec"].get("activeDeadlineSeconds"), (job.get("status") or {}).get("startTime")
        if deadline is not None and started and not job["spec"].get("suspend"):
            left = int(deadline) - (now - moment(started)).total_seconds()
            self.queue.add_after(key, max(left, 0.05))

    async def _orphan(self, namespace: str, name: str) -> None:
        """A pod whose Job is gone: nobody counts it any more."""
        pod = self.pods.cache.get(name, namespace)
        owner = controller_of(pod) if pod else None
        if pod and owner and self.jobs.get(owner["name"], namespace) is None:
            await self._untrack(pod)

    async def _untrack(self, pod: Object) -> None:
        finalizers = pod["metadata"].get("finalizers") or []
        if TRACKING in finalizers:
            left = [f for f in finalizers if f != TRACKING]
            patched = await self.pods.patch(pod, {"metadata": {"finalizers": left or None}})
            if patched is None or (is_terminating(patched) and not left and _no_grace(patched)):
                self.pods.cache.erased(pod)

    async def _begin(self, job: Object, now: datetime) -> Object:
        """Start time and suspension."""
        status = job.get("status") or {}
        suspended = condition(job, "Suspended")
        if job["spec"].get("suspend"):
            if suspended.get("status") == "True":
                return job
            self.recorder.record(job, "Normal", "Suspended", "Job suspended")
            paused = _condition("Suspended", "True", "JobSuspended", "Job suspended", now)
            return await self._patch(job, {"conditions": _with(status, paused), "startTime": None})
        if suspended.get("status") == "True":
            self.recorder.record(job, "Normal", "Resumed", "Job resumed")
            resumed = _condition("Suspended", "False", "JobResumed", "Job resumed", now)
            return await self._patch(job, {"conditions": _with(status, resumed), "startTime": stamp(now)})
        if not status.get("startTime"):
            return await self._patch(job, {"startTime": stamp(now)})
        return job

    async def _count(self, job: Object, found: Tally) -> Object:
        """Take newly finished pods into the numbers."""
        status = job.get("status") or {}
        waiting = status.get("uncountedTerminatedPods") or {}
        succeeded = [*(waiting.get("succeeded") or []), *(p["metadata"]["uid"] for p in found.new_succeeded)]
        failed = [*(waiting.get("failed") or []), *(p["metadata"]["uid"] for p in found.new_failed)]
        if found.fatal:
            words = found.fatal
            target = _condition("FailureTarget", "True", "PodFailurePolicy", words, clock())
            job = await self._patch(job, {"conditions": _with(status, target)})
            status = job.get("status") or {}
        if found.new_succeeded or found.new_failed:
            job = await self._patch(
                job, {"uncountedTerminatedPods": {"succeeded": succeeded, "failed": failed}}
            )
        gone = {*succeeded, *failed, *(p["metadata"]["uid"] for p in found.ignored)}
        await side_by_side(
            partial(self._untrack, p)
            for p in self.pods.of(job["metadata"]["uid"])
            if p["metadata"]["uid"] in gone
        )
        made: Object = {
            "succeeded": int(status.get("succeeded") or 0) + len(succeeded),
            "failed": int(status.get("failed") or 0) + len(failed),
            "uncountedTerminatedPods": {"succeeded": None, "failed": None},
        }
        if job_plan.is_indexed(job):
            made["completedIndexes"] = indexes.text(found.done)
            made["succeeded"] = len(found.done)
            if job["spec"].get("backoffLimitPerIndex") is not None:
                made["failedIndexes"] = indexes.text(found.given_up)
        return await self._patch(job, made)

    async def _create(self, job: Object, pods: Sequence[Object], index: int | None) -> None:
        try:
            made = await self.pods.create(pod_of(job, index, pods))
        except ApiError as error:
            if "being terminated" in error.message:
                return
            self.recorder.record(job, "Warning", "FailedCreate", f"Error creating: {error.message}")
            raise
        words = f"Created pod: {made['metadata']['name']}"
        self.recorder.record(job, "Normal", "SuccessfulCreate", words)

    async def _delete(self, job: Object, pod: Object) -> None:
        if job["spec"].get("suspend"):
            await self._untrack(pod)  # it did not fail: it counts for nothing
            pod = self.pods.cache.get(pod["metadata"]["name"], pod["metadata"]["namespace"]) or pod
        await self.pods.delete(pod)
        words = f"Deleted pod: {pod['metadata']['name']}"
        self.recorder.record(job, "Normal", "SuccessfulDelete", words)

    async def _end(self, job: Object, found: Tally, end: End, now: datetime) -> None:
        """End a Job: its pods go first, then it says so."""
        target = "SuccessCriteriaMet" if end.kind == "Complete" else "FailureTarget"
        if condition(job, target).get("status") != "True":
            first = _condition(target, "True", end.reason, end.message, now)
            job = await self._write(job, found, [first])
        if found.active:
            for pod in found.active:
                await self._untrack(pod)
            await side_by_side(partial(self._delete, job, p) for p in found.active)
            left = job_plan.tally(job, self.pods.of(job["metadata"]["uid"]))
            if end.kind == "Failed":
                found.failed += len(found.active)
                job = await self._patch(job, {"failed": found.failed})
            found = Tally(terminating=left.terminating, succeeded=found.succeeded, failed=found.failed)
        last = _condition(end.kind, "True", end.reason, end.message, now)
        made = await self._write(
            job, found, [last], {"completionTime": stamp(now)} if end.kind == "Complete" else {}
        )
        if end.kind == "Complete":
            self.recorder.record(made, "Normal", "Completed", "Job completed")
        else:
            self.recorder.record(made, "Warning", end.reason, end.message)
        await self._after((made["metadata"]["namespace"], made["metadata"]["name"]), made)

    async def _after(self, key: Key, job: Object) -> None:
        """What remains of an ended Job: pods that may go, and its own end."""
        for pod in self.pods.of(job["metadata"]["uid"]):
            await self._untrack(pod)
        seconds = job["spec"].get("ttlSecondsAfterFinished")
        if seconds is None:
            return
        ended = next(
            moment(c["lastTransitionTime"])
            for kind in ("Complete", "Failed")
            if (c := condition(job, kind)).get("status") == "True"
        )
        left = int(seconds) - (clock() - ended).total_seconds()
        if left > 0:
            self.queue.add_after(key, left)
            return
        path = JOBS.path(*key)
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": job["metadata"]["uid"]}}
        try:
            await self.client.request("DELETE", path, options)
        except ApiError as error:
            if error.code != 404:
                raise

    async def _write(
        self, job: Object, found: Tally, conditions: Sequence[Object], more: Object | None = None
    ) -> Object:
        status = job.get("status") or {}
        made: Object = {
            "active": len(found.active),
            "ready": found.ready,
            "terminating": found.terminating,
            **(more or {}),
        }
        if conditions:
            every = status
            for each in conditions:
                every = {"conditions": _with(every, each)}
            made["conditions"] = every["conditions"]
        if all(status.get(k, 0) == v for k, v in made.items()):
            return job
        return await self._patch(job, made)

    async def _patch(self, job: Object, status: Object) -> Object:
        metadata = job["metadata"]
        answer = await self.client.patch(
            JOBS, metadata["name"], {"status": status}, metadata["namespace"], subresource="status"
        )
        self.jobs.wrote(answer)
        return answer


def _no_grace(pod: Object) -> bool:
    return not pod["metadata"].get("deletionGracePeriodSeconds")


def _condition(kind: str, status: str, reason: str, message: str, now: datetime) -> Object:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastProbeTime": stamp(now),
        "lastTransitionTime": stamp(now),
    }


def _with(status: Object, made: Object) -> list[Object]:
    return [*(c for c in status.get("conditions") or [] if c["type"] != made["type"]), made]

"""CronJobs: makes a Job at each time of a schedule, and keeps as many finished ones as is asked for.

`due` is pure; a timer wakes the shell at the next time.
"""

from __future__ import annotations

import copy
import re
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

from meshlight.controllers.cron import CronError, Schedule
from meshlight.controllers.ownership import Dependents
from meshlight.controllers.pods import clock, condition, controller_of, is_terminating, moment, reference, stamp
from meshlight.controllers.workqueue import Key, WorkQueue
from meshlight.kube.client import ApiError, Cache, Client
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import CRON_JOBS, Object

SCHEDULED = "batch.kubernetes.io/cronjob-scheduled-timestamp"
_TOO_MANY = 100


@dataclass(frozen=True, slots=True)
class Due:
    """The latest time that has come and was not served, how many came since then, and the next one."""

    latest: datetime | None
    missed: int
    next: datetime | None


def due(schedule: Schedule, zone: tzinfo, since: datetime, now: datetime) -> Due:
    """What of a schedule has come since a moment."""
    latest, missed, at = None, 0, since
    while (found := schedule.after(at, zone)) is not None and found <= now:
        latest, at = found, found
        missed += 1
        if missed > _TOO_MANY and now - found > timedelta(days=2):
            at = max(at, now - timedelta(days=2))  # so long ago that only the newest can matter
    return Due(latest, missed, found)


def zone_of(item: Object) -> tzinfo:
    """The time zone of a CronJob, or the machine's. Raises KeyError when it is not known."""
    name = item["spec"].get("timeZone")
    if not name:
        return datetime.now().astimezone().tzinfo or UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise KeyError(name) from error


def outcome(job: Object) -> str:
    """`Complete`, `Failed`, or an empty string while a Job has not ended."""
    for kind in ("Complete", "Failed"):
        if condition(job, kind).get("status") == "True":
            return kind
    return ""


def job_of(item: Object, at: datetime) -> Object:
    """The Job of one time of a schedule; its name says which."""
    metadata = item["metadata"]
    template = copy.deepcopy(item["spec"]["jobTemplate"])
    given = template.get("metadata") or {}
    minutes = int(at.timestamp()) // 60
    made: Object = {
        "name": f"{metadata['name']}-{minutes}",
        "namespace": metadata["namespace"],
        "annotations": {**(given.get("annotations") or {}), SCHEDULED: stamp(at)},
        "ownerReferences": [reference(item, "batch/v1", "CronJob")],
    }
    if given.get("labels"):
        made["labels"] = given["labels"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": made, "spec": template["spec"]}


def surplus(item: Object, jobs: Sequence[Object]) -> list[Object]:
    """Finished Jobs beyond the history that is kept, oldest first."""
    found: list[Object] = []
    for kind, field, default in (
        ("Complete", "successfulJobsHistoryLimit", 3),
        ("Failed", "failedJobsHistoryLimit", 1),
    ):
        limit = item["spec"].get(field, default)
        done = [j for j in jobs if outcome(j) == kind and not is_terminating(j)]
        done.sort(key=lambda j: ((j.get("status") or {}).get("startTime") or "", j["metadata"]["name"]))
        found += done[: max(0, len(done) - int(limit))]
    return found


class CronJobs:
    """Reconciles CronJobs from the caches of CronJobs and Jobs."""

    def __init__(self, client: Client, items: Cache, jobs: Dependents, recorder: Recorder) -> None:
        self.client, self.items, self.jobs, self.recorder = client, items, jobs, recorder
        self.queue = WorkQueue("cronjob", self.reconcile)
        items.on_change(self._changed)
        jobs.cache.on_change(self._job_changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        metadata = (new or old or {})["metadata"]
        self.queue.add((metadata["namespace"], metadata["name"]))

    def _job_changed(self, old: Object | None, new: Object | None) -> None:
        job = new or old or {}
        owner = controller_of(job)
        if owner and owner["kind"] == "CronJob":
            self.queue.add((job["metadata"]["namespace"], owner["name"]))

    async def reconcile(self, key: Key) -> None:
        """Serve one CronJob: its history, its status, and the time that has come."""
        item = self.items.objects.get(key)
        if item is None or is_terminating(item):
            return
        now = clock()
        await self._tidy(item, now)
        if item["spec"].get("suspend"):
            return
        try:
            schedule = Schedule.parse(re.sub(r"^(CRON_)?TZ=\S+\s+", "", item["spec"]["schedule"]))
            zone = zone_of(item)
        except CronError as error:
            words = f'unparseable schedule: "{item["spec"]["schedule"]}" : {error}'
            self.recorder.record(item, "Warning", "UnparseableSchedule", words)
            return
        except KeyError as error:
            words = f"invalid timeZone: {item['spec'].get('timeZone')!r}: unknown time zone {error.args[0]}"
            self.recorder.record(item, "Warning", "UnknownTimeZone", words)
            return
        status = self.items.objects.get(key, item).get("status") or {}
        since = moment(status.get("lastScheduleTime") or item["metadata"]["creationTimestamp"])
        limit = item["spec"].get("startingDeadlineSeconds")
        if limit is not None:
            since = max(since, now - timedelta(seconds=int(limit)))
        found = due(schedule, zone, since, now)
        if found.missed > _TOO_MANY and limit is None:
            words = (
                "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew"
            )
            self.recorder.record(item, "Warning", "TooManyMissedTimes", words)
        if found.latest is not None:
            await self._start(item, found.latest)
        if found.next is not None:
            self.queue.add_after(key, (found.next - clock()).total_seconds() + 0.01)

    def _active(self, item: Object) -> list[Object]:
        return [j for j in self.jobs.of(item["metadata"]["uid"]) if not outcome(j) and not is_terminating(j)]

    async def _tidy(self, item: Object, now: datetime) -> None:
        jobs = self.jobs.of(item["metadata"]["uid"])
        listed = {a["uid"]: a["name"] for a in (item.get("status") or {}).get("active") or []}
        for job in jobs:
            if job["metadata"]["uid"] in listed and (ended := outcome(job)):
                words = f"Saw completed job: {job['metadata']['name']}, condition: {ended}"
                self.recorder.record(item, "Normal", "SawCompletedJob", words)
        for uid, name in listed.items():
            if not any(j["metadata"]["uid"] == uid for j in jobs):
                words = f"Active job went missing: {name}"
                self.recorder.record(item, "Normal", "MissingJob", words)
        for old in surplus(item, jobs):
            await self.jobs.delete(old)
            words = f"Deleted job {old['metadata']['name']}"
            self.recorder.record(item, "Normal", "SuccessfulDelete", words)
        done = [(j.get("status") or {}).get("completionTime") or "" for j in jobs if outcome(j) == "Complete"]
        last = max([*done, (item.get("status") or {}).get("lastSuccessfulTime") or ""])
        await self._write(item, {"lastSuccessfulTime": last} if last else {})

    async def _start(self, item: Object, at: datetime) -> None:
        policy = item["spec"].get("concurrencyPolicy", "Allow")
        active = self._active(item)
        if policy == "Forbid" and active:
            words = "Not starting job because prior execution is running and concurrency policy is Forbid"
            self.recorder.record(item, "Normal", "JobAlreadyActive", words)
            return
        if policy == "Replace":
            for job in active:
                await self.jobs.delete(job)
                words = f"Deleted job {job['metadata']['name']}"
                self.recorder.record(item, "Normal", "SuccessfulDelete", words)
        job = job_of(item, at)
        try:
            await self.jobs.create(job)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                words = f"Error creating job: {error.message}"
                self.recorder.record(item, "Warning", "FailedCreate", words)
                raise
        else:
            words = f"Created job {job['metadata']['name']}"
            self.recorder.record(item, "Normal", "SuccessfulCreate", words)
        await self._write(item, {"lastScheduleTime": stamp(at)})

    async def _write(self, item: Object, more: Object) -> None:
        metadata = item["metadata"]
        active = [
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "name": j["metadata"]["name"],
                "namespace": metadata["namespace"],
                "uid": j["metadata"]["uid"],
                "resourceVersion": j["metadata"]["resourceVersion"],
            }
            for j in sorted(self._active(item), key=lambda j: j["metadata"]["name"])
        ]
        known = (self.items.get(metadata["name"], metadata["namespace"]) or item).get("status") or {}
        same = [a["uid"] for a in known.get("active") or []] == [a["uid"] for a in active]
        if same and all(known.get(k) == v for k, v in more.items()):
            return
        patch = {"status": {"active": active or None, **more}}
        answer = await self.client.patch(
            CRON_JOBS, metadata["name"], patch, metadata["namespace"], subresource="status"
        )
        self.items.wrote(answer)

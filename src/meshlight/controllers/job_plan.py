"""What a Job does next: which pods count how, whether it has ended, how many pods there are to be. Pure.

Rules: Kubernetes' "Jobs" (completions and parallelism, indexed Jobs, pod failure and success policies,
back-off, deadlines, suspension).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from meshlight.controllers import indexes
from meshlight.controllers.pods import is_ready, is_terminating, moment, notes, phase
from meshlight.kube.resources import Object

INDEX = "batch.kubernetes.io/job-completion-index"
FAILURES = "batch.kubernetes.io/job-index-failure-count"
IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
TRACKING = "batch.kubernetes.io/job-tracking"
FIRST_BACKOFF, LONGEST_BACKOFF = 10.0, 600.0


def is_indexed(job: Object) -> bool:
    """Whether each pod has a number of its own."""
    return bool(job["spec"].get("completionMode") == "Indexed")


def index_of(pod: Object) -> int | None:
    """A pod's completion index."""
    value = notes(pod).get(INDEX, "")
    return int(value) if value.isdigit() else None


@dataclass(frozen=True, slots=True)
class Matched:
    """What the pod failure policy says of a failed pod: action, and words for a failed Job."""

    action: str
    message: str = ""


def failure_action(job: Object, pod: Object) -> Matched:
    """The first matching rule's action; `Count` without a match."""
    metadata = pod["metadata"]
    who = f"{metadata.get('namespace', '')}/{metadata['name']}"
    for number, rule in enumerate((job["spec"].get("podFailurePolicy") or {}).get("rules") or []):
        if (codes := rule.get("onExitCodes")) is not None:
            hit = _exit_code(pod, codes)
            if hit is not None:
                name, code = hit
                words = (
                    f"Container {name} for pod {who} failed with exit code {code} matching {rule['action']} "
                    f"rule at index {number}"
                )
                return Matched(rule["action"], words)
        for pattern in rule.get("onPodConditions") or []:
            for found in (pod.get("status") or {}).get("conditions") or []:
                if found["type"] == pattern["type"] and found["status"] == pattern.get("status", "True"):
                    matching = f"matching {rule['action']} rule at index {number}"
                    words = f"Pod {who} has condition {pattern['type']} {matching}"
                    return Matched(rule["action"], words)
    return Matched("Count")


def _exit_code(pod: Object, rule: Object) -> tuple[str, int] | None:
    status = pod.get("status") or {}
    every = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    for each in every:
        if rule.get("containerName") and each["name"] != rule["containerName"]:
            continue
        terminated = (each.get("state") or {}).get("terminated")
        if not terminated or not (code := int(terminated.get("exitCode") or 0)):
            continue
        inside = code in (rule.get("values") or [])
        if inside == (rule["operator"] == "In"):
            return each["name"], code
    return None


def _failed(job: Object, pod: Object) -> bool:
    """Whether a pod counts as failed: one that is being deleted does, unless its replacement has to wait."""
    if phase(pod) == "Failed":
        return True
    replaced_at_once = job["spec"].get("podReplacementPolicy", "TerminatingOrFailed") != "Failed"
    return is_terminating(pod) and phase(pod) != "Succeeded" and replaced_at_once


@dataclass(slots=True)
class Tally:
    """A Job's pods, sorted: by what the status has counted already and what is new."""

    active: list[Object] = field(default_factory=list)
    terminating: int = 0
    ready: int = 0
    succeeded: int = 0
    failed: int = 0
    new_succeeded: list[Object] = field(default_factory=list)
    new_failed: list[Object] = field(default_factory=list)
    ignored: list[Object] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    given_up: set[int] = field(default_factory=set)
    fatal: str = ""
    """Why the pod failure policy fails the Job."""
    last_failure: datetime | None = None


def tally(job: Object, pods: Iterable[Object]) -> Tally:
    """Sort a Job's pods. A finished pod counts once: it loses its finalizer when it has been counted."""
    status = job.get("status") or {}
    known = status.get("uncountedTerminatedPods") or {}
    counted = {*(known.get("succeeded") or []), *(known.get("failed") or [])}
    found = Tally(
        succeeded=int(status.get("succeeded") or 0) + len(known.get("succeeded") or []),
        failed=int(status.get("failed") or 0) + len(known.get("failed") or []),
        done=indexes.parse(status.get("completedIndexes") or ""),
        given_up=indexes.parse(status.get("failedIndexes") or ""),
    )
    for pod in pods:
        tracked = TRACKING in (pod["metadata"].get("finalizers") or [])
        fresh = tracked and pod["metadata"]["uid"] not in counted
        if phase(pod) == "Succeeded":
            if fresh:
                found.new_succeeded.append(pod)
            if (number := index_of(pod)) is not None and is_indexed(job):
                found.done.add(number)
        elif _failed(job, pod):
            ended = _ended(pod)
            if ended is not None:
                found.last_failure = max(found.last_failure or ended, ended)
            if not fresh:
                continue
            matched = failure_action(job, pod)
            if matched.action == "FailJob" and not found.fatal:
                found.fatal = matched.message
            if matched.action == "Ignore":
                found.ignored.append(pod)
                continue
            found.new_failed.append(pod)
            if (number := index_of(pod)) is not None and _gives_up(job, pod, matched):
                found.given_up.add(number)
        elif is_terminating(pod):
            found.terminating += 1
        else:
            found.active.append(pod)
            found.ready += is_ready(pod)
        if is_terminating(pod) and phase(pod) not in ("Succeeded", "Failed") and _failed(job, pod):
            found.terminating += 1
    if is_indexed(job):
        found.succeeded = len(found.done)
        found.given_up -= found.done
    else:
        found.succeeded += len(found.new_succeeded)
    found.failed += len(found.new_failed)
    return found


def uncounted(job: Object, found: Tally) -> bool:
    """Whether pods have finished that are not in the numbers of the status yet."""
    known = (job.get("status") or {}).get("uncountedTerminatedPods") or {}
    waiting = known.get("succeeded") or known.get("failed")
    return bool(found.new_succeeded or found.new_failed or found.ignored or waiting)


def _gives_up(job: Object, pod: Object, matched: Matched) -> bool:
    """Whether a failed pod was the last try of its index."""
    limit = job["spec"].get("backoffLimitPerIndex")
    if limit is None:
        return False
    earlier = notes(pod).get(FAILURES, "0")
    return matched.action == "FailIndex" or int(earlier if earlier.isdigit() else 0) >= int(limit)


def _ended(pod: Object) -> datetime | None:
    times = [
        t["finishedAt"]
        for s in (pod.get("status") or {}).get("containerStatuses") or []
        if (t := (s.get("state") or {}).get("terminated")) and t.get("finishedAt")
    ]
    text = max(times, default=pod["metadata"].get("deletionTimestamp"))
    return moment(text) if text else None


def container_restarts(pods: Iterable[Object]) -> int:
    """Restarts of containers that count against `backoffLimit` (restartPolicy OnFailure)."""
    total = 0
    for pod in pods:
        status = pod.get("status") or {}
        if phase(pod) not in ("Running", "Pending"):
            continue
        for each in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
            total += int(each.get("restartCount") or 0)
    return total


@dataclass(frozen=True, slots=True)
class End:
    """How a Job ends: `Complete` or `Failed`, with reason and message."""

    kind: str
    reason: str
    message: str


def end_of(job: Object, found: Tally, now: datetime) -> End | None:
    """Whether a Job has ended, and how."""
    spec, status = job["spec"], job.get("status") or {}
    for kind in ("FailureTarget", "SuccessCriteriaMet"):
        for known in status.get("conditions") or []:
            if known["type"] == kind and known["status"] == "True":
                how = "Failed" if kind == "FailureTarget" else "Complete"
                return End(how, known.get("reason", ""), known.get("message", ""))
    if found.fatal:
        return End("Failed", "PodFailurePolicy", found.fatal)
    if (well := _success_policy(spec, found)) is not None:
        return well
    limit = int(spec.get("backoffLimit", 6))
    over = found.failed > limit
    if spec["template"]["spec"].get("restartPolicy") == "OnFailure":
        over = over or (0 < container_restarts(found.active) >= max(limit, 1))
    completions = spec.get("completions")
    if over and spec.get("backoffLimitPerIndex") is None:
        return End("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    deadline = spec.get("activeDeadlineSeconds")
    started = None if spec.get("suspend") else status.get("startTime")
    if deadline is not None and started and (now - moment(started)).total_seconds() >= int(deadline):
        return End("Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
    most_failed = spec.get("maxFailedIndexes")
    if most_failed is not None and len(found.given_up) > int(most_failed):
        return End(
            "Failed",
            "MaxFailedIndexesExceeded",
            "Job has exceeded the specified maximal number of failed indexes",
        )
    if completions is None:
        done = found.succeeded > 0 and not found.active and not found.terminating
    else:
        done = found.succeeded + len(found.given_up) >= int(completions) and not (
            found.given_up and found.active
        )
        if done and found.given_up:
            return End("Failed", "FailedIndexes", "Job has failed indexes")
    if done:
        return End("Complete", "CompletionsReached", "Reached expected number of succeeded pods")
    return None


def _success_policy(spec: Object, found: Tally) -> End | None:
    for number, rule in enumerate((spec.get("successPolicy") or {}).get("rules") or []):
        listed = rule.get("succeededIndexes")
        among = found.done & indexes.parse(listed) if listed else found.done
        needed = rule.get("succeededCount")
        enough = len(among) >= int(needed) if needed is not None else among == indexes.parse(listed or "")
        if enough and among:
            return End("Complete", "SuccessPolicy", f"Matched rules at index {number}")
    return None


def backoff(failures: int) -> float:
    """Seconds to wait after the latest failure."""
    return 0.0 if failures == 0 else min(FIRST_BACKOFF * 2.0 ** min(failures - 1, 10), LONGEST_BACKOFF)


@dataclass(slots=True)
class Need:
    """Pods to make (by index, or None without indexes), pods to delete, and when more may be made (seconds)."""

    create: list[int | None] = field(default_factory=list)
    delete: list[Object] = field(default_factory=list)
    wait: float = 0.0


def need(job: Object, found: Tally, now: datetime) -> Need:
    """How many pods are wanted beyond, or fewer than, those that are active."""
    spec = job["spec"]
    parallelism = int(spec.get("parallelism", 1))
    completions = spec.get("completions")
    if spec.get("suspend"):
        return Need(delete=list(found.active))
    active = len(found.active)
    if completions is None:
        # One success means that the work is done: those that run may finish, no more are begun.
        wanted = active if found.succeeded else parallelism
    else:
        left = int(completions) - found.succeeded - len(found.given_up)
        wanted = min(parallelism, max(left, 0))
    surplus = max(0, active - wanted)
    made = Need()
    if surplus:
        order = sorted(found.active, key=lambda p: (is_ready(p), phase(p) == "Running", _young(p)))
        made.delete = order[:surplus]
        return made
    room = wanted - active
    if spec.get("podReplacementPolicy") == "Failed":
        room = min(room, parallelism - active - found.terminating)
    if room <= 0:
        return made
    recent = found.failed if not found.succeeded else 0
    wait = backoff(recent)
    if found.last_failure is not None and recent and spec.get("backoffLimitPerIndex") is None:
        made.wait = max(0.0, wait - (now - found.last_failure).total_seconds())
        if made.wait:
            return made
    if is_indexed(job):
        taken = {index_of(p) for p in found.active} | found.done | found.given_up
        free = [n for n in range(int(completions or 0)) if n not in taken]
        made.create = list(free[:room])
    else:
        made.create = [None] * room
    return made


def _young(pod: Object) -> tuple[int, ...]:
    return tuple(-ord(c) for c in pod["metadata"].get("creationTimestamp") or "")


def earlier_failures(pods: Sequence[Object], index: int) -> tuple[int, int]:
    """(counted, ignored) failures of an index so far, from its pods."""
    counted = ignored = 0
    for pod in pods:
        if index_of(pod) != index or not (phase(pod) == "Failed" or is_terminating(pod)):
            continue
        own = notes(pod).get(FAILURES, "0")
        counted = max(counted, int(own) + 1 if own.isdigit() else 1)
        skipped = notes(pod).get(IGNORED, "0")
        ignored = max(ignored, int(skipped) if skipped.isdigit() else 0)
    return counted, ignored

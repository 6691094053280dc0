"""Rules of what makes pods: Deployments, ReplicaSets, DaemonSets, StatefulSets, Jobs, and their bounds."""

from __future__ import annotations

import re
from typing import Any

from meshlight.kube import field_errors as faults
from meshlight.kube.resources import Object
from meshlight.kube.selectors import match_labels
from meshlight.kube.status import Cause
from meshlight.kube.validation import names, pods

_PERCENT = re.compile("[0-9]+%")
_STATEFUL_SET_UPDATES = (
    "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', "
    "'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden"
)
_STATEFUL_SET_MUTABLE = frozenset(
    ("replicas", "ordinals", "template", "updateStrategy", "revisionHistoryLimit",
     "persistentVolumeClaimRetentionPolicy", "minReadySeconds")
)  # fmt: skip


def workload(obj: Object) -> list[Cause]:
    """Faults of a Deployment, ReplicaSet, DaemonSet or StatefulSet."""
    spec = obj.get("spec") or {}
    causes = _template(spec, obj["kind"])
    template = spec.get("template") or {}
    policy = (template.get("spec") or {}).get("restartPolicy", "Always")
    if policy != "Always":
        causes.append(faults.not_supported("spec.template.spec.restartPolicy", policy, ["Always"]))
    for field in ("replicas", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"):
        causes += not_negative(f"spec.{field}", spec.get(field))
    deadline, ready = spec.get("progressDeadlineSeconds"), spec.get("minReadySeconds", 0)
    if deadline is not None and 0 <= deadline <= ready:
        path = "spec.progressDeadlineSeconds"
        causes.append(faults.invalid_value(path, deadline, "must be greater than minReadySeconds"))
    for field in ("strategy", "updateStrategy"):
        causes += _strategy(spec.get(field) or {}, f"spec.{field}")
    return causes


def _template(spec: Object, kind: str) -> list[Cause]:
    selector = spec.get("selector") or {}
    causes: list[Cause] = []
    if "template" not in spec:
        causes.append(faults.required("spec.template"))
    template = spec.get("template") or {}
    if spec.get("selector") is not None:
        causes += names.selector(selector, "spec.selector")
        if not selector.get("matchLabels") and not selector.get("matchExpressions"):
            detail = f"empty selector is invalid for {kind.lower()}"
            causes.append(_selector_fault("spec.selector", selector, detail))
        elif not causes and "template" in spec:
            labels = (template.get("metadata") or {}).get("labels") or {}
            if not match_labels(selector, labels):
                path = "spec.template.metadata.labels"
                causes.append(faults.invalid_value(path, labels, "`selector` does not match template `labels`"))
    if "template" in spec:
        claims = [(c.get("metadata") or {}).get("name", "") for c in spec.get("volumeClaimTemplates") or ()]
        causes += pods.template(template, "spec.template", claims)
    return causes


def _selector_fault(path: str, selector: Object, detail: str) -> Cause:
    """A fault of a selector, shown in Go's syntax as Kubernetes does."""
    labels = selector.get("matchLabels")
    shown = "map[string]string(nil)" if labels is None else faults.go_value(labels)
    rules = selector.get("matchExpressions")
    listed = "(nil)" if not rules else "{" + ", ".join(_requirement(rule) for rule in rules) + "}"
    value = f"v1.LabelSelector{{MatchLabels:{shown}, MatchExpressions:[]v1.LabelSelectorRequirement{listed}}}"
    return Cause(path, "FieldValueInvalid", f"Invalid value: {value}: {detail}")


def _requirement(rule: Object) -> str:
    values = ", ".join(faults.go_value(v) for v in rule.get("values") or ())
    return (
        f'v1.LabelSelectorRequirement{{Key:"{rule.get("key")}", Operator:"{rule.get("operator")}", '
        f"Values:[]string{{{values}}}}}"
    )


def _strategy(strategy: Object, path: str) -> list[Cause]:
    causes: list[Cause] = []
    kind, rolling = strategy.get("type"), strategy.get("rollingUpdate")
    if rolling is None:
        return causes
    at = f"{path}.rollingUpdate"
    if kind == "Recreate":
        return [faults.forbidden(at, "may not be specified when strategy `type` is 'Recreate'")]
    for field in ("maxUnavailable", "maxSurge"):
        causes += count_or_percent(f"{at}.{field}", rolling.get(field))
    if not causes and {"maxUnavailable", "maxSurge"} <= rolling.keys():
        unavailable, surge = rolling["maxUnavailable"], rolling["maxSurge"]
        if unavailable in (0, "0%") and surge in (0, "0%"):
            detail = "may not be 0 when `maxSurge` is 0"
            causes.append(faults.invalid_value(f"{at}.maxUnavailable", unavailable, detail))
    return causes


def count_or_percent(path: str, value: Any) -> list[Cause]:
    """Faults of a number or percentage."""
    if isinstance(value, str) and not _PERCENT.fullmatch(value):
        detail = (
            "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', "
            "regex used for validation is '[0-9]+%')"
        )
        return [faults.invalid_value(path, value, detail)]
    return not_negative(path, value) if isinstance(value, int) else []


def not_negative(path: str, value: int | None) -> list[Cause]:
    """Faults of a number that may be absent but not below zero."""
    if value is None or value >= 0:
        return []
    return [faults.invalid_value(path, value, "must be greater than or equal to 0")]


def workload_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change: the selector stays."""
    before, after = old.get("spec") or {}, new.get("spec") or {}
    if new["kind"] == "StatefulSet":
        fixed = {k for k in {*before, *after} if before.get(k) != after.get(k)} - _STATEFUL_SET_MUTABLE
        return [faults.forbidden("spec", _STATEFUL_SET_UPDATES)] if fixed else []
    if before.get("selector") != after.get("selector"):
        return [_selector_fault("spec.selector", after.get("selector") or {}, "field is immutable")]
    return []


def job(obj: Object) -> list[Cause]:
    """Faults of a Job."""
    return _job_spec(obj.get("spec") or {}, "spec")


def _job_spec(spec: Object, path: str) -> list[Cause]:
    causes: list[Cause] = []
    counts = ("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")
    for field in counts:
        causes += not_negative(f"{path}.{field}", spec.get(field))
    if "template" in spec:
        causes += pods.template(spec["template"], f"{path}.template")
        policy = (spec["template"].get("spec") or {}).get("restartPolicy", "Always")
        if policy not in ("OnFailure", "Never"):
            at = f"{path}.template.spec.restartPolicy"
            causes.append(faults.not_supported(at, policy, ["OnFailure", "Never"]))
    return causes


def job_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change of a Job: what it runs stays."""
    causes = []
    for field in ("completions", "selector", "template", "completionMode"):
        before, after = (old.get("spec") or {}).get(field), (new.get("spec") or {}).get(field)
        if before != after and not (field == "template" and (new.get("spec") or {}).get("suspend")):
            causes.append(faults.invalid_value(f"spec.{field}", after, "field is immutable"))
    return causes


def cron_job(obj: Object) -> list[Cause]:
    """Faults of a CronJob."""
    spec = obj.get("spec") or {}
    causes = _job_spec((spec.get("jobTemplate") or {}).get("spec") or {}, "spec.jobTemplate.spec")
    schedule = spec.get("schedule") or ""
    if schedule and not schedule.startswith("@") and len(schedule.split()) != 5:
        detail = f"expected exactly 5 fields, found {len(schedule.split())}: [{schedule}]"
        causes.append(faults.invalid_value("spec.schedule", schedule, detail))
    if len(obj["metadata"].get("name") or "") > 52:
        name = obj["metadata"]["name"]
        causes.append(faults.invalid_value("metadata.name", name, "must be no more than 52 characters"))
    return causes


def disruption_budget(obj: Object) -> list[Cause]:
    """Faults of a PodDisruptionBudget."""
    spec = obj.get("spec") or {}
    causes = []
    if "minAvailable" in spec and "maxUnavailable" in spec:
        detail = "minAvailable and maxUnavailable cannot be both set"
        causes.append(faults.invalid_value("spec", spec, detail))
    for field in ("minAvailable", "maxUnavailable"):
        causes += count_or_percent(f"spec.{field}", spec.get(field))
    return causes + names.selector(spec.get("selector"), "spec.selector")


def autoscaler(obj: Object) -> list[Cause]:
    """Faults of a HorizontalPodAutoscaler."""
    spec = obj.get("spec") or {}
    least, most = spec.get("minReplicas", 1), spec.get("maxReplicas")
    causes = []
    if least < 1:
        causes.append(faults.invalid_value("spec.minReplicas", least, "must be greater than or equal to 1"))
    if most is not None and most < 1:
        causes.append(faults.invalid_value("spec.maxReplicas", most, "must be greater than 0"))
    elif most is not None and most < least:
        detail = "must be greater than or equal to `minReplicas`"
        causes.append(faults.invalid_value("spec.maxReplicas", most, detail))
    return causes

"""What objects must be for the API to store them, in Kubernetes' own words (422 Invalid).

Pure. Objects have been decoded and defaulted: fields have their types, and those with defaults exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from meshlight.kube import field_errors, rules, structural
from meshlight.kube.resources import Object
from meshlight.kube.schema import Schema
from meshlight.kube.status import Cause
from meshlight.kube.validation import (
    bounds,
    configuration,
    definitions,
    istio_networking,
    istio_security,
    names,
    pods,
    services,
    storage,
    workloads,
)

Rule = Callable[[Object], list[Cause]]
Warner = Callable[[Object], list[str]]
UpdateRule = Callable[[Object, Object], list[Cause]]

_RULES: dict[str, Rule] = {
    "Pod": pods.pod,
    "Deployment": workloads.workload,
    "ReplicaSet": workloads.workload,
    "DaemonSet": workloads.workload,
    "StatefulSet": workloads.workload,
    "Job": workloads.job,
    "CronJob": workloads.cron_job,
    "PodDisruptionBudget": workloads.disruption_budget,
    "HorizontalPodAutoscaler": workloads.autoscaler,
    "PersistentVolume": storage.volume,
    "PersistentVolumeClaim": storage.claim,
    "PriorityClass": bounds.priority_class,
    "ResourceQuota": bounds.resource_quota,
    "LimitRange": bounds.limit_range,
    "NetworkPolicy": bounds.network_policy,
    "Service": services.service,
    "Endpoints": services.endpoints,
    "EndpointSlice": services.endpoint_slice,
    "ConfigMap": configuration.config_map,
    "Secret": configuration.secret,
    "Event": configuration.event,
    "Lease": configuration.lease,
    "Role": configuration.role,
    "ClusterRole": configuration.role,
    "RoleBinding": configuration.binding,
    "ClusterRoleBinding": configuration.binding,
    "Ingress": configuration.ingress,
    "CustomResourceDefinition": definitions.definition,
}
_UPDATE_RULES: dict[str, UpdateRule] = {
    "Pod": pods.pod_update,
    "Deployment": workloads.workload_update,
    "ReplicaSet": workloads.workload_update,
    "DaemonSet": workloads.workload_update,
    "StatefulSet": workloads.workload_update,
    "Job": workloads.job_update,
    "PersistentVolume": storage.volume_update,
    "PersistentVolumeClaim": storage.claim_update,
    "StorageClass": storage.storage_class_update,
    "PriorityClass": bounds.priority_class_update,
    "Service": services.service_update,
    "EndpointSlice": services.endpoint_slice_update,
    "ConfigMap": configuration.config_map_update,
    "Secret": configuration.secret_update,
    "RoleBinding": configuration.binding_update,
    "ClusterRoleBinding": configuration.binding_update,
    "CustomResourceDefinition": definitions.definition_update,
}
_CUSTOM_RULES: dict[tuple[str, str], Rule] = {
    ("security.istio.io", "AuthorizationPolicy"): istio_security.authorization_policy,
    ("security.istio.io", "PeerAuthentication"): istio_security.peer_authentication,
    ("networking.istio.io", "ServiceEntry"): istio_networking.service_entry,
    ("networking.istio.io", "WorkloadEntry"): istio_networking.workload_entry,
}
_CUSTOM_WARNINGS: dict[tuple[str, str], Warner] = {
    ("security.istio.io", "AuthorizationPolicy"): istio_security.authorization_policy_warnings,
    ("security.istio.io", "PeerAuthentication"): istio_security.peer_authentication_warnings,
    ("networking.istio.io", "ServiceEntry"): istio_networking.service_entry_warnings,
}


def builtin(obj: Object, schema: Schema, old: Object | None = None) -> list[Cause]:
    """Faults of an object of a built-in kind that replaces `old`, if any.

    Its status is its writers' business, and what is as it was before is right.
    """
    causes = names.metadata(obj)
    own = ("metadata", "status")
    if old is not None and all(obj.get(k) == old.get(k) for k in {*obj, *old} if k not in own):
        return causes
    for name, below in schema.properties.items():
        if name in schema.required and name not in obj:
            causes.append(field_errors.required(name))
        elif name not in own and name in obj:
            causes += structural.omissions({name: obj[name]}, Schema(properties={name: below}))
    if rule := _RULES.get(obj["kind"]):
        reported = {c.field for c in causes}
        causes += [c for c in rule(obj) if c.field not in reported]
    if old is not None and (change_rule := _UPDATE_RULES.get(obj["kind"])):
        causes += change_rule(old, obj)
    return causes


def custom(obj: Object, schema: Schema, old: Object | None = None) -> list[Cause]:
    """Faults of a custom resource: its schema's, its CEL rules', then those its own webhook would find.

    What an unchanged value of `old` had already is not held against the change.
    """
    causes = names.metadata(obj) + (structural.validate(obj, schema) or rules.evaluate(obj, schema, old))
    if causes and old is not None:
        before = structural.validate(old, schema) or rules.evaluate(old, schema, None)
        known = {(c.field, c.message) for c in before}
        causes = [
            c for c in causes if (c.field, c.message) not in known or _at(obj, c.field) != _at(old, c.field)
        ]
    rule = _CUSTOM_RULES.get(_group_kind(obj))
    return causes if causes or rule is None else rule(obj)


def _at(value: object, path: str) -> object:
    """The value at a cause's path, None where there is none."""
    for step in re.findall(r"[^.\[\]]+", path):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def warnings(obj: Object) -> list[str]:
    """What the writer of an object is told, although it is stored."""
    warner = _CUSTOM_WARNINGS.get(_group_kind(obj))
    return warner(obj) if warner else []


def _group_kind(obj: Object) -> tuple[str, str]:
    return obj["apiVersion"].partition("/")[0], obj["kind"]

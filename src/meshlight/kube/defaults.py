"""Defaults of built-in kinds that depend on other fields; the constant ones stand in the schemas.

As Kubernetes' defaulting, strategies and standard admission plug-ins write them, so that stored
objects are complete and strict clients accept them. Pure, in place.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from meshlight.kube.resources import Object

_PRIORITIES = {"system-cluster-critical": 2_000_000_000, "system-node-critical": 2_000_001_000}
_EVICTING_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
_TOLERATION_SECONDS = 300
_RBAC_GROUP = "rbac.authorization.k8s.io"


def image_pull_policy(image: str) -> str:
    """Images without a fixed tag are pulled every time."""
    if "@" in image:
        return "IfNotPresent"
    tag = image.rpartition("/")[2].partition(":")[2]
    return "Always" if tag in ("", "latest") else "IfNotPresent"


def pod_spec(spec: Object) -> None:
    """Defaults of every pod spec, in Pods and templates."""
    for field in ("containers", "initContainers", "ephemeralContainers"):
        for container in spec.get(field) or ():
            if not container.get("imagePullPolicy"):
                container["imagePullPolicy"] = image_pull_policy(container.get("image") or "")
    for volume in spec.get("volumes") or ():
        if len(volume) == 1:
            volume["emptyDir"] = {}
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    if account:
        spec["serviceAccountName"] = spec["serviceAccount"] = account


def _pod(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    spec.setdefault("serviceAccountName", spec.get("serviceAccount") or "default")
    pod_spec(spec)
    spec.setdefault("enableServiceLinks", True)
    for field in ("containers", "initContainers"):
        for container in spec.get(field) or ():
            limits = (container.get("resources") or {}).get("limits")
            if limits:
                container["resources"]["requests"] = {
                    **limits,
                    **(container["resources"].get("requests") or {}),
                }
            if spec.get("hostNetwork"):
                for port in container.get("ports") or ():
                    if "containerPort" in port:
                        port.setdefault("hostPort", port["containerPort"])
    spec.setdefault("priority", _PRIORITIES.get(spec.get("priorityClassName", ""), 0))
    spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
    _evictions(spec)
    status = obj.setdefault("status", {})
    status.setdefault("phase", "Pending")
    status.setdefault("qosClass", quality_of_service(spec))


def _evictions(spec: Object) -> None:
    """The tolerations that Kubernetes adds, so that a short failure of a node evicts nothing."""
    tolerations = spec.get("tolerations") or []
    for taint in _EVICTING_TAINTS:
        tolerated = any(
            t.get("key") in (None, "", taint) and t.get("effect") in (None, "", "NoExecute")
            for t in tolerations
        )
        if not tolerated:
            tolerations.append(
                {
                    "key": taint,
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": _TOLERATION_SECONDS,
                }
            )
    spec["tolerations"] = tolerations


def quality_of_service(spec: Object) -> str:
    """A pod's QoS class: by whether all, some or none of its containers bound cpu and memory."""
    asked, exact = False, True
    for field in ("containers", "initContainers"):
        for container in spec.get(field) or ():
            resources = container.get("resources") or {}
            limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
            for name in ("cpu", "memory"):
                if requests.get(name, "0") != "0" or limits.get(name, "0") != "0":
                    asked = True
                if limits.get(name, "0") == "0" or requests.get(name) != limits[name]:
                    exact = False
    if not asked:
        return "BestEffort"
    return "Guaranteed" if exact else "Burstable"


def _template(spec: Object) -> None:
    template = spec.get("template")
    if template:
        pod_spec(template.setdefault("spec", {}))


def _workload(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    _template(spec)
    for field, rolling in _ROLLING.get(obj["kind"], ()):
        strategy = spec.setdefault(field, {})
        if strategy.get("type") == "RollingUpdate":
            strategy["rollingUpdate"] = {**rolling, **(strategy.get("rollingUpdate") or {})}


_ROLLING: dict[str, tuple[tuple[str, Object], ...]] = {
    "Deployment": (("strategy", {"maxSurge": "25%", "maxUnavailable": "25%"}),),
    "DaemonSet": (("updateStrategy", {"maxSurge": 0, "maxUnavailable": 1}),),
    "StatefulSet": (("updateStrategy", {"partition": 0}),),
}


def _job(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    _job_spec(spec)
    labels = {
        "batch.kubernetes.io/controller-uid": obj["metadata"].get("uid", ""),
        "batch.kubernetes.io/job-name": obj["metadata"].get("name", ""),
        "controller-uid": obj["metadata"].get("uid", ""),
        "job-name": obj["metadata"].get("name", ""),
    }
    if "template" in spec and not spec.get("manualSelector") and "selector" not in spec:
        key = "batch.kubernetes.io/controller-uid"
        spec["selector"] = {"matchLabels": {key: labels[key]}}
        found = spec["template"].setdefault("metadata", {}).setdefault("labels", {})
        found.update(labels)


def _job_spec(spec: Object) -> None:
    _template(spec)
    if "parallelism" not in spec and "completions" not in spec:
        spec["completions"] = 1
    spec.setdefault("parallelism", 1)
    spec.setdefault("podReplacementPolicy", "TerminatingOrFailed")


def _cron_job(obj: Object) -> None:
    job = (obj.get("spec") or {}).get("jobTemplate")
    if job:
        _template(job.setdefault("spec", {}))


def _namespace(obj: Object) -> None:
    labels = obj["metadata"].setdefault("labels", {})
    labels["kubernetes.io/metadata.name"] = obj["metadata"].get("name", "")
    obj.setdefault("status", {}).setdefault("phase", "Active")


def _service(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    kind = spec.get("type", "ClusterIP")
    for port in spec.get("ports") or ():
        if port.get("targetPort") in (None, "", 0) and "port" in port:
            port["targetPort"] = port["port"]
    if spec.get("sessionAffinity") == "ClientIP":
        client = spec.setdefault("sessionAffinityConfig", {}).setdefault("clientIP", {})
        client.setdefault("timeoutSeconds", 10800)
    if kind != "ExternalName":
        spec.setdefault("internalTrafficPolicy", "Cluster")
    if kind in ("NodePort", "LoadBalancer"):
        spec.setdefault("externalTrafficPolicy", "Cluster")
    if kind == "LoadBalancer":
        spec.setdefault("allocateLoadBalancerNodePorts", True)


def _secret(obj: Object) -> None:
    text = obj.pop("stringData", None)
    if text:
        encoded = {k: base64.b64encode(v.encode()).decode() for k, v in text.items()}
        obj["data"] = {**(obj.get("data") or {}), **encoded}


def _claim(obj: Object) -> None:
    obj.setdefault("status", {}).setdefault("phase", "Pending")


def _replication_controller(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    _template(spec)
    labels = ((spec.get("template") or {}).get("metadata") or {}).get("labels")
    if labels:
        spec.setdefault("selector", dict(labels))
        if not obj["metadata"].get("labels"):
            obj["metadata"]["labels"] = dict(labels)


def _api_service(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    if spec.get("service"):
        spec["service"].setdefault("port", 443)


def _binding(obj: Object) -> None:
    for subject in obj.get("subjects") or ():
        if not subject.get("apiGroup") and subject.get("kind") in ("User", "Group"):
            subject["apiGroup"] = _RBAC_GROUP


def _network_policy(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    if not spec.get("policyTypes"):
        spec["policyTypes"] = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]


def _resource_definition(obj: Object) -> None:
    names = (obj.get("spec") or {}).get("names") or {}
    if kind := names.get("kind"):
        names.setdefault("singular", kind.lower())
        names.setdefault("listKind", f"{kind}List")


def _autoscaler(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    if not spec.get("metrics"):
        target = {"type": "Utilization", "averageUtilization": 80}
        spec["metrics"] = [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]


_BY_KIND: dict[str, Callable[[Object], None]] = {
    "Pod": _pod,
    "Deployment": _workload,
    "ReplicaSet": _workload,
    "DaemonSet": _workload,
    "StatefulSet": _workload,
    "Job": _job,
    "CronJob": _cron_job,
    "ReplicationController": _replication_controller,
    "PersistentVolume": _claim,
    "PersistentVolumeClaim": _claim,
    "APIService": _api_service,
    "Namespace": _namespace,
    "Service": _service,
    "Secret": _secret,
    "RoleBinding": _binding,
    "ClusterRoleBinding": _binding,
    "NetworkPolicy": _network_policy,
    "HorizontalPodAutoscaler": _autoscaler,
    "CustomResourceDefinition": _resource_definition,
}


def apply(obj: Object) -> None:
    """Complete an object of a built-in kind; its schema's defaults are in already."""
    if rule := _BY_KIND.get(obj["kind"]):
        rule(obj)


def at_creation(obj: Object) -> None:
    """What only a new object is given."""
    if obj["kind"] == "Namespace":
        obj.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])


def carry_over(old: Object, new: Object) -> None:
    """What a change of an object keeps or drops without being told, by kind."""
    if new["kind"] == "Namespace":
        if finalizers := (old.get("spec") or {}).get("finalizers"):
            new.setdefault("spec", {})["finalizers"] = finalizers
    elif new["kind"] == "Service":
        _drop_dependent(old.get("spec") or {}, new.get("spec") or {})


def _drop_dependent(before: Object, after: Object) -> None:
    """Fields that a Service's new type has no use for, as long as the change left them alone."""
    kind = after.get("type", "ClusterIP")
    if before.get("type") == kind:
        return
    unused: dict[str, tuple[Any, ...]] = {
        "externalTrafficPolicy": ("NodePort", "LoadBalancer"),
        "allocateLoadBalancerNodePorts": ("LoadBalancer",),
        "healthCheckNodePort": ("LoadBalancer",),
        "loadBalancerClass": ("LoadBalancer",),
        "clusterIP": ("ClusterIP", "NodePort", "LoadBalancer"),
        "clusterIPs": ("ClusterIP", "NodePort", "LoadBalancer"),
        "internalTrafficPolicy": ("ClusterIP", "NodePort", "LoadBalancer"),
    }
    for field, kinds in unused.items():
        if kind not in kinds and field in after and after[field] == before.get(field):
            del after[field]
    if kind in ("ClusterIP", "ExternalName"):
        was = {p.get("nodePort") for p in before.get("ports") or ()}
        for port in after.get("ports") or ():
            if port.get("nodePort") in was:
                port.pop("nodePort", None)

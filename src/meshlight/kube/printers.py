"""What `kubectl get` shows of each built-in kind, column by column as Kubernetes' own printers do."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from meshlight.kube.columns import AGE, NONE, UNKNOWN, Column, age, at, count, human_duration, number, selector
from meshlight.kube.pod_printer import POD
from meshlight.kube.resources import Object

Cell = Callable[[Object, datetime], Any]


def _node_status(node: Object, _: datetime) -> str:
    conditions = {c["type"]: c["status"] for c in (node.get("status") or {}).get("conditions") or []}
    words = ["Ready" if conditions.get("Ready") == "True" else "NotReady"]
    if "Ready" not in conditions:
        words = ["Unknown"]
    if (node.get("spec") or {}).get("unschedulable"):
        words.append("SchedulingDisabled")
    return ",".join(words)


def _node_address(kind: str) -> Cell:
    def cell(obj: Object, _: datetime) -> Any:
        for address in (obj.get("status") or {}).get("addresses") or []:
            if address["type"] == kind:
                return address["address"]
        return NONE

    return cell


def _roles(node: Object, _: datetime) -> str:
    prefix = "node-role.kubernetes.io/"
    labels = node["metadata"].get("labels") or {}
    return ",".join(sorted(k[len(prefix) :] for k in labels if k.startswith(prefix))) or NONE


def _ports(service: Object, _: datetime) -> str:
    shown = []
    for port in (service.get("spec") or {}).get("ports") or []:
        node_port = f":{port['nodePort']}" if port.get("nodePort") else ""
        shown.append(f"{port['port']}{node_port}/{port.get('protocol', 'TCP')}")
    return ",".join(shown) or NONE


def _external_ip(service: Object, _: datetime) -> str:
    spec = service.get("spec") or {}
    given = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    addresses = [str(i.get("ip") or i.get("hostname")) for i in given if i.get("ip") or i.get("hostname")]
    match spec.get("type"):
        case "LoadBalancer":
            return ",".join([*addresses, *(spec.get("externalIPs") or [])]) or "<pending>"
        case "ExternalName":
            return str(spec.get("externalName") or NONE)
    return ",".join(spec.get("externalIPs") or []) or NONE


def _endpoints(obj: Object, _: datetime) -> str:
    found = [
        f"{address['ip']}:{port['port']}"
        for subset in obj.get("subsets") or []
        for address in subset.get("addresses") or []
        for port in subset.get("ports") or [{"port": ""}]
    ]
    return _few(found)


def _few(found: list[str]) -> str:
    return ",".join(found[:3]) + (f" + {len(found) - 3} more..." if len(found) > 3 else "") or NONE


def _slice_ports(obj: Object, _: datetime) -> str:
    return _few([str(p.get("port", "*")) for p in obj.get("ports") or []])


def _slice_addresses(obj: Object, _: datetime) -> str:
    return _few([a for e in obj.get("endpoints") or [] for a in e.get("addresses") or []])


def _replicas(obj: Object, _: datetime) -> str:
    ready = (obj.get("status") or {}).get("readyReplicas") or 0
    return f"{ready}/{(obj.get('spec') or {}).get('replicas', 1)}"


def _last_seen(event: Object, now: datetime) -> str:
    series = event.get("series") or {}
    seen = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("deprecatedLastTimestamp")
    return age(seen or event.get("eventTime") or event.get("firstTimestamp"), now)


def _first_seen(event: Object, now: datetime) -> str:
    return age(event.get("firstTimestamp") or event.get("eventTime"), now)


def _involved(event: Object, _: datetime) -> str:
    involved = event.get("involvedObject") or event.get("regarding") or {}
    return f"{str(involved.get('kind', '')).lower()}/{involved.get('name', '')}"


def _source(event: Object, _: datetime) -> str:
    source = event.get("source") or {}
    return ", ".join(p for p in (source.get("component"), source.get("host")) if p)


def _containers(field: str, *spec: str) -> Cell:
    def cell(obj: Object, now: datetime) -> str:
        found = at(*spec, default={})(obj, now)
        return ",".join(c.get(field, "") for c in found.get("containers") or [])

    return cell


def _match_labels(*path: str) -> Cell:
    """A LabelSelector as kubectl writes it."""

    def cell(obj: Object, now: datetime) -> str:
        found = at(*path, default={})(obj, now)
        terms = [f"{k}={v}" for k, v in sorted((found.get("matchLabels") or {}).items())]
        for rule in found.get("matchExpressions") or ():
            values = ",".join(rule.get("values") or ())
            match rule["operator"]:
                case "In" | "NotIn" as operator:
                    terms.append(f"{rule['key']} {operator.lower()} ({values})")
                case "Exists":
                    terms.append(rule["key"])
                case _:
                    terms.append("!" + rule["key"])
        return ",".join(terms) or NONE

    return cell


def _wide(*spec: str, labels: bool = True) -> list[Column]:
    columns = [
        Column("Containers", _containers("name", *spec), wide=True),
        Column("Images", _containers("image", *spec), wide=True),
    ]
    return [*columns, Column("Selector", _match_labels("spec", "selector"), wide=True)] if labels else columns


_TEMPLATE = _wide("spec", "template", "spec")


def _job_status(job: Object, _: datetime) -> str:
    conditions = {c["type"] for c in (job.get("status") or {}).get("conditions") or [] if c["status"] == "True"}
    for kind in ("Complete", "Failed", "Suspended"):
        if kind in conditions:
            return kind
    return "Terminating" if job["metadata"].get("deletionTimestamp") else "Running"


def _completions(job: Object, _: datetime) -> str:
    spec, done = job.get("spec") or {}, (job.get("status") or {}).get("succeeded", 0)
    if spec.get("completions") is not None:
        return f"{done}/{spec['completions']}"
    parallel = spec.get("parallelism") or 0
    return f"{done}/1 of {parallel}" if parallel > 1 else f"{done}/1"


def _duration(job: Object, now: datetime) -> str:
    status = job.get("status") or {}
    if not status.get("startTime"):
        return ""
    started = datetime.fromisoformat(status["startTime"])
    ended = datetime.fromisoformat(status["completionTime"]) if status.get("completionTime") else now
    return human_duration((ended - started).total_seconds())


def _truth(*path: str) -> Cell:
    return lambda obj, now: "True" if at(*path, default=False)(obj, now) else "False"


def _last_schedule(obj: Object, now: datetime) -> str:
    last = (obj.get("status") or {}).get("lastScheduleTime")
    return age(last, now) if last else NONE


_MODES = {"ReadWriteOnce": "RWO", "ReadOnlyMany": "ROX", "ReadWriteMany": "RWX", "ReadWriteOncePod": "RWOP"}


def _access(*path: str) -> Cell:
    def cell(obj: Object, now: datetime) -> str:
        return ",".join(_MODES.get(mode, mode) for mode in at(*path, default=[])(obj, now))

    return cell


def _claim(volume: Object, _: datetime) -> str:
    claim = (volume.get("spec") or {}).get("claimRef")
    return f"{claim.get('namespace', '')}/{claim.get('name', '')}" if claim else ""


def _phase(obj: Object, now: datetime) -> str:
    return "Terminating" if obj["metadata"].get("deletionTimestamp") else str(at("status", "phase")(obj, now))


def _class_name(obj: Object, _: datetime) -> str:
    marked = (obj["metadata"].get("annotations") or {}).get("storageclass.kubernetes.io/is-default-class")
    return f"{obj['metadata']['name']} (default)" if marked == "true" else str(obj["metadata"]["name"])


def _budget(field: str) -> Cell:
    return lambda obj, _: str((obj.get("spec") or {}).get(field, "N/A"))


def _hosts(ingress: Object, _: datetime) -> str:
    hosts = [r["host"] for r in (ingress.get("spec") or {}).get("rules") or [] if r.get("host")]
    return _few(hosts) if hosts else "*"


def _ingress_address(ingress: Object, _: datetime) -> str:
    found = ((ingress.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    return ",".join(str(i.get("ip") or i.get("hostname") or "") for i in found)


def _ingress_ports(ingress: Object, _: datetime) -> str:
    return "80, 443" if (ingress.get("spec") or {}).get("tls") else "80"


def _quota(resources: Callable[[str], bool]) -> Cell:
    def cell(obj: Object, _: datetime) -> str:
        status = obj.get("status") or {}
        hard = status.get("hard") or (obj.get("spec") or {}).get("hard") or {}
        used = status.get("used") or {}
        return ", ".join(f"{n}: {used.get(n, '0')}/{v}" for n, v in sorted(hard.items()) if resources(n))

    return cell


def _scaled(autoscaler: Object, _: datetime) -> str:
    reference = (autoscaler.get("spec") or {}).get("scaleTargetRef") or {}
    return f"{reference.get('kind', '')}/{reference.get('name', '')}"


def _targets(autoscaler: Object, _: datetime) -> str:
    spec, status = autoscaler.get("spec") or {}, autoscaler.get("status") or {}
    seen = {(m.get("resource") or {}).get("name"): m for m in status.get("currentMetrics") or []}
    shown = []
    for metric in spec.get("metrics") or []:
        wanted = (metric.get("resource") or {}).get("target") or {}
        name = (metric.get("resource") or {}).get("name", metric.get("type", ""))
        current = ((seen.get(name) or {}).get("resource") or {}).get("current") or {}
        if "averageUtilization" in wanted:
            now = current.get("averageUtilization")
            shown.append(f"{name}: {UNKNOWN if now is None else f'{now}%'}/{wanted['averageUtilization']}%")
        else:
            shown.append(
                f"{name}: {current.get('averageValue', UNKNOWN)}/{wanted.get('averageValue', UNKNOWN)}"
            )
    return ", ".join(shown) or NONE


def _subjects(kind: str) -> Cell:
    def cell(obj: Object, _: datetime) -> str:
        found = [s for s in obj.get("subjects") or [] if s.get("kind") == kind]
        return ", ".join(f"{s['namespace']}/{s['name']}" if s.get("namespace") else s["name"] for s in found)

    return cell


def _role(obj: Object, _: datetime) -> str:
    reference = obj.get("roleRef") or {}
    return f"{reference.get('kind')}/{reference.get('name')}"


def _created(obj: Object, _: datetime) -> Any:
    return obj["metadata"].get("creationTimestamp", UNKNOWN)


def _owner(obj: Object, _: datetime) -> str:
    for owner in obj["metadata"].get("ownerReferences") or []:
        if owner.get("controller"):
            group = owner["apiVersion"].rpartition("/")[0]
            return f"{owner['kind'].lower()}{'.' + group if group else ''}/{owner['name']}"
    return NONE


def _backend(obj: Object, _: datetime) -> str:
    service = (obj.get("spec") or {}).get("service")
    return f"{service.get('namespace')}/{service.get('name')}" if service else "Local"


def _available(obj: Object, _: datetime) -> str:
    for condition in (obj.get("status") or {}).get("conditions") or []:
        if condition["type"] == "Available":
            if condition["status"] == "True":
                return "True"
            return f"{condition['status']} ({condition.get('reason', '')})"
    return "Unknown"


def _integer(name: str, *path: str) -> Column:
    return Column(name, number(*path), type="integer")


_BINDING = [
    Column("Role", _role),
    AGE,
    Column("Users", _subjects("User"), wide=True),
    Column("Groups", _subjects("Group"), wide=True),
    Column("ServiceAccounts", _subjects("ServiceAccount"), wide=True),
]
_EVENT = [
    Column("Last Seen", _last_seen),
    Column("Type", at("type")),
    Column("Reason", at("reason")),
    Column("Object", _involved),
    Column("Subobject", at("involvedObject", "fieldPath", default=""), wide=True),
    Column("Source", _source, wide=True),
    Column("Message", lambda o, _: (o.get("message") or o.get("note") or "").strip()),
    Column("First Seen", _first_seen, wide=True),
    Column("Count", at("count", default=1), wide=True),
    Column("Name", at("metadata", "name"), wide=True),
]
_AUTOSCALER = [
    Column("Reference", _scaled),
    Column("Targets", _targets),
    Column("MinPods", at("spec", "minReplicas", default="<unset>")),
    _integer("MaxPods", "spec", "maxReplicas"),
    _integer("Replicas", "status", "currentReplicas"),
    AGE,
]
_WEBHOOKS = [Column("Webhooks", count("webhooks"), type="integer"), AGE]

COLUMNS: dict[tuple[str, str], list[Column]] = {
    ("", "Pod"): POD,
    ("", "Namespace"): [Column("Status", at("status", "phase")), AGE],
    ("", "Node"): [
        Column("Status", _node_status),
        Column("Roles", _roles),
        AGE,
        Column("Version", at("status", "nodeInfo", "kubeletVersion", default="")),
        Column("Internal-IP", _node_address("InternalIP"), wide=True),
        Column("External-IP", _node_address("ExternalIP"), wide=True),
        Column("OS-Image", at("status", "nodeInfo", "osImage"), wide=True),
        Column("Kernel-Version", at("status", "nodeInfo", "kernelVersion"), wide=True),
        Column("Container-Runtime", at("status", "nodeInfo", "containerRuntimeVersion"), wide=True),
    ],
    ("", "Service"): [
        Column("Type", at("spec", "type")),
        Column("Cluster-IP", at("spec", "clusterIP")),
        Column("External-IP", _external_ip),
        Column("Port(s)", _ports),
        AGE,
        Column("Selector", selector("spec", "selector"), wide=True),
    ],
    ("", "ConfigMap"): [
        Column("Data", lambda o, _: len(o.get("data") or {}) + len(o.get("binaryData") or {}), type="integer"),
        AGE,
    ],
    ("", "Secret"): [Column("Type", at("type")), Column("Data", count("data"), type="integer"), AGE],
    ("", "ServiceAccount"): [Column("Secrets", count("secrets"), type="integer"), AGE],
    ("", "Endpoints"): [Column("Endpoints", _endpoints), AGE],
    ("", "Event"): _EVENT,
    ("events.k8s.io", "Event"): _EVENT,
    ("", "PodTemplate"): [
        Column("Containers", _containers("name", "template", "spec")),
        Column("Images", _containers("image", "template", "spec")),
        Column("Pod Labels", selector("template", "metadata", "labels")),
    ],
    ("", "ReplicationController"): [
        _integer("Desired", "spec", "replicas"),
        _integer("Current", "status", "replicas"),
        _integer("Ready", "status", "readyReplicas"),
        AGE,
        *_wide("spec", "template", "spec", labels=False),
        Column("Selector", selector("spec", "selector"), wide=True),
    ],
    ("", "PersistentVolume"): [
        Column("Capacity", at("spec", "capacity", "storage", default="")),
        Column("Access Modes", _access("spec", "accessModes")),
        Column("Reclaim Policy", at("spec", "persistentVolumeReclaimPolicy", default="")),
        Column("Status", _phase),
        Column("Claim", _claim),
        Column("StorageClass", at("spec", "storageClassName", default="")),
        Column("VolumeAttributesClass", at("spec", "volumeAttributesClassName", default="<unset>")),
        Column("Reason", at("status", "reason", default="")),
        AGE,
        Column("VolumeMode", at("spec", "volumeMode"), wide=True),
    ],
    ("", "PersistentVolumeClaim"): [
        Column("Status", _phase),
        Column("Volume", at("spec", "volumeName", default="")),
        Column("Capacity", at("status", "capacity", "storage", default="")),
        Column("Access Modes", _access("status", "accessModes")),
        Column("StorageClass", at("spec", "storageClassName", default="")),
        Column("VolumeAttributesClass", at("spec", "volumeAttributesClassName", default="<unset>")),
        AGE,
        Column("VolumeMode", at("spec", "volumeMode"), wide=True),
    ],
    ("", "ResourceQuota"): [
        Column("Request", _quota(lambda n: not n.startswith("limits."))),
        Column("Limit", _quota(lambda n: n.startswith("limits."))),
        AGE,
    ],
    ("", "LimitRange"): [Column("Created At", _created)],
    ("apps", "Deployment"): [
        Column("Ready", _replicas),
        _integer("Up-to-date", "status", "updatedReplicas"),
        _integer("Available", "status", "availableReplicas"),
        AGE,
        *_TEMPLATE,
    ],
    ("apps", "ReplicaSet"): [
        _integer("Desired", "spec", "replicas"),
        _integer("Current", "status", "replicas"),
        _integer("Ready", "status", "readyReplicas"),
        AGE,
        *_TEMPLATE,
    ],
    ("apps", "StatefulSet"): [Column("Ready", _replicas), AGE, *_TEMPLATE[:2]],
    ("apps", "DaemonSet"): [
        _integer("Desired", "status", "desiredNumberScheduled"),
        _integer("Current", "status", "currentNumberScheduled"),
        _integer("Ready", "status", "numberReady"),
        _integer("Up-to-date", "status", "updatedNumberScheduled"),
        _integer("Available", "status", "numberAvailable"),
        Column("Node Selector", selector("spec", "template", "spec", "nodeSelector")),
        AGE,
        *_TEMPLATE,
    ],
    ("apps", "ControllerRevision"): [
        Column("Controller", _owner),
        _integer("Revision", "revision"),
        AGE,
    ],
    ("batch", "Job"): [
        Column("Status", _job_status),
        Column("Completions", _completions),
        Column("Duration", _duration),
        AGE,
        *_TEMPLATE,
    ],
    ("batch", "CronJob"): [
        Column("Schedule", at("spec", "schedule")),
        Column("Timezone", at("spec", "timeZone")),
        Column("Suspend", _truth("spec", "suspend")),
        Column("Active", lambda o, _: len((o.get("status") or {}).get("active") or []), type="integer"),
        Column("Last Schedule", _last_schedule),
        AGE,
        *_wide("spec", "jobTemplate", "spec", "template", "spec", labels=False),
        Column("Selector", _match_labels("spec", "jobTemplate", "spec", "selector"), wide=True),
    ],
    ("policy", "PodDisruptionBudget"): [
        Column("Min Available", _budget("minAvailable")),
        Column("Max Unavailable", _budget("maxUnavailable")),
        _integer("Allowed Disruptions", "status", "disruptionsAllowed"),
        AGE,
    ],
    ("autoscaling", "HorizontalPodAutoscaler"): _AUTOSCALER,
    ("networking.k8s.io", "NetworkPolicy"): [Column("Pod-Selector", _match_labels("spec", "podSelector")), AGE],
    ("networking.k8s.io", "Ingress"): [
        Column("Class", at("spec", "ingressClassName")),
        Column("Hosts", _hosts),
        Column("Address", _ingress_address),
        Column("Ports", _ingress_ports),
        AGE,
    ],
    ("networking.k8s.io", "IngressClass"): [
        Column("Controller", at("spec", "controller")),
        Column("Parameters", at("spec", "parameters", "name")),
        AGE,
    ],
    ("discovery.k8s.io", "EndpointSlice"): [
        Column("AddressType", at("addressType")),
        Column("Ports", _slice_ports),
        Column("Endpoints", _slice_addresses),
        AGE,
    ],
    ("rbac.authorization.k8s.io", "Role"): [Column("Created At", _created)],
    ("rbac.authorization.k8s.io", "ClusterRole"): [Column("Created At", _created)],
    ("rbac.authorization.k8s.io", "RoleBinding"): _BINDING,
    ("rbac.authorization.k8s.io", "ClusterRoleBinding"): _BINDING,
    ("scheduling.k8s.io", "PriorityClass"): [
        _integer("Value", "value"),
        Column("Global-Default", lambda o, _: str(bool(o.get("globalDefault"))).lower(), type="boolean"),
        AGE,
        Column("PreemptionPolicy", at("preemptionPolicy")),
    ],
    ("storage.k8s.io", "StorageClass"): [
        Column("Name", _class_name),
        Column("Provisioner", at("provisioner")),
        Column("ReclaimPolicy", at("reclaimPolicy")),
        Column("VolumeBindingMode", at("volumeBindingMode")),
        Column("AllowVolumeExpansion", lambda o, _: str(bool(o.get("allowVolumeExpansion"))).lower()),
        AGE,
    ],
    ("node.k8s.io", "RuntimeClass"): [Column("Handler", at("handler")), AGE],
    ("coordination.k8s.io", "Lease"): [Column("Holder", at("spec", "holderIdentity", default="")), AGE],
    ("apiregistration.k8s.io", "APIService"): [
        Column("Service", _backend),
        Column("Available", _available),
        AGE,
    ],
    ("admissionregistration.k8s.io", "ValidatingWebhookConfiguration"): _WEBHOOKS,
    ("admissionregistration.k8s.io", "MutatingWebhookConfiguration"): _WEBHOOKS,
    ("admissionregistration.k8s.io", "ValidatingAdmissionPolicy"): [
        Column("Validations", lambda o, _: len((o.get("spec") or {}).get("validations") or []), type="integer"),
        Column("ParamKind", at("spec", "paramKind", "kind", default="<unset>")),
        AGE,
    ],
    ("admissionregistration.k8s.io", "ValidatingAdmissionPolicyBinding"): [
        Column("PolicyName", at("spec", "policyName")),
        Column("ParamRef", at("spec", "paramRef", "name", default="<unset>")),
        AGE,
    ],
    ("apiextensions.k8s.io", "CustomResourceDefinition"): [Column("Created At", _created)],
}

"""Rules of pods and pod templates, as k8s.io/kubernetes' `ValidatePodSpec` words them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from meshlight.kube import field_errors as faults
from meshlight.kube import quantity
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause
from meshlight.kube.validation import names

_VOLUME_META = ("name",)
_ENV_SOURCES = ("fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef")
_HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc", "sleep")
_RESOURCES = ("cpu", "memory", "ephemeral-storage")
_UPDATES = (
    "pod updates may not change fields other than `spec.containers[*].image`,"
    "`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to "
    "existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was "
    "previously negative)"
)


def pod(obj: Object) -> list[Cause]:
    """Faults of a Pod."""
    return spec(obj.get("spec") or {}, "spec")


def template(found: Object, path: str, claims: Iterable[str] = ()) -> list[Cause]:
    """Faults of a PodTemplateSpec; `claims` are volumes that its StatefulSet adds."""
    metadata = found.get("metadata") or {}
    causes = names.labels(metadata.get("labels"), f"{path}.metadata.labels")
    return causes + spec(found.get("spec") or {}, f"{path}.spec", claims)


def spec(found: Object, path: str, claims: Iterable[str] = ()) -> list[Cause]:
    """Faults of a PodSpec; `claims` are volumes beside its own."""
    causes: list[Cause] = []
    volumes = {*(v.get("name") for v in found.get("volumes") or ()), *claims}
    causes += _volumes(found.get("volumes") or [], f"{path}.volumes")
    if not found.get("containers"):
        causes.append(faults.required(f"{path}.containers"))
    seen: set[str] = set()
    for field, at, container in _containers(found, path):
        name = container.get("name") or ""
        if name in seen:
            causes.append(faults.duplicate(f"{at}.name", name))
        seen.add(name)
        causes += _container(container, at, volumes, field, found)
    causes += names.labels(found.get("nodeSelector"), f"{path}.nodeSelector")
    for field in ("hostname", "subdomain"):
        if found.get(field) and (message := names.label(found[field])):
            causes.append(faults.invalid_value(f"{path}.{field}", found[field], message))
    for field, rule in (("nodeName", names.subdomain), ("serviceAccountName", names.subdomain)):
        if found.get(field) and (message := rule(found[field])):
            causes.append(faults.invalid_value(f"{path}.{field}", found[field], message))
    if found.get("terminationGracePeriodSeconds", 0) < 0:
        causes.append(
            _not_negative(f"{path}.terminationGracePeriodSeconds", found["terminationGracePeriodSeconds"])
        )
    deadline = found.get("activeDeadlineSeconds")
    if deadline is not None and not 1 <= deadline < 2**31:
        detail = "must be between 1 and 2147483647, inclusive"
        causes.append(faults.invalid_value(f"{path}.activeDeadlineSeconds", deadline, detail))
    causes += _tolerations(found.get("tolerations") or [], f"{path}.tolerations")
    for index, constraint in enumerate(found.get("topologySpreadConstraints") or ()):
        if constraint.get("maxSkew", 1) <= 0:
            at = f"{path}.topologySpreadConstraints[{index}].maxSkew"
            causes.append(faults.invalid_value(at, constraint["maxSkew"], "must be greater than zero"))
    return causes


def _containers(found: Object, path: str) -> Iterator[tuple[str, str, Object]]:
    for field in ("initContainers", "containers", "ephemeralContainers"):
        for index, container in enumerate(found.get(field) or ()):
            yield field, f"{path}.{field}[{index}]", container


def _volumes(volumes: list[Object], path: str) -> list[Cause]:
    causes = []
    seen: set[str] = set()
    for index, volume in enumerate(volumes):
        at, name = f"{path}[{index}]", volume.get("name") or ""
        if name and (message := names.label(name)):
            causes.append(faults.invalid_value(f"{at}.name", name, message))
        elif name in seen:
            causes.append(faults.duplicate(f"{at}.name", name))
        seen.add(name)
        sources = [kind for kind in volume if kind not in _VOLUME_META]
        for extra in sources[1:]:
            causes.append(faults.forbidden(f"{at}.{extra}", "may not specify more than 1 volume type"))
        for kind, field in (("configMap", "name"), ("secret", "secretName")):
            if kind in sources and not volume[kind].get(field):
                causes.append(faults.required(f"{at}.{kind}.{field}"))
        for part, source in enumerate((volume.get("projected") or {}).get("sources") or ()):
            token = source.get("serviceAccountToken")
            if token and token.get("expirationSeconds", 3600) < 600:
                where = f"{at}.projected.sources[{part}].serviceAccountToken.expirationSeconds"
                detail = "may not specify a duration less than 10 minutes"
                causes.append(faults.invalid_value(where, token["expirationSeconds"], detail))
    return causes


def _container(container: Object, at: str, volumes: set[Any], field: str, pod_spec: Object) -> list[Cause]:
    causes = []
    name, image = container.get("name"), container.get("image")
    if name and (message := names.label(name)):
        causes.append(faults.invalid_value(f"{at}.name", name, message))
    if not image:
        causes.append(faults.required(f"{at}.image"))
    elif image != image.strip():
        causes.append(
            faults.invalid_value(f"{at}.image", image, "must not have leading or trailing whitespace")
        )
    if container.get("ports"):
        causes += _ports(container["ports"], f"{at}.ports", bool(pod_spec.get("hostNetwork")))
    for index, variable in enumerate(container.get("env") or ()):
        causes += _variable(variable, f"{at}.env[{index}]")
    if container.get("volumeMounts"):
        causes += _mounts(container["volumeMounts"], f"{at}.volumeMounts", volumes)
    if container.get("resources"):
        causes += _resources(container["resources"], f"{at}.resources")
    sidecar = field == "initContainers" and container.get("restartPolicy") == "Always"
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        if probe in container:
            if field == "initContainers" and not sidecar:
                detail = "may not be set for init containers without restartPolicy=Always"
                causes.append(faults.forbidden(f"{at}.{probe}", detail))
            causes += _probe(container[probe], f"{at}.{probe}", ready=probe == "readinessProbe")
    if container.get("restartPolicy") and field == "containers":
        causes.append(faults.forbidden(f"{at}.restartPolicy", "may not be set for non-init containers"))
    for hook, handler in (container.get("lifecycle") or {}).items():
        if isinstance(handler, dict):
            causes += _handler(handler, f"{at}.lifecycle.{hook}")
    return causes


def port_number(path: str, number: int) -> list[Cause]:
    """Faults of a port's number."""
    if 1 <= number <= 65535:
        return []
    return [faults.invalid_value(path, number, "must be between 1 and 65535, inclusive")]


def port_reference(path: str, port: int | str) -> list[Cause]:
    """Faults of a port given by number or name."""
    if isinstance(port, int):
        return port_number(path, port)
    message = names.port_name(port)
    return [faults.invalid_value(path, port, message)] if message else []


def _ports(ports: list[Object], path: str, host_network: bool) -> list[Cause]:
    causes = []
    seen: set[str] = set()
    for index, port in enumerate(ports):
        at, name = f"{path}[{index}]", port.get("name")
        if name:
            if message := names.port_name(name):
                causes.append(faults.invalid_value(f"{at}.name", name, message))
            elif name in seen:
                causes.append(faults.duplicate(f"{at}.name", name))
            seen.add(name)
        number = port.get("containerPort")
        if number == 0:
            causes.append(faults.required(f"{at}.containerPort"))
        elif number is not None:
            causes += port_number(f"{at}.containerPort", number)
        host_port = port.get("hostPort")
        if host_port:
            causes += port_number(f"{at}.hostPort", host_port)
            if host_network and host_port != number:
                detail = "must match `containerPort` when `hostNetwork` is true"
                causes.append(faults.invalid_value(f"{at}.hostPort", host_port, detail))
    return causes


def _variable(variable: Object, at: str) -> list[Cause]:
    causes = []
    name = variable.get("name") or ""
    if any(not " " <= c <= "~" or c == "=" for c in name):
        detail = (
            "a valid environment variable name must consist only of printable ASCII characters other than '='"
        )
        causes.append(faults.invalid_value(f"{at}.name", name, detail))
    source = variable.get("valueFrom")
    if source is not None:
        given = [kind for kind in _ENV_SOURCES if source.get(kind) is not None]
        if not given:
            detail = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`"
            causes.append(faults.invalid_value(f"{at}.valueFrom", "", detail))
        elif variable.get("value"):
            detail = "may not be specified when `value` is not empty"
            causes.append(faults.invalid_value(f"{at}.valueFrom", "", detail))
        elif len(given) > 1:
            detail = "may not have more than one field specified at a time"
            causes.append(faults.invalid_value(f"{at}.valueFrom", "", detail))
        for kind in ("configMapKeyRef", "secretKeyRef"):
            if kind in given and not source[kind].get("name"):
                causes.append(faults.required(f"{at}.valueFrom.{kind}.name"))
    return causes


def _mounts(mounts: list[Object], path: str, volumes: set[Any]) -> list[Cause]:
    causes = []
    seen: set[str] = set()
    for index, mount in enumerate(mounts):
        at, name, where = f"{path}[{index}]", mount.get("name"), mount.get("mountPath")
        if name and name not in volumes:
            causes.append(faults.missing_reference(f"{at}.name", name))
        if where:
            if where in seen:
                causes.append(faults.invalid_value(f"{at}.mountPath", where, "must be unique"))
            seen.add(where)
        sub = mount.get("subPath") or ""
        if sub.startswith("/"):
            causes.append(faults.invalid_value(f"{at}.subPath", sub, "must be a relative path"))
        elif ".." in sub.split("/"):
            causes.append(faults.invalid_value(f"{at}.subPath", sub, "must not contain '..'"))
    return causes


def _resources(found: Object, path: str) -> list[Cause]:
    causes = []
    limits = found.get("limits") or {}
    for field in ("limits", "requests"):
        for name, amount in (found.get(field) or {}).items():
            at = f"{path}.{field}[{name}]"
            if "/" not in name and name not in _RESOURCES and not name.startswith("hugepages-"):
                causes.append(faults.invalid_value(at, name, "must be a standard resource for containers"))
            if quantity.value(amount) < 0:
                causes.append(_not_negative(at, amount))
    for name, amount in (found.get("requests") or {}).items():
        if name in limits and quantity.value(amount) > quantity.value(limits[name]):
            detail = f"must be less than or equal to {name} limit of {limits[name]}"
            causes.append(faults.invalid_value(f"{path}.requests", amount, detail))
    return causes


def _probe(probe: Object, at: str, *, ready: bool) -> list[Cause]:
    causes = _handler(probe, at)
    for field in (
        "initialDelaySeconds",
        "timeoutSeconds",
        "periodSeconds",
        "successThreshold",
        "failureThreshold",
    ):
        if probe.get(field, 0) < 0:
            causes.append(_not_negative(f"{at}.{field}", probe[field]))
    if not ready and probe.get("successThreshold", 1) != 1:
        causes.append(faults.invalid_value(f"{at}.successThreshold", probe["successThreshold"], "must be 1"))
    return causes


def _handler(handler: Object, at: str) -> list[Cause]:
    causes: list[Cause] = []
    given = [kind for kind in _HANDLERS if handler.get(kind) is not None]
    if not given:
        return [faults.required(at, "must specify a handler type")]
    for extra in given[1:]:
        causes.append(faults.forbidden(f"{at}.{extra}", "may not specify more than 1 handler type"))
    for kind in ("httpGet", "tcpSocket", "grpc"):
        if kind in given and "port" in handler[kind]:
            causes += port_reference(f"{at}.{kind}.port", handler[kind]["port"])
    if "exec" in given and not handler["exec"].get("command"):
        causes.append(faults.required(f"{at}.exec.command"))
    return causes


def _tolerations(tolerations: list[Object], path: str) -> list[Cause]:
    causes = []
    for index, toleration in enumerate(tolerations):
        at, operator = f"{path}[{index}]", toleration.get("operator") or "Equal"
        if not toleration.get("key") and operator != "Exists":
            detail = 'operator must be Exists when `key` is empty, which means "match all values and all keys"'
            causes.append(faults.invalid_value(f"{at}.operator", operator, detail))
        if operator == "Exists" and toleration.get("value"):
            detail = "value must be empty when `operator` is 'Exists'"
            causes.append(faults.invalid_value(f"{at}.operator", toleration, detail))
        if toleration.get("tolerationSeconds") is not None and toleration.get("effect") != "NoExecute":
            detail = "effect must be 'NoExecute' when `tolerationSeconds` is set"
            causes.append(faults.invalid_value(f"{at}.effect", toleration.get("effect") or "", detail))
    return causes


def _not_negative(path: str, value: Any) -> Cause:
    return faults.invalid_value(path, value, "must be greater than or equal to 0")


def pod_update(old: Object, new: Object) -> list[Cause]:
    """Faults of a change of a Pod: almost all of its spec stays as it was made."""
    before, after = old.get("spec") or {}, new.get("spec") or {}
    if before == after or (_fixed(before) == _fixed(after) and _only_added(before, after)):
        return []
    changed = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
    return [faults.forbidden("spec", f"{_UPDATES}\n  changed: {', '.join(f'spec.{k}' for k in changed)}")]


def _fixed(found: Object) -> Object:
    fixed = {k: v for k, v in found.items() if k not in ("activeDeadlineSeconds", "tolerations")}
    for field in ("containers", "initContainers"):
        if field in fixed:
            fixed[field] = [{k: v for k, v in c.items() if k != "image"} for c in fixed[field]]
    if found.get("schedulingGates"):
        for field in ("schedulingGates", "nodeSelector", "affinity"):
            fixed.pop(field, None)
    return fixed


def _only_added(before: Object, after: Object) -> bool:
    kept = after.get("tolerations") or []
    return all(t in kept for t in before.get("tolerations") or ())

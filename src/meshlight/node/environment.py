"""What a container's program finds in its environment and arguments.

Pure: ConfigMaps and Secrets come through `Sources`, which the caller has filled. Rules: Kubernetes'
Container v1 API (`env`, `envFrom`, `$(VAR)` expansion) and its downward API.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from meshlight.kube.resources import Object
from meshlight.node.addresses import both

_REFERENCE = re.compile(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)")
_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")
_SUFFIXES = {
    "": Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9),
    "T": Decimal(10**12), "P": Decimal(10**15), "Ki": Decimal(2**10), "Mi": Decimal(2**20),
    "Gi": Decimal(2**30), "Ti": Decimal(2**40), "Pi": Decimal(2**50), "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
}  # fmt: skip


class ConfigError(Exception):
    """A pod refers to something that does not exist; the message names it as the kubelet does."""


@dataclass(slots=True)
class Sources:
    """ConfigMaps and Secrets of the pod's namespace by name; None stands for "does not exist"."""

    config_maps: Mapping[str, Object | None] = field(default_factory=dict)
    secrets: Mapping[str, Object | None] = field(default_factory=dict)

    def config_map(self, name: str, namespace: str, optional: bool) -> dict[str, bytes] | None:
        """A ConfigMap's keys; None when it may be absent and is. Raises ConfigError."""
        found = self.config_maps.get(name)
        if found is None:
            if optional:
                return None
            raise ConfigError(f'configmap "{name}" not found')
        content = {k: str(v).encode() for k, v in (found.get("data") or {}).items()}
        content.update({k: base64.b64decode(v) for k, v in (found.get("binaryData") or {}).items()})
        return content

    def secret(self, name: str, namespace: str, optional: bool) -> dict[str, bytes] | None:
        """A Secret's keys, decoded; None when it may be absent and is. Raises ConfigError."""
        found = self.secrets.get(name)
        if found is None:
            if optional:
                return None
            raise ConfigError(f'secret "{name}" not found')
        return {k: base64.b64decode(v) for k, v in (found.get("data") or {}).items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pod runs: what the downward API tells beyond the pod's own object."""

    pod_ip: str
    host_ip: str
    cpu_cores: int
    memory_bytes: int


def quantity(text: object) -> Decimal:
    """A Kubernetes quantity in base units (`100m` is 0.1). Raises ValueError naming it."""
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)", str(text))
    if not match or match[2] not in _SUFFIXES:
        raise ValueError(f"{text!r} is not a quantity")
    return Decimal(match[1]) * _SUFFIXES[match[2]]


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace `$(NAME)` by the variable's value; what is not defined stays, `$$` is a dollar sign."""

    def replacement(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return values.get(match[1], match[0])

    return _REFERENCE.sub(replacement, text)


def field_value(pod: Object, path: str, place: Place) -> str:
    """A `fieldRef`. Raises ConfigError for a path that the downward API does not have."""
    metadata, spec = pod["metadata"], pod["spec"]
    if match := _SUBSCRIPT.fullmatch(path):
        return str((metadata.get(match[1]) or {}).get(match[2], ""))
    simple = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata.get("namespace", ""),
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName") or "default",
        "status.podIP": place.pod_ip,
        "status.podIPs": ",".join(both(place.pod_ip)),
        "status.hostIP": place.host_ip,
        "status.hostIPs": ",".join(both(place.host_ip)),
    }
    if path in simple:
        return str(simple[path])
    if path in ("metadata.labels", "metadata.annotations"):
        entries = metadata.get(path.removeprefix("metadata.")) or {}
        return "\n".join(f'{key}="{_quoted(value)}"' for key, value in sorted(entries.items()))
    raise ConfigError(f'unsupported fieldPath: "{path}"')


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")


def resource_value(pod: Object, container: str, reference: Object, place: Place) -> str:
    """A `resourceFieldRef` of the named container, in units of its divisor, rounded up."""
    wanted = reference.get("containerName") or container
    containers = [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]
    found = next((c for c in containers if c["name"] == wanted), None)
    if found is None:
        raise ConfigError(f"resourceFieldRef: there is no container {wanted}")
    kind, _, name = reference["resource"].partition(".")
    resources = found.get("resources") or {}
    value = (resources.get(kind) or {}).get(name)
    if value is None and kind == "limits":  # the node's allocatable, as documented
        value = {"cpu": place.cpu_cores, "memory": place.memory_bytes}.get(name)
    if value is None:
        value = 0
    divisor = quantity(reference.get("divisor") or "1") or Decimal(1)
    return str(math.ceil(quantity(value) / divisor))


def service_variables(services: Iterable[Object]) -> dict[str, str]:
    """Variables of the Services (`NAME_SERVICE_HOST`, `NAME_SERVICE_PORT`, docker links)."""
    found: dict[str, str] = {}
    for service in services:
        address = service["spec"].get("clusterIP")
        ports = service["spec"].get("ports") or []
        if not address or address == "None" or not ports:
            continue
        name = service["metadata"]["name"].upper().replace("-", "_")
        found[f"{name}_SERVICE_HOST"] = address
        found[f"{name}_SERVICE_PORT"] = str(ports[0]["port"])
        found[f"{name}_PORT"] = f"{_protocol(ports[0])}://{address}:{ports[0]['port']}"
        for port in ports:
            if port.get("name"):
                found[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
            link = f"{name}_PORT_{port['port']}_{_protocol(port).upper()}"
            found[link] = f"{_protocol(port)}://{address}:{port['port']}"
            found[f"{link}_PROTO"] = _protocol(port)
            found[f"{link}_PORT"] = str(port["port"])
            found[f"{link}_ADDR"] = address
    return found


def _protocol(port: Object) -> str:
    return str(port.get("protocol") or "TCP").lower()


def variables(
    pod: Object, container: Object, sources: Sources, place: Place, base: Mapping[str, str]
) -> dict[str, str]:
    """The environment of a container over `base`. Raises ConfigError naming what is missing."""
    namespace = pod["metadata"].get("namespace", "")
    found = dict(base)
    for source in container.get("envFrom") or []:
        prefix = source.get("prefix") or ""
        content: dict[str, bytes] | None = None
        if reference := source.get("configMapRef"):
            content = sources.config_map(reference["name"], namespace, bool(reference.get("optional")))
        elif reference := source.get("secretRef"):
            content = sources.secret(reference["name"], namespace, bool(reference.get("optional")))
        for key, value in (content or {}).items():
            if _NAME.fullmatch(prefix + key):
                found[prefix + key] = value.decode(errors="replace")
    for entry in container.get("env") or []:
        if (origin := entry.get("valueFrom")) is None:
            found[entry["name"]] = expand(str(entry.get("value") or ""), found)
            continue
        value_from = _value_from(pod, container, origin, sources, place)
        if value_from is not None:
            found[entry["name"]] = value_from
    return found


def _value_from(pod: Object, container: Object, origin: Object, sources: Sources, place: Place) -> str | None:
    namespace = pod["metadata"].get("namespace", "")
    if reference := origin.get("fieldRef"):
        return field_value(pod, reference["fieldPath"], place)
    if reference := origin.get("resourceFieldRef"):
        return resource_value(pod, container["name"], reference, place)
    for kind, look_up, word in (
        ("configMapKeyRef", sources.config_map, "ConfigMap"),
        ("secretKeyRef", sources.secret, "Secret"),
    ):
        if (reference := origin.get(kind)) is None:
            continue
        optional = bool(reference.get("optional"))
        content = look_up(reference["name"], namespace, optional)
        if content is not None and reference["key"] in content:
            return content[reference["key"]].decode(errors="replace")
        if optional:
            return None
        raise ConfigError(f"couldn't find key {reference['key']} in {word} {namespace}/{reference['name']}")
    return None


def command_line(container: Object, program: list[str], env: Mapping[str, str]) -> list[str]:
    """The program's arguments: `command` (or the image's program) and `args`, expanded."""
    own = [expand(str(word), env) for word in container.get("command") or []]
    return [*(own or program), *(expand(str(word), env) for word in container.get("args") or [])]

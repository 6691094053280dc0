"""Decode the protobuf bodies that kubectl sends on some writes.

`kubectl create namespace|configmap|secret|serviceaccount` and Helm's release Secrets have no JSON
fallback. Field numbers are those of the Kubernetes API types (append-only, so stable).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from meshlight.kube.resources import Object

MAGIC = b"k8s\0"

# A message is {field number: (JSON name, type)}; a type is "string", "bool", "bytes", "int", "int-or-string",
# a nested message, ("repeated", type) or ("map", type).
_Message = dict[int, tuple[str, Any]]

_META: _Message = {
    1: ("name", "string"),
    2: ("generateName", "string"),
    3: ("namespace", "string"),
    5: ("uid", "string"),
    6: ("resourceVersion", "string"),
    11: ("labels", ("map", "string")),
    12: ("annotations", ("map", "string")),
    14: ("finalizers", ("repeated", "string")),
}
_ATTRIBUTES: _Message = {
    1: ("namespace", "string"),
    2: ("verb", "string"),
    3: ("group", "string"),
    4: ("version", "string"),
    5: ("resource", "string"),
    6: ("subresource", "string"),
    7: ("name", "string"),
}
_CONTAINER: _Message = {
    1: ("name", "string"),
    2: ("image", "string"),
    3: ("command", ("repeated", "string")),
    4: ("args", ("repeated", "string")),
    5: ("workingDir", "string"),
    6: ("ports", ("repeated", {1: ("name", "string"), 3: ("containerPort", "int"), 4: ("protocol", "string")})),
    7: ("env", ("repeated", {1: ("name", "string"), 2: ("value", "string")})),
    14: ("imagePullPolicy", "string"),
}
_POD_SPEC: _Message = {
    2: ("containers", ("repeated", _CONTAINER)),
    3: ("restartPolicy", "string"),
    4: ("terminationGracePeriodSeconds", "int"),
    6: ("dnsPolicy", "string"),
    8: ("serviceAccountName", "string"),
    10: ("nodeName", "string"),
}
_SELECTOR: _Message = {1: ("matchLabels", ("map", "string"))}
_SERVICE_PORT: _Message = {
    1: ("name", "string"),
    2: ("protocol", "string"),
    3: ("port", "int"),
    4: ("targetPort", "int-or-string"),
    5: ("nodePort", "int"),
}
_POLICY_RULE: _Message = {
    1: ("verbs", ("repeated", "string")),
    2: ("apiGroups", ("repeated", "string")),
    3: ("resources", ("repeated", "string")),
    4: ("resourceNames", ("repeated", "string")),
    5: ("nonResourceURLs", ("repeated", "string")),
}
_SUBJECT: _Message = {
    1: ("kind", "string"),
    2: ("apiGroup", "string"),
    3: ("name", "string"),
    4: ("namespace", "string"),
}
_ROLE_REF: _Message = {1: ("apiGroup", "string"), 2: ("kind", "string"), 3: ("name", "string")}
_ROLE: _Message = {1: ("metadata", _META), 2: ("rules", ("repeated", _POLICY_RULE))}
_BINDING: _Message = {
    1: ("metadata", _META),
    2: ("subjects", ("repeated", _SUBJECT)),
    3: ("roleRef", _ROLE_REF),
}
_KINDS: dict[str, _Message] = {
    "Pod": {1: ("metadata", _META), 2: ("spec", _POD_SPEC)},
    "Deployment": {
        1: ("metadata", _META),
        2: (
            "spec",
            {
                1: ("replicas", "int"),
                2: ("selector", _SELECTOR),
                3: ("template", {1: ("metadata", _META), 2: ("spec", _POD_SPEC)}),
            },
        ),
    },
    "Service": {
        1: ("metadata", _META),
        2: (
            "spec",
            {
                1: ("ports", ("repeated", _SERVICE_PORT)),
                2: ("selector", ("map", "string")),
                3: ("clusterIP", "string"),
                4: ("type", "string"),
                10: ("externalName", "string"),
            },
        ),
    },
    "Namespace": {1: ("metadata", _META), 2: ("spec", {1: ("finalizers", ("repeated", "string"))})},
    "ConfigMap": {
        1: ("metadata", _META),
        2: ("data", ("map", "string")),
        3: ("binaryData", ("map", "bytes")),
        4: ("immutable", "bool"),
    },
    "Secret": {
        1: ("metadata", _META),
        2: ("data", ("map", "bytes")),
        3: ("type", "string"),
        4: ("stringData", ("map", "string")),
        5: ("immutable", "bool"),
    },
    "ServiceAccount": {1: ("metadata", _META)},
    "TokenRequest": {
        1: ("metadata", _META),
        2: (
            "spec",
            {
                1: ("audiences", ("repeated", "string")),
                3: (
                    "boundObjectRef",
                    {
                        1: ("kind", "string"),
                        2: ("apiVersion", "string"),
                        3: ("name", "string"),
                        4: ("uid", "string"),
                    },
                ),
                4: ("expirationSeconds", "int"),
            },
        ),
    },
    "SelfSubjectAccessReview": {
        1: ("metadata", _META),
        2: ("spec", {1: ("resourceAttributes", _ATTRIBUTES)}),
    },
    "SelfSubjectReview": {1: ("metadata", _META)},
    "Role": _ROLE,
    "ClusterRole": _ROLE,
    "RoleBinding": _BINDING,
    "ClusterRoleBinding": _BINDING,
    "DeleteOptions": {
        1: ("gracePeriodSeconds", "int"),
        4: ("propagationPolicy", "string"),
        5: ("dryRun", ("repeated", "string")),
    },
}


def decode(body: bytes) -> Object:
    """The object in a `k8s\\0`-prefixed `runtime.Unknown`. Raises ValueError naming what is unknown."""
    if not body.startswith(MAGIC):
        raise ValueError("the body is not Kubernetes protobuf")
    type_meta, raw = {}, b""
    for number, value in _fields(body[len(MAGIC) :]):
        if number == 1:
            type_meta = _message(value, {1: ("apiVersion", "string"), 2: ("kind", "string")})
        elif number == 2:
            raw = value
    kind = type_meta.get("kind", "")
    if kind not in _KINDS:
        raise ValueError(f"protobuf bodies of kind {kind!r} are not understood; send JSON")
    return {**type_meta, **_message(raw, _KINDS[kind])}


def _fields(body: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(body):
        tag, position = _varint(body, position)
        wire = tag & 7
        if wire == 0:
            value: Any
            value, position = _varint(body, position)
        elif wire == 2:
            length, position = _varint(body, position)
            if position + length > len(body):
                raise ValueError("truncated protobuf")
            value = body[position : position + length]
            position += length
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value = body[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {wire} is not understood")
        yield tag >> 3, value


def _varint(body: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(body) or shift > 63:
            raise ValueError("truncated protobuf")
        byte = body[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _message(body: bytes, shape: _Message) -> Object:
    result: Object = {}
    for number, value in _fields(body):
        if number not in shape:
            continue
        name, kind = shape[number]
        match kind:
            case ("repeated", element):
                result.setdefault(name, []).append(_value(value, element))
            case ("map", element):
                entry = dict(_fields(value))
                key = entry.get(1, b"").decode()
                result.setdefault(name, {})[key] = _value(entry.get(2, b""), element)
            case _:
                result[name] = _value(value, kind)
    # proto encodes absent strings as empty ones
    return {k: v for k, v in result.items() if v != ""}


def _value(value: Any, kind: Any) -> Any:
    match kind:
        case "string":
            return value.decode()
        case "bytes":
            return base64.b64encode(value).decode()
        case "bool":
            return bool(value)
        case "int":
            return int(value)
        case "int-or-string":
            parts = dict(_fields(value))
            return parts.get(3, b"").decode() if parts.get(1) else parts.get(2, 0)
        case _:
            return _message(value, kind)

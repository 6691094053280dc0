"""Names, labels and annotations: the syntax rules of k8s.io/apimachinery's `validation`, with its sentences."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from meshlight.kube import field_errors as faults
from meshlight.kube.resources import Object
from meshlight.kube.status import Cause

_LABEL_PATTERN = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN_PATTERN = rf"{_LABEL_PATTERN}(\.{_LABEL_PATTERN})*"
_DNS1035_PATTERN = "[a-z]([-a-z0-9]*[a-z0-9])?"
_QUALIFIED_PATTERN = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_KEY_PATTERN = "[-._a-zA-Z0-9]+"

_LABEL = re.compile(_LABEL_PATTERN)
_SUBDOMAIN = re.compile(_SUBDOMAIN_PATTERN)
_DNS1035 = re.compile(_DNS1035_PATTERN)
_QUALIFIED = re.compile(_QUALIFIED_PATTERN)
_KEY = re.compile(_KEY_PATTERN)
_PORT_NAME = re.compile(r"[-a-z0-9]+")

MAX_ANNOTATIONS = 256 * 1024
"""Bytes of all annotations of an object together."""


def _too_long(limit: int) -> str:
    return f"must be no more than {limit} characters"


def _regex(message: str, pattern: str, *examples: str) -> str:
    shown = ",  or ".join(f"'{e}'" for e in examples)
    return f"{message} (e.g. {shown}, regex used for validation is '{pattern}')"


@functools.lru_cache(maxsize=4096)
def subdomain(name: str) -> str:
    """What is wrong with an RFC 1123 subdomain; empty if nothing."""
    if len(name) > 253:
        return _too_long(253)
    if _SUBDOMAIN.fullmatch(name):
        return ""
    return _regex(
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', "
        "and must start and end with an alphanumeric character",
        _SUBDOMAIN_PATTERN,
        "example.com",
    )


@functools.lru_cache(maxsize=4096)
def label(name: str) -> str:
    """What is wrong with an RFC 1123 label; empty if nothing."""
    if len(name) > 63:
        return _too_long(63)
    if _LABEL.fullmatch(name):
        return ""
    return _regex(
        "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', "
        "and must start and end with an alphanumeric character",
        _LABEL_PATTERN,
        "my-name",
        "123-abc",
    )


def dns1035(name: str) -> str:
    """What is wrong with a DNS-1035 label (a Service's name); empty if nothing."""
    if len(name) > 63:
        return _too_long(63)
    if _DNS1035.fullmatch(name):
        return ""
    return _regex(
        "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an "
        "alphabetic character, and end with an alphanumeric character",
        _DNS1035_PATTERN,
        "my-name",
        "abc-123",
    )


def path_segment(name: str) -> str:
    """What is wrong with a name that need only fit in a path (RBAC); empty if nothing."""
    if name in (".", ".."):
        return f"may not be '{name}'"
    for character in "/%":
        if character in name:
            return f"may not contain '{character}'"
    return ""


@functools.lru_cache(maxsize=4096)
def qualified(name: str) -> tuple[str, ...]:
    """What is wrong with a qualified name (`prefix/name`), as label keys are."""
    kind = _regex(
        "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an "
        "alphanumeric character",
        _QUALIFIED_PATTERN,
        "MyName",
        "my.name",
        "123-abc",
    )
    parts = name.split("/")
    if len(parts) > 2:
        return (
            f"a qualified name {kind} with an optional DNS subdomain prefix and '/' "
            "(e.g. 'example.com/MyName')",
        )
    found = []
    if len(parts) == 2:
        if not parts[0]:
            found.append("prefix part must be non-empty")
        elif message := subdomain(parts[0]):
            found.append("prefix part " + message)
    if not parts[-1]:
        found.append("name part must be non-empty")
    elif len(parts[-1]) > 63:
        found.append("name part " + _too_long(63))
    if not _QUALIFIED.fullmatch(parts[-1]):
        found.append("name part " + kind)
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def label_value(value: str) -> str:
    """What is wrong with a label's value; empty if nothing."""
    if len(value) > 63:
        return _too_long(63)
    if not value or _QUALIFIED.fullmatch(value):
        return ""
    return _regex(
        "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', "
        "and must start and end with an alphanumeric character",
        f"({_QUALIFIED_PATTERN})?",
        "MyValue",
        "my_value",
        "12345",
    )


def config_key(key: str) -> str:
    """What is wrong with a key of a ConfigMap or Secret; empty if nothing."""
    if len(key) > 253:
        return _too_long(253)
    if key == "." or key.startswith(".."):
        return f"must not be '.' or start with '..': {key}"
    if _KEY.fullmatch(key):
        return ""
    return _regex(
        "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
        _KEY_PATTERN,
        "key.name",
        "KEY_NAME",
        "key-name",
    )


def port_name(name: str) -> str:
    """What is wrong with a port's name (an IANA service name); empty if nothing."""
    if len(name) > 15:
        return _too_long(15)
    if not _PORT_NAME.fullmatch(name):
        return "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
    if not re.search("[a-z]", name):
        return "must contain at least one letter (a-z)"
    if "--" in name:
        return "must not contain consecutive hyphens"
    if name[0] == "-" or name[-1] == "-":
        return "must not begin or end with a hyphen"
    return ""


def labels(found: Any, path: str) -> list[Cause]:
    """Faults of a map of labels."""
    causes = []
    for key, value in (found or {}).items():
        causes += [faults.invalid_value(path, key, message) for message in qualified(key)]
        if message := label_value(value):
            causes.append(faults.invalid_value(path, value, message))
    return causes


def selector(found: Any, path: str) -> list[Cause]:
    """Faults of a LabelSelector."""
    causes = labels((found or {}).get("matchLabels"), f"{path}.matchLabels")
    for index, rule in enumerate((found or {}).get("matchExpressions") or ()):
        at = f"{path}.matchExpressions[{index}]"
        operator, values = rule.get("operator"), rule.get("values") or []
        if operator in ("In", "NotIn"):
            if not values:
                detail = "must be specified when `operator` is 'In' or 'NotIn'"
                causes.append(faults.required(f"{at}.values", detail))
        elif operator in ("Exists", "DoesNotExist"):
            if values:
                detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'"
                causes.append(faults.forbidden(f"{at}.values", detail))
        else:
            causes.append(
                faults.invalid_value(f"{at}.operator", operator or "", "not a valid selector operator")
            )
        causes += [
            faults.invalid_value(f"{at}.key", rule.get("key"), m) for m in qualified(rule.get("key") or "")
        ]
    return causes


_NAME_RULES: dict[str, Callable[[str], str]] = {
    "Service": dns1035, "Namespace": label,
    "Role": path_segment, "RoleBinding": path_segment, "ClusterRole": path_segment,
    "ClusterRoleBinding": path_segment,
}  # fmt: skip


def metadata(obj: Object) -> list[Cause]:
    """Faults of an object's name, labels, annotations and owners."""
    found = obj["metadata"]
    name = found.get("name") or ""
    causes: list[Cause] = []
    if not name:
        causes.append(faults.required("metadata.name", "name or generateName is required"))
    elif message := _NAME_RULES.get(obj["kind"], subdomain)(name):
        causes.append(faults.invalid_value("metadata.name", name, message))
    causes += labels(found.get("labels"), "metadata.labels")
    annotations = found.get("annotations") or {}
    for key in annotations:
        causes += [faults.invalid_value("metadata.annotations", key, m) for m in qualified(key.lower())]
    if sum(len(k) + len(v) for k, v in annotations.items()) > MAX_ANNOTATIONS:
        causes.append(faults.too_long("metadata.annotations", MAX_ANNOTATIONS))
    owners = found.get("ownerReferences") or []
    for index, owner in enumerate(owners):
        for member in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(member):
                detail = f"{member} must not be empty"
                causes.append(faults.invalid_value(f"metadata.ownerReferences[{index}].{member}", "", detail))
    if sum(bool(owner.get("controller")) for owner in owners) > 1:
        detail = "Only one reference can have Controller set to true"
        causes.append(faults.invalid_value("metadata.ownerReferences", owners, detail))
    return causes

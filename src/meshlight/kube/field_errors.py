"""Faults of single fields, in the words of k8s.io/apimachinery's `field.Error`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from meshlight.kube.status import Cause


def go_value(value: Any) -> str:
    """A value as Kubernetes prints it in a sentence: strings quoted, string maps in Go's syntax."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        members = ", ".join(f"{_quoted(k)}:{_quoted(v)}" for k, v in sorted(value.items()))
        return f"map[string]string{{{members}}}"
    return orjson.dumps(value).decode()


def _quoted(text: str) -> str:
    return orjson.dumps(text).decode()


def required(path: str, detail: str = "") -> Cause:
    """The field must be given."""
    return Cause(path, "FieldValueRequired", "Required value" + (f": {detail}" if detail else ""))


def invalid_value(path: str, value: Any, detail: str) -> Cause:
    """The value is not allowed."""
    return Cause(path, "FieldValueInvalid", f"Invalid value: {go_value(value)}: {detail}")


def wrong_type(path: str, found: str, expected: str) -> Cause:
    """The value has another JSON type than the field."""
    message = f'Invalid value: "{found}": {path} in body must be of type {expected}: "{found}"'
    return Cause(path, "FieldValueTypeInvalid", message)


def not_supported(path: str, value: Any, supported: Iterable[Any]) -> Cause:
    """The value is not among those that an enum lists."""
    listed = ", ".join(go_value(v) for v in supported)
    message = f"Unsupported value: {go_value(value)}: supported values: {listed}"
    return Cause(path, "FieldValueNotSupported", message)


def duplicate(path: str, value: Any) -> Cause:
    """A list's key or value occurs twice."""
    return Cause(path, "FieldValueDuplicate", f"Duplicate value: {go_value(value)}")


def forbidden(path: str, detail: str) -> Cause:
    """The field may not be given, or not changed."""
    return Cause(path, "FieldValueForbidden", f"Forbidden: {detail}")


def missing_reference(path: str, value: Any) -> Cause:
    """The value names something that is not there."""
    return Cause(path, "FieldValueNotFound", f"Not found: {go_value(value)}")


def too_long(path: str, limit: int, unit: str = "bytes") -> Cause:
    """More bytes than allowed."""
    return Cause(path, "FieldValueTooLong", f"Too long: may not be more than {limit} {unit}")


def too_many(path: str, count: int, limit: int) -> Cause:
    """More elements than allowed."""
    return Cause(path, "FieldValueTooMany", f"Too many: {count}: must have at most {limit} items")

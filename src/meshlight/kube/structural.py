"""Defaults and value validation by schema, in the words of Kubernetes' structural schemas.

Serves custom resources whole; of built-in kinds the defaults, required fields and enums.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import ipaddress
import math
import re
from typing import Any

import orjson

from meshlight.kube import field_errors as faults
from meshlight.kube import patterns
from meshlight.kube.resources import Object
from meshlight.kube.schema import UNSET, Schema
from meshlight.kube.status import Cause

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "object": (dict,),
    "array": (list,),
}  # fmt: skip
_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}


def join(path: str, name: str) -> str:
    """The path of a field of the value at `path`."""
    return f"{path}.{name}" if path else name


def apply_defaults(value: Any, schema: Schema) -> None:
    """Fill in, in place, every default of the schema below values that exist."""
    if isinstance(value, dict):
        for name, below in schema.default_plan():
            child = value.get(name)
            if child is None and below.default is not UNSET and not (below.nullable and name in value):
                child = value[name] = _fresh(below.default)
            if child is not None and below.defaulted():
                apply_defaults(child, below)
        if schema.values is not None and schema.values.defaulted():
            for child in value.values():
                apply_defaults(child, schema.values)
    elif isinstance(value, list) and schema.items is not None and schema.items.defaulted():
        for element in value:
            apply_defaults(element, schema.items)


def _fresh(default: Any) -> Any:
    return orjson.loads(orjson.dumps(default)) if isinstance(default, (dict, list)) else default


def omissions(value: Any, schema: Schema, path: str = "") -> list[Cause]:
    """Required fields that are missing or empty, and values outside enums, of a built-in kind.

    The value has been decoded: its types are right.
    """
    causes: list[Cause] = []
    if isinstance(value, dict):
        for name in schema.required:
            if value.get(name) in (None, "") and schema.properties[name].default is UNSET:
                causes.append(faults.required(join(path, name)))
        for name, child in value.items():
            below = schema.properties.get(name) or schema.values
            if below is None:
                continue
            if below.enum:
                if child not in below.enum and child != "":
                    causes.append(faults.not_supported(join(path, name), child, sorted(below.enum)))
            elif (type(child) is dict or type(child) is list) and child:
                causes += omissions(child, below, join(path, name))
    elif schema.items is not None and schema.items.type == "object":
        for index, element in enumerate(value):
            causes += omissions(element, schema.items, f"{path}[{index}]")
    return causes


def validate(value: Any, schema: Schema, path: str = "") -> list[Cause]:
    """Faults of a custom resource's value against its schema."""
    if value is None:
        if schema.nullable or not schema.type:
            return []
        return [faults.wrong_type(path, "null", schema.type)]
    if schema.format == "int-or-string" and not schema.type:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            return [faults.wrong_type(path, _NAMES[type(value)], "integer,string")]
    elif schema.type and not _fits(value, schema.type):
        return [faults.wrong_type(path, _NAMES[type(value)], schema.type)]
    causes: list[Cause] = []
    if schema.enum and value not in schema.enum:
        causes.append(faults.not_supported(path, value, schema.enum))
    if schema.constraints:
        causes += _constraints(value, schema, path)
    if isinstance(value, dict):
        causes += _members(value, schema, path)
    elif isinstance(value, list):
        causes += _elements(value, schema, path)
    return causes


def _fits(value: Any, kind: str) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind]) and (kind == "boolean") is isinstance(value, bool)


def _members(value: Object, schema: Schema, path: str) -> list[Cause]:
    causes = [faults.required(join(path, name)) for name in schema.required if name not in value]
    for name, child in value.items():
        below = schema.properties.get(name) or schema.values
        if below is None or (not path and name == "metadata"):
            continue
        if child is None and not below.nullable:
            continue  # nulls that nothing replaced are as good as absent
        causes += validate(child, below, join(path, name))
    return causes


def _elements(value: list[Any], schema: Schema, path: str) -> list[Cause]:
    causes: list[Cause] = []
    seen = set()
    for index, element in enumerate(value):
        at = f"{path}[{index}]"
        if schema.items is not None:
            causes += validate(element, schema.items, at)
        if schema.list_type == "map" and isinstance(element, dict):
            key: Any = {k: element[k] for k in schema.list_keys if k in element}
        elif schema.list_type == "set":
            key = element
        else:
            continue
        encoded = orjson.dumps(key, option=orjson.OPT_SORT_KEYS)
        if encoded in seen:
            message = f"Duplicate value: {encoded.decode()}"
            causes.append(Cause(at, "FieldValueDuplicate", message))
        seen.add(encoded)
    return causes


def _constraints(value: Any, schema: Schema, path: str) -> list[Cause]:
    causes: list[Cause] = []
    limits = schema.constraints

    def should(detail: str) -> None:
        causes.append(faults.invalid_value(path, value, f"{path} in body should {detail}"))

    if isinstance(value, str):
        if len(value) > limits.get("maxLength", len(value)):
            causes.append(faults.too_long(path, limits["maxLength"]))
        if len(value) < limits.get("minLength", 0):
            should(f"be at least {limits['minLength']} chars long")
        if "pattern" in limits and not _matches(limits["pattern"], value):
            should(f"match '{limits['pattern']}'")
        if "format" in limits and not _formatted(limits["format"], value):
            detail = f'{path} in body must be of type {limits["format"]}: "{value}"'
            causes.append(faults.invalid_value(path, value, detail))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        for detail in _beyond(value, limits):
            should(detail)
    elif isinstance(value, list):
        if len(value) > limits.get("maxItems", len(value)):
            causes.append(faults.too_many(path, len(value), limits["maxItems"]))
        if len(value) < limits.get("minItems", 0):
            should(f"have at least {limits['minItems']} items")
        if limits.get("uniqueItems") and len({orjson.dumps(v) for v in value}) < len(value):
            causes.append(faults.invalid_value(path, value, f"{path} in body shouldn't contain duplicates"))
    elif isinstance(value, dict):
        if len(value) > limits.get("maxProperties", len(value)):
            causes.append(faults.too_many(path, len(value), limits["maxProperties"]))
        if len(value) < limits.get("minProperties", 0):
            should(f"have at least {limits['minProperties']} properties")
    return causes + _logic(value, limits, path)


def _beyond(value: float, limits: Object) -> list[str]:
    found = []
    if "maximum" in limits:
        top, exclusive = limits["maximum"], limits.get("exclusiveMaximum")
        if value > top or (exclusive and value == top):
            found.append(f"be less than {'' if exclusive else 'or equal to '}{top}")
    if "minimum" in limits:
        bottom, exclusive = limits["minimum"], limits.get("exclusiveMinimum")
        if value < bottom or (exclusive and value == bottom):
            found.append(f"be greater than {'' if exclusive else 'or equal to '}{bottom}")
    step = limits.get("multipleOf")
    if step and not math.isclose(value / step, round(value / step), abs_tol=1e-9):
        found.append(f"be a multiple of {step}")
    return found


def _logic(value: Any, limits: Object, path: str) -> list[Cause]:
    causes: list[Cause] = []

    def must(detail: str) -> None:
        causes.append(Cause(path, "FieldValueInvalid", f'Invalid value: "": "{path}" must {detail}'))

    for schema in limits.get("allOf") or ():
        causes += validate(value, schema, path)
    if "anyOf" in limits and all(validate(value, schema, path) for schema in limits["anyOf"]):
        must("validate at least one schema (anyOf)")
    if "oneOf" in limits:
        valid = sum(not validate(value, schema, path) for schema in limits["oneOf"])
        if valid != 1:
            found = "none valid" if not valid else f"{valid} valid alternatives"
            must(f"validate one and only one schema (oneOf). Found {found}")
    if "not" in limits and not validate(value, limits["not"], path):
        must("not validate the schema (not)")
    return causes


def _matches(pattern: str, value: str) -> bool:
    try:
        return patterns.compiled(pattern).search(value) is not None
    except patterns.PatternError:
        return True  # a definition with such a pattern is refused; one from before that rule stays usable


def _formatted(form: str, value: str) -> bool:
    """Whether a string has the format; formats Kubernetes does not know either are not checked."""
    try:
        match form:
            case "date-time":
                datetime.datetime.fromisoformat(value)
                return "T" in value.upper()
            case "date":
                datetime.date.fromisoformat(value)
            case "byte":
                base64.b64decode(value, validate=True)
            case "ipv4":
                ipaddress.IPv4Address(value)
            case "ipv6":
                ipaddress.IPv6Address(value)
            case "cidr":
                ipaddress.ip_network(value, strict=False)
            case "uuid":
                return re.fullmatch(r"(?i)[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}", value) is not None
            case "email":
                return re.fullmatch(r"[^@\s]+@[^@\s]+", value) is not None
            case "hostname":
                return len(value) <= 253 and all(
                    re.fullmatch(r"(?i)[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", part) for part in value.split(".")
                )
    except (ValueError, binascii.Error):
        return False
    return True

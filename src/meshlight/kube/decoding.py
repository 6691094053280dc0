"""Reading a body as an object of its kind, as Kubernetes' decoder does.

Undeclared fields are dropped and reported, nulls and empty maps and lists of built-in kinds are dropped,
quantities become canonical, and a value of a wrong JSON type refuses the request with Go's words for it
(custom resources get theirs from `structural`). Works in place and visits each value once.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any

from meshlight.kube import quantity
from meshlight.kube.resources import Object
from meshlight.kube.schema import Schema
from meshlight.kube.status import StatusError, bad_request

_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")
_JSON_NAMES = {str: "string", bool: "bool", int: "number", float: "number", dict: "object", list: "array"}
_GO_TYPES = {"string": "string", "boolean": "bool", "number": "float64"}
_OWN_PARSER = ("quantity", "int-or-string", "date-time", "micro-time")

Path = tuple[Any, Any] | None
"""Where a value is: (path of what holds it, field name or index); None is the object itself."""


class _WrongType(Exception):
    """A value does not fit its field.

    The message is the decoder's; with `at` and `schema`, the field's place and type complete it.
    """

    def __init__(self, message: str, at: Path = None, schema: Schema | None = None) -> None:
        super().__init__(message)
        self.at = at
        self.schema = schema

    def sentence(self, root: Schema) -> str:
        """The message as Go's decoder of the object at `root` has it."""
        if self.schema is None:
            return str(self)
        return f"{self} into Go struct field {_go_field(self.at, root)} of type {_go(self.schema)}"


def shown(path: Path) -> str:
    """`spec.containers[0].image`."""
    if path is None:
        return ""
    parent, step = path
    before = shown(parent)
    if isinstance(step, int):
        return f"{before}[{step}]"
    return f"{before}.{step}" if before else step


def decode(obj: Object, schema: Schema, *, kind: str, version: str) -> list[str]:
    """Make `obj` an exact object of a built-in kind; returns the paths of the fields dropped.

    Raises StatusError 400 on a value of a wrong type.
    """
    unknown: list[str] = []
    try:
        _object(obj, schema, None, unknown)
    except _WrongType as error:
        sentence = error.sentence(schema)
        message = f'{kind} in version "{version}" cannot be handled as a {kind}: {sentence}'
        raise StatusError(400, "BadRequest", message) from None
    return unknown


def _object(value: Object, schema: Schema, at: Path, unknown: list[str]) -> None:
    properties, values = schema.properties, schema.values
    gone: list[str] | None = None
    for name, child in value.items():
        below = properties.get(name) or values
        if below is None:
            if schema.open:
                continue
            unknown.append(shown((at, name)))
        elif child is not None and (child or not _omitted(child, below)):
            kind = type(child)
            if kind is str and below.type == "string" and not below.format:
                continue
            if kind is dict and below.type == "object":
                _object(child, below, (at, name), unknown)
            elif kind is list and below.type == "array":
                _array(child, below, (at, name), unknown)
            else:
                value[name] = _scalar(child, below, (at, name))
            continue
        gone = gone or []
        gone.append(name)
    for name in gone or ():
        del value[name]


def _omitted(empty: Any, schema: Schema) -> bool:
    """Whether a field is left out when empty: Go writes no empty maps and lists (`omitempty`)."""
    if schema.inline:
        return False
    return (empty == {} and schema.values is not None) or (empty == [] and schema.items is not None)


def _array(value: list[Any], schema: Schema, at: Path, unknown: list[str]) -> None:
    items = schema.items
    assert items is not None, "a list's schema has items"
    if items.type == "string" and not items.format and all(type(v) is str for v in value):
        return
    for index, element in enumerate(value):
        if type(element) is dict and items.type == "object":
            _object(element, items, (at, index), unknown)
        elif element is None:
            value[index] = {} if items.type == "object" else _zero(items)
        else:
            value[index] = _scalar(element, items, (at, index))


def _zero(schema: Schema) -> Any:
    return {"string": "", "boolean": False, "integer": 0, "number": 0}.get(schema.type)


def _scalar(value: Any, schema: Schema, at: Path) -> Any:
    """The value as stored. Raises _WrongType."""
    kind = type(value)
    match schema.type:
        case "integer" if kind is int:
            bits = 31 if schema.format == "int32" else 63
            if -(1 << bits) <= value < 1 << bits:
                return value
        case "boolean" if kind is bool:
            return value
        case "number" if kind in (int, float):
            return value
        case "" if schema.format == "int-or-string":
            if kind is str or kind is int:
                return value
        case "":
            return value
        case "string" if kind is str:
            return _formatted(value, schema.format)
        case "string" if schema.format == "quantity" and kind in (int, float):
            return _formatted(str(value), schema.format)
    found = _JSON_NAMES[kind]
    if found == "number" and schema.type == "integer":
        found = f"number {value}"
    if schema.format in _OWN_PARSER:
        raise _WrongType(f"json: cannot unmarshal {found} into Go value of type {_go(schema)}")
    raise _WrongType(f"json: cannot unmarshal {found}", at, schema)


def _formatted(value: str, form: str) -> str:
    match form:
        case "quantity":
            try:
                return quantity.canonical(value)
            except quantity.QuantityError as error:
                raise _WrongType(str(error)) from error
        case "byte":
            try:
                base64.b64decode(value, validate=True)
            except binascii.Error:
                good = re.match(r"[A-Za-z0-9+/]*", value)
                at = len(good[0]) if good else 0
                raise _WrongType(f"illegal base64 data at input byte {at}") from None
        case "date-time" | "micro-time":
            if not _TIME.fullmatch(value):
                layout = (
                    "2006-01-02T15:04:05Z07:00" if form == "date-time" else "2006-01-02T15:04:05.000000Z07:00"
                )
                raise _WrongType(f'parsing time "{value}" as "{layout}": cannot parse "{value}" as "2006"')
    return value


def _go_field(at: Path, root: Schema) -> str:
    """`EnvVar.spec.containers.env.value`: the struct, then the path without indices and map keys."""
    steps: list[str | int] = []
    while at is not None:
        at, step = at
        steps.append(step)
    struct, names, node = root.name, [], root
    for step in reversed(steps):
        if isinstance(step, str) and step in node.properties:
            struct = node.name or struct
            names.append(step)
            node = node.properties[step]
        else:
            node = (node.items if isinstance(step, int) else node.values) or node
    return ".".join([struct, *names])


def _go(schema: Schema) -> str:
    """The type as Go names it."""
    match schema.format:
        case "quantity":
            return "resource.Quantity"
        case "int-or-string":
            return "intstr.IntOrString"
        case "date-time" | "micro-time":
            return "string"
        case "byte":
            return "[]uint8"
    if schema.type == "array" and schema.items is not None:
        return "[]" + _go(schema.items)
    if schema.type == "object":
        if schema.values is not None:
            return "map[string]" + _go(schema.values)
        return f"v1.{schema.name}" if schema.name else "map[string]interface {}"
    return schema.format if schema.type == "integer" else _GO_TYPES.get(schema.type, schema.type)


def prune(obj: Object, schema: Schema, metadata_kind: str = "") -> list[str]:
    """Drop from a custom resource what its schema does not declare; returns the paths dropped."""
    unknown: list[str] = []
    metadata = obj.get("metadata")
    if isinstance(metadata, dict):
        try:
            _object(metadata, schema.properties["metadata"], (None, "metadata"), unknown)
        except _WrongType as error:
            sentence = error.sentence(schema)
            raise bad_request(f"{metadata_kind or 'the object'} cannot be handled: {sentence}") from None
    _prune(obj, schema, None, unknown)
    return unknown


def _prune(value: Any, schema: Schema, at: Path, unknown: list[str]) -> None:
    if isinstance(value, dict):
        gone = []
        for name, child in value.items():
            if (at is None or schema.embedded) and name in ("apiVersion", "kind", "metadata"):
                continue
            below = schema.properties.get(name) or schema.values
            if below is not None:
                if isinstance(child, (dict, list)):
                    _prune(child, below, (at, name), unknown)
            elif not schema.open:
                unknown.append(shown((at, name)))
                gone.append(name)
        for name in gone:
            del value[name]
    elif isinstance(value, list) and schema.items is not None:
        for index, element in enumerate(value):
            if isinstance(element, (dict, list)):
                _prune(element, schema.items, (at, index), unknown)


def duplicates(raw: bytes) -> list[str]:
    """Paths of the fields that a JSON text gives twice (parsers keep the last)."""
    found: list[str] = []

    def pairs(members: list[tuple[str, Any]]) -> Object:
        value: Object = dict(members)
        if len(value) != len(members):
            names = [name for name, _ in members]
            value[_TWICE] = [name for name in value if names.count(name) > 1]
        return value

    def walk(value: Any, at: Path) -> None:
        if isinstance(value, dict):
            found.extend(shown((at, name)) for name in value.get(_TWICE) or ())
            for name, child in value.items():
                walk(child, (at, name))
        elif isinstance(value, list):
            for index, child in enumerate(value):
                walk(child, (at, index))

    walk(json.loads(raw, object_pairs_hook=pairs), None)
    return found


_TWICE: Any = object()

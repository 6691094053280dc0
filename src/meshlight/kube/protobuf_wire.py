"""Decode the protobuf bodies that client-go and kubectl send for built-in kinds.

Driven by the kinds' schemas and by `schemas/protobuf.numbers`, so every built-in kind is understood.
Answers are JSON, which every client of Kubernetes accepts.
"""

from __future__ import annotations

import base64
import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import orjson

from meshlight.kube import schema_language
from meshlight.kube.resources import Object
from meshlight.kube.schema import Schema

MAGIC = b"k8s\0"
MAX_DEPTH = 100
"""Messages within messages; JSONSchemaProps is recursive."""


@dataclass(slots=True)
class _Field:
    """One field of a message: where it goes in the object; `inner` for a message that JSON inlines."""

    name: str = ""
    schema: Schema | None = None
    pointer: bool = False
    required: bool = False
    inner: dict[int, _Field] = field(default_factory=dict)


@functools.cache
def _numbers() -> dict[str, str]:
    text = (resources.files("meshlight.kube") / "schemas" / "protobuf.numbers").read_text()
    lines = (line.partition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: fields for name, _, fields in lines}


@functools.lru_cache(maxsize=512)
def _message(name: str) -> dict[int, _Field]:
    """The fields of a built-in type by number; empty for a type that no client sends."""
    schema = schema_language.builtin().types[name]
    return _parse(_numbers().get(name, ""), schema, " ")


def numbers(name: str) -> set[str]:
    """The fields of a built-in type that have a number."""
    found: set[str] = set()
    waiting = list(_message(name).values())
    while waiting:
        known = waiting.pop()
        waiting += known.inner.values()
        found |= {known.name} - {""}
    return found


def _parse(text: str, schema: Schema, separator: str) -> dict[int, _Field]:
    found = {}
    for part in _split(text, separator):
        if part.endswith(")"):
            number, _, inner = part[:-1].partition("(")
            found[int(number)] = _Field(inner=_parse(inner, schema, ","))
            continue
        left, _, number = part.partition("=")
        name = left.rstrip("*")
        below = schema.properties[name]
        found[int(number)] = _Field(name, below, left.endswith("*"), name in schema.required)
    return found


def _split(text: str, separator: str) -> Iterator[str]:
    """The parts of a list, whose parentheses nest."""
    depth, start = 0, 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == separator and not depth:
            yield text[start:position]
            start = position + 1
    if text[start:]:
        yield text[start:]


def decode(body: bytes) -> Object:
    """The object in a `k8s\\0`-prefixed `runtime.Unknown`. Raises ValueError naming what is unknown."""
    if not body.startswith(MAGIC):
        raise ValueError("the body is not Kubernetes protobuf")
    api_version, kind, raw = "", "", b""
    for number, value in _fields(body[len(MAGIC) :]):
        if number == 1:
            type_meta = dict(_fields(value))
            api_version, kind = type_meta.get(1, b"").decode(), type_meta.get(2, b"").decode()
        elif number == 2:
            raw = value
    schema = _kind(api_version, kind)
    if schema is None or not schema.name:
        raise ValueError(f"protobuf bodies of kind {kind!r} of {api_version!r} are not understood; send JSON")
    return {"apiVersion": api_version, "kind": kind, **_object(raw, _message(schema.name), 0)}


def _kind(api_version: str, kind: str) -> Schema | None:
    package = schema_language.builtin()
    if kind == "DeleteOptions":  # sent under the group of what is deleted
        return package.types[kind]
    return package.kinds.get((api_version, kind))


def _fields(body: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(body):
        tag, position = _varint(body, position)
        value: Any
        match tag & 7:
            case 0:
                value, position = _varint(body, position)
            case 2:
                length, position = _varint(body, position)
                if position + length > len(body):
                    raise ValueError("truncated protobuf")
                value = body[position : position + length]
                position += length
            case 1 | 5 as wire:
                size = 8 if wire == 1 else 4
                value = body[position : position + size]
                position += size
            case wire:
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


def _object(body: bytes, shape: dict[int, _Field], depth: int) -> Object:
    if depth > MAX_DEPTH:
        raise ValueError(f"messages nest deeper than {MAX_DEPTH}")
    result: Object = {}
    for number, value in _fields(body):
        found = shape.get(number)
        if found is None:
            continue
        schema = found.schema
        if schema is None:
            result.update(_object(value, found.inner, depth + 1))
        elif schema.type == "array" and schema.items is not None:
            result.setdefault(found.name, []).append(_value(value, schema.items, depth))
        elif schema.values is not None:
            entry = dict(_fields(value))
            key = entry.get(1, b"").decode()
            below = schema.values
            result.setdefault(found.name, {})[key] = _value(entry.get(2, b""), below, depth)
        else:
            read = _value(value, schema, depth)
            # Go writes every field that is no pointer; zero is what JSON leaves out.
            if read is None or (read in ("", 0, False) and not found.pointer and not found.required):
                continue
            result[found.name] = read
    return result


def _value(value: Any, schema: Schema, depth: int) -> Any:
    match schema.type, schema.format:
        case "string", "byte":
            return base64.b64encode(value).decode()
        case "string", "quantity":
            return dict(_fields(value)).get(1, b"").decode()
        case "string", "date-time" | "micro-time":
            return _time(value, micro=schema.format == "micro-time")
        case "string", _:
            return value.decode()
        case "boolean", _:
            return bool(value)
        case "integer", _:
            return value - (1 << 64) if value >> 63 else value
        case "number", _:
            return struct.unpack("<d", value)[0]
        case "", "int-or-string":
            parts = dict(_fields(value))
            number = parts.get(2, 0)
            return parts.get(3, b"").decode() if parts.get(1) else number - (1 << 64) * (number >> 63)
    if schema.name:
        return _object(value, _message(schema.name), depth + 1)
    return _opaque(value)


def _time(value: bytes, *, micro: bool) -> str | None:
    parts = dict(_fields(value))
    if 1 not in parts:
        return None
    seconds = parts[1] - (1 << 64) * (parts[1] >> 63)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=parts.get(2, 0) // 1000 if micro else 0)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")


def _opaque(value: bytes) -> Any:
    """A JSON text within protobuf (RawExtension, JSON, FieldsV1), or a list of strings (ExtraValue)."""
    items = [v for n, v in _fields(value) if n == 1]
    try:
        return orjson.loads(items[0]) if items else {}
    except ValueError:
        try:
            return [item.decode() for item in items]
        except (AttributeError, UnicodeDecodeError):
            raise ValueError("a field in the body is understood in JSON alone; send JSON") from None

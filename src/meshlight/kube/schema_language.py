"""The schemas of built-in kinds, written in `schemas/*.txt` and read at first use.

A file is a list of types, each a header and indented fields:

    package io.k8s.api.core.v1          the Go package; its last part prefixes types in messages
    TypeName: description
    Kind @group/version: description    a kind: has apiVersion, kind and metadata as well
    Name @group/version=Kind: …         another version of a kind, whose type needs a name of its own
      field type modifiers -- description
      field! type                       required

Types: string int32 int64 bool number Time MicroTime Quantity IntOrString bytes any raw, a type's name,
`[T]` a list, `{T}` a map. Modifiers: `=JSON` the default; `in(A,B)` an enum; `key(a,b)` a list merged
by keys (also the strategic merge key, the first); `merge(a)` a strategic merge key alone; `set` a list
merged as a set; `atomic` a map or struct replaced whole; `retain` the strategy retainKeys;
`inline` a struct or list that Go types hold by value.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from importlib import resources

import orjson

from meshlight.kube.schema import Schema

_SCALARS = {
    "string": ("string", ""), "int32": ("integer", "int32"), "int64": ("integer", "int64"),
    "bool": ("boolean", ""), "number": ("number", "double"), "bytes": ("string", "byte"),
    "Time": ("string", "date-time"), "MicroTime": ("string", "micro-time"),
    "Quantity": ("string", "quantity"), "IntOrString": ("", "int-or-string"), "any": ("", ""),
    "raw": ("object", ""),
}  # fmt: skip
_HEADER = re.compile(r"(?P<name>\w+)(?: @(?P<version>[^\s=]+?)(?:=(?P<kind>\w+))?)?:\s*(?P<description>.*)")
_FIELD = re.compile(r"(?P<name>[$\w-]+)(?P<required>!?)\s+(?P<type>[\[{]*\w+[\]}]*)(?P<rest>.*)")
_MODIFIER = re.compile(r"=(?P<default>\S+)|(?P<word>\w+)(?:\((?P<arguments>[^)]*)\))?")


class SchemaTextError(ValueError):
    """A line of a schema file does not follow the language; names file and line."""


@dataclass(frozen=True, slots=True)
class Package:
    """All built-in types: by name, the OpenAPI name of each, and the kinds by (apiVersion, kind)."""

    types: dict[str, Schema]
    openapi_names: dict[str, str]
    kinds: dict[tuple[str, str], Schema]


@functools.cache
def builtin() -> Package:
    """Every built-in type. Read once; about ten milliseconds."""
    folder = resources.files("meshlight.kube") / "schemas"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    return parse([(f.name, f.read_text()) for f in files])


def parse(files: list[tuple[str, str]]) -> Package:
    """Types of several (name, text) files, which may refer to one another. Raises SchemaTextError."""
    package = Package({}, {}, {})
    fields: list[tuple[str, int, Schema, str]] = []
    for file, text in files:
        prefix, current = "", None
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            if line.startswith("package "):
                prefix = line.split()[1]
            elif line.startswith(" "):
                if current is None:
                    raise SchemaTextError(f"{file}:{number}: a field before any type")
                fields.append((file, number, current, line.strip()))
            elif match := _HEADER.fullmatch(line):
                current = _type(package, prefix, match)
            else:
                raise SchemaTextError(f"{file}:{number}: not a type header: {line!r}")
    for file, number, owner, line in fields:
        try:
            _field(package, owner, line)
        except (KeyError, ValueError) as error:
            raise SchemaTextError(f"{file}:{number}: {error} in {line!r}") from error
    return package


def _type(package: Package, prefix: str, match: re.Match[str]) -> Schema:
    name = match["name"]
    if name in package.types:
        raise SchemaTextError(f"type {name} is declared twice")
    schema = Schema(type="object", name=name, description=match["description"])
    package.types[name] = schema
    kind = match["kind"] or name
    package.openapi_names[name] = f"{prefix}.{kind}"
    if match["version"]:
        package.kinds[match["version"], kind] = schema
        text = Schema(type="string")
        schema.properties["apiVersion"] = replace(text, description=(
            "APIVersion defines the versioned schema of this representation of an object."))  # fmt: skip
        schema.properties["kind"] = replace(text, description=(
            "Kind is the REST resource this object represents, in CamelCase."))  # fmt: skip
    return schema


def _field(package: Package, owner: Schema, line: str) -> None:
    text, _, description = line.partition(" -- ")
    match = _FIELD.fullmatch(text.strip())
    if match is None:
        raise ValueError("not a field")
    schema = _reference(package, match["type"])
    schema.description = description.strip()
    for modifier in _MODIFIER.finditer(match["rest"]):
        _modify(schema, modifier)
    if match["required"]:
        owner.required.append(match["name"])
    owner.properties[match["name"]] = schema


def _reference(package: Package, text: str) -> Schema:
    """A fresh node for a use of a type; structs share their (perhaps still empty) properties."""
    if text[0] == "[":
        return Schema(type="array", items=_reference(package, text[1:-1]))
    if text[0] == "{":
        return Schema(type="object", values=_reference(package, text[1:-1]))
    if text in _SCALARS:
        kind, form = _SCALARS[text]
        return Schema(type=kind, format=form, open=text in ("any", "raw"))
    named = package.types[text]
    return replace(named, description="")


def _modify(schema: Schema, modifier: re.Match[str]) -> None:
    if modifier["default"]:
        schema.default = orjson.loads(modifier["default"])
        return
    arguments = tuple((modifier["arguments"] or "").split(","))
    match modifier["word"]:
        case "in":
            schema.enum = arguments
        case "key":
            schema.list_type, schema.list_keys = "map", arguments
            schema.merge_key, schema.patch_strategy = arguments[0], ("merge",)
        case "merge":
            schema.merge_key, schema.patch_strategy = arguments[0], ("merge",)
        case "set":
            schema.list_type = "set"
        case "union":
            schema.list_type, schema.patch_strategy = "set", ("merge",)
        case "atomic":
            schema.map_type = "atomic"
        case "retain":
            schema.patch_strategy = (*schema.patch_strategy, "retainKeys")
        case "inline":
            schema.inline = True
        case word:
            raise ValueError(f"unknown modifier {word!r}")

"""OpenAPI v3 documents, one a group-version: what `kubectl explain`, `apply` and `diff` read.

Built from the same schemas that requests are decoded and merged by, at the first request for a document.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import orjson

from meshlight.kube import schema_language
from meshlight.kube.catalog import Catalog, ResourceType
from meshlight.kube.resources import Object
from meshlight.kube.schema import UNSET, Schema

_META = "io.k8s.apimachinery.pkg.apis.meta.v1"
_REFERENCE = "#/components/schemas/"
_FORMATS: dict[str, tuple[str, Object]] = {
    # format of a built-in field: the component that Kubernetes has for it, and its schema
    "quantity": (
        "io.k8s.apimachinery.pkg.api.resource.Quantity",
        {
            "description": "Quantity is a fixed-point number with a suffix, as 500m or 2Gi.",
            "oneOf": [{"type": "string"}, {"type": "number"}],
        },
    ),
    "int-or-string": (
        "io.k8s.apimachinery.pkg.util.intstr.IntOrString",
        {
            "description": "IntOrString is a number or a string.",
            "format": "int-or-string",
            "oneOf": [{"type": "integer"}, {"type": "string"}],
        },
    ),
    "date-time": (
        f"{_META}.Time",
        {"description": "Time is an RFC 3339 time.", "type": "string", "format": "date-time"},
    ),
    "micro-time": (
        f"{_META}.MicroTime",
        {"description": "MicroTime is a time in microseconds.", "type": "string", "format": "date-time"},
    ),
}
_PATCH_TYPES = ("apply-patch+yaml", "json-patch+json", "merge-patch+json", "strategic-merge-patch+json")


def index(catalog: Catalog) -> Object:
    """The answer of `/openapi/v3`; a document's URL changes when the document does."""
    versions: dict[tuple[str, str], list[ResourceType]] = {}
    for served in catalog.types():
        versions.setdefault((served.resource.group, served.resource.version), []).append(served)
    paths = {}
    for (group, version), types in versions.items():
        path = f"apis/{group}/{version}" if group else f"api/{version}"
        paths[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={_fingerprint(types)}"}
    return {"paths": paths}


def _fingerprint(types: Iterable[ResourceType]) -> str:
    seen = hashlib.sha256(_builtin_fingerprint())
    for served in types:
        seen.update(served.resource.plural.encode())
        seen.update(orjson.dumps([s.name for s in served.subresources]))
        seen.update(orjson.dumps(served.schema))
    return seen.hexdigest()[:32].upper()


@functools.cache
def _builtin_fingerprint() -> bytes:
    return orjson.dumps(_components(schema_language.builtin().types))


def document(catalog: Catalog, group: str, version: str) -> Object | None:
    """The document of one group-version, or None when it is not served."""
    types = [t for t in catalog.types() if (t.resource.group, t.resource.version) == (group, version)]
    if not types:
        return None
    paths: Object = {}
    components: Object = {}
    needed: set[str] = {"ObjectMeta"}
    for served in types:
        paths.update(_paths(served))
        if served.schema is not None:
            components[_component(served)] = _custom(served)
        elif served.structure.name:
            needed.add(served.structure.name)
    for name, (schema, kind) in _reachable(needed).items():
        components[name] = dict(schema)
        if kind:
            components[name]["x-kubernetes-group-version-kind"] = kind
    components.update(_FORMATS.values())
    return {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.32.0"},
        "paths": paths,
        "components": {"schemas": components},
    }


SWAGGER: Object = {
    "swagger": "2.0",
    "info": {"title": "Kubernetes", "version": "v1.32.0"},
    "paths": {},
    "definitions": {},
}
"""OpenAPI v2 without definitions: kubectl reads it to check a `List`; what it lacks is left to the server."""

SWAGGER_PROTOBUF_TYPE = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"


def swagger_protobuf() -> bytes:
    """SWAGGER as the protobuf that kubectl asks for (gnostic's `openapi.v2.Document`, fields 1 and 2)."""

    def text(field: int, value: bytes) -> bytes:
        return bytes([field << 3 | 2, len(value)]) + value

    info = text(1, SWAGGER["info"]["title"].encode()) + text(2, SWAGGER["info"]["version"].encode())
    return text(1, SWAGGER["swagger"].encode()) + text(2, info)


def _gvk(served: ResourceType) -> dict[str, str]:
    r = served.resource
    return {"group": r.group, "version": r.version, "kind": r.kind}


def _component(served: ResourceType) -> str:
    """The component's name: a custom resource's from its group, turned round."""
    if served.schema is None and served.structure.name:
        return schema_language.builtin().openapi_names[served.structure.name]
    r = served.resource
    return ".".join([*reversed(r.group.split(".")), r.version, r.kind]).lstrip(".")


def _paths(served: ResourceType) -> Object:
    r = served.resource
    reference = {"$ref": _REFERENCE + _component(served)}
    body = {"content": {"*/*": {"schema": reference}}}
    paths: Object = {}
    collection = r.path("{namespace}" if r.namespaced else None)
    methods: Object = {}
    if "list" in served.verbs:
        methods["get"] = _operation(
            served, "list", ("labelSelector", "fieldSelector", "limit", "continue", "watch")
        )
    if "create" in served.verbs:
        methods["post"] = {**_operation(served, "post", _WRITE), "requestBody": body}
    paths[collection] = methods
    item: Object = {}
    if "get" in served.verbs:
        item["get"] = _operation(served, "get", ())
    if "update" in served.verbs:
        item["put"] = {**_operation(served, "put", _WRITE), "requestBody": body}
    if "patch" in served.verbs:
        accepted = [t for t in _PATCH_TYPES if served.schema is None or not t.startswith("strategic")]
        patch = {"$ref": f"{_REFERENCE}{_META}.Patch"}
        content = {f"application/{t}": {"schema": patch} for t in accepted}
        item["patch"] = {**_operation(served, "patch", (*_WRITE, "force")), "requestBody": {"content": content}}
    if "delete" in served.verbs:
        item["delete"] = _operation(served, "delete", ("dryRun", "gracePeriodSeconds", "propagationPolicy"))
    if item:
        paths[collection + "/{name}"] = item
    return paths


_WRITE = ("dryRun", "fieldManager", "fieldValidation")


def _operation(served: ResourceType, action: str, parameters: tuple[str, ...]) -> Object:
    answer = {"schema": {"$ref": _REFERENCE + _component(served)}}
    return {
        "parameters": [{"name": n, "in": "query", "schema": {"type": "string"}} for n in parameters],
        "responses": {"200": {"description": "OK", "content": {"application/json": answer}}},
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": _gvk(served),
    }


def _custom(served: ResourceType) -> Object:
    """A custom resource's schema, with what every object has."""
    schema: Object = dict(served.schema or {})
    declared = {k: v for k, v in (schema.get("properties") or {}).items() if k not in _COMMON}
    schema["properties"] = {**_COMMON, **declared}
    schema["type"] = "object"
    schema["x-kubernetes-group-version-kind"] = [_gvk(served)]
    return schema


_COMMON: Object = {
    "apiVersion": {
        "type": "string",
        "description": "APIVersion defines the versioned schema of this representation of an object.",
    },
    "kind": {
        "type": "string",
        "description": "Kind is the REST resource this object represents, in CamelCase.",
    },
    "metadata": {
        "allOf": [{"$ref": f"{_REFERENCE}{_META}.ObjectMeta"}],
        "default": {},
        "description": "Standard object's metadata.",
    },
}


def _reachable(names: set[str]) -> dict[str, tuple[Object, list[dict[str, str]]]]:
    """Built-in types that these refer to, themselves included, with the kinds that they are."""
    package = schema_language.builtin()
    kinds = {name: api_version for api_version, name in package.kinds}
    found: dict[str, tuple[Object, list[dict[str, str]]]] = {
        f"{_META}.Patch": ({"type": "object", "description": "Patch is a patch of an object."}, [])
    }
    waiting, seen = list(names), set(names)
    while waiting:
        name = waiting.pop()
        schema = package.types[name]
        kind = []
        if name in kinds:
            group, _, version = kinds[name].rpartition("/")
            kind = [{"group": group, "version": version, "kind": name}]
        found[package.openapi_names[name]] = (_struct(schema), kind)
        for below in _uses(schema):
            if below not in seen:
                seen.add(below)
                waiting.append(below)
    return found


def _uses(schema: Schema) -> Iterable[str]:
    for below in schema.properties.values():
        node: Schema | None = below
        while node is not None and not node.name:
            node = node.items or node.values
        if node is not None:
            yield node.name


def _components(types: dict[str, Schema]) -> Object:
    return {name: _struct(schema) for name, schema in types.items()}


def _struct(schema: Schema) -> Object:
    """The component of a named type."""
    rendered: Object = {"type": "object", "description": schema.description}
    if schema.properties:
        rendered["properties"] = {name: _property(below) for name, below in schema.properties.items()}
    if schema.required:
        rendered["required"] = list(schema.required)
    return rendered


def _property(schema: Schema) -> Object:
    """A use of a type: a reference, or the type itself when it has no name."""
    rendered = _value(schema)
    if schema.default is not UNSET:
        rendered["default"] = schema.default
    if schema.description:
        rendered["description"] = schema.description
    if "$ref" in rendered and len(rendered) > 1:
        rendered["allOf"] = [{"$ref": rendered.pop("$ref")}]
    if schema.enum:
        rendered["enum"] = list(schema.enum)
    if schema.type == "array":
        rendered["x-kubernetes-list-type"] = schema.list_type
        if schema.list_keys:
            rendered["x-kubernetes-list-map-keys"] = list(schema.list_keys)
    if schema.map_type == "atomic":
        rendered["x-kubernetes-map-type"] = "atomic"
    if schema.patch_strategy:
        rendered["x-kubernetes-patch-strategy"] = ",".join(schema.patch_strategy)
    if schema.merge_key:
        rendered["x-kubernetes-patch-merge-key"] = schema.merge_key
    return rendered


def _value(schema: Schema) -> Object:
    if schema.name:
        return {"$ref": _REFERENCE + schema_language.builtin().openapi_names[schema.name]}
    if schema.format in _FORMATS:
        return {"$ref": _REFERENCE + _FORMATS[schema.format][0]}
    rendered: dict[str, Any] = {"type": schema.type} if schema.type else {}
    if schema.format:
        rendered["format"] = schema.format
    if schema.items is not None:
        rendered["items"] = _property(schema.items)
    if schema.values is not None:
        rendered["additionalProperties"] = _property(schema.values)
    return rendered

"""OpenAPI v3 documents: enough for kubectl to apply with server-side field validation, and the
schemas of custom resources for `kubectl explain`.
"""

from __future__ import annotations

from typing import Any

from meshlight.kube.catalog import Catalog, ResourceType
from meshlight.kube.resources import Object


def index(catalog: Catalog) -> Object:
    """The answer of `/openapi/v3`."""
    versions = dict.fromkeys(
        ("apis/" if t.resource.group else "api/") + t.resource.api_version for t in catalog.types()
    )
    return {"paths": {v: {"serverRelativeURL": f"/openapi/v3/{v}"} for v in versions}}


def document(catalog: Catalog, group: str, version: str) -> Object | None:
    """The document of one group-version, or None when it is not served."""
    types = [t for t in catalog.types() if (t.resource.group, t.resource.version) == (group, version)]
    if not types:
        return None
    paths: Object = {}
    for served in types:
        r = served.resource
        collection = r.path("{namespace}" if r.namespaced else None)
        paths[collection] = {"post": _operation(served)}
        paths[collection + "/{name}"] = {
            "get": _operation(served),
            "put": _operation(served),
            "patch": _operation(served),
        }
    return {
        "openapi": "3.0.0",
        "info": {"title": "Meshlight", "version": "v1.32.0"},
        "paths": paths,
        "components": {"schemas": {_schema_name(t): _schema(t) for t in types}},
    }


def _gvk(served: ResourceType) -> dict[str, str]:
    r = served.resource
    return {"group": r.group, "version": r.version, "kind": r.kind}


def _operation(served: ResourceType) -> dict[str, Any]:
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": {"type": "string"}}
            for name in ("dryRun", "fieldManager", "fieldValidation")
        ],
        "responses": {"200": {"description": "OK"}},
        "x-kubernetes-group-version-kind": _gvk(served),
    }


def _schema_name(served: ResourceType) -> str:
    r = served.resource
    return ".".join([*reversed(r.group.split(".")), r.version, r.kind]).lstrip(".")


def _schema(served: ResourceType) -> dict[str, Any]:
    schema = dict(served.schema or {"type": "object", "description": served.resource.kind})
    schema["x-kubernetes-group-version-kind"] = [_gvk(served)]
    return schema

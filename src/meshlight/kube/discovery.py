"""Discovery documents of the API, aggregated and per group, from the catalog.

Shapes follow `apidiscovery.k8s.io/v2` and `meta/v1`.
"""

from __future__ import annotations

from meshlight.kube.catalog import Catalog, ResourceType
from meshlight.kube.resources import Object


def _groups(catalog: Catalog) -> dict[str, dict[str, list[ResourceType]]]:
    groups: dict[str, dict[str, list[ResourceType]]] = {}
    # Built-in groups have priorities; those of custom resources share one, and go by name: of two groups that
    # have a kind of the same name, every client takes the same.
    for served in sorted(catalog.types(), key=lambda t: t.resource.group if t.schema is not None else ""):
        versions = groups.setdefault(served.resource.group, {})
        versions.setdefault(served.resource.version, []).append(served)
    for versions in groups.values():
        # The version that is stored is preferred, as CustomResourceDefinitions of Istio expect.
        ordered = sorted(versions, key=lambda v: not any(t.storage_version for t in versions[v]))
        for version in ordered:
            versions[version] = versions.pop(version)
    return groups


def aggregated(catalog: Catalog, core: bool) -> Object:
    """`APIGroupDiscoveryList` of the core group, or of all others."""
    items = []
    for group, versions in _groups(catalog).items():
        if (group == "") != core:
            continue
        items.append(
            {
                "metadata": {"name": group} if group else {},
                "versions": [
                    {
                        "version": version,
                        "freshness": "Current",
                        "resources": [_resource_v2(t) for t in types],
                    }
                    for version, types in versions.items()
                ],
            }
        )
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {},
        "items": items,
    }


def _resource_v2(served: ResourceType) -> Object:
    r = served.resource
    entry: Object = {
        "resource": r.plural,
        "responseKind": {"group": r.group, "version": r.version, "kind": r.kind},
        "scope": "Namespaced" if r.namespaced else "Cluster",
        "singularResource": served.singular,
        "verbs": list(served.verbs),
        "subresources": [
            {
                "subresource": s.name,
                "responseKind": {"group": s.group, "version": s.version, "kind": s.kind},
                "verbs": list(s.verbs),
            }
            for s in served.subresources
        ],
    }
    if served.short_names:
        entry["shortNames"] = list(served.short_names)
    if served.categories:
        entry["categories"] = list(served.categories)
    return entry


def paths(catalog: Catalog) -> Object:
    """The answer of `/`: every path that leads on."""
    found = [
        "/.well-known/openid-configuration", "/api", "/api/v1", "/apis", "/healthz", "/livez",
        "/openapi/v2", "/openapi/v3", "/openid/v1/jwks", "/readyz", "/version",
    ]  # fmt: skip
    for group, versions in _groups(catalog).items():
        if group:
            found += [f"/apis/{group}", *(f"/apis/{group}/{version}" for version in versions)]
    return {"paths": sorted(found)}


def api_versions() -> Object:
    """The legacy `/api` answer."""
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def api_group(catalog: Catalog, group: str) -> Object | None:
    """One `APIGroup`."""
    versions = _groups(catalog).get(group)
    if not group or versions is None:
        return None
    listed = [{"groupVersion": f"{group}/{v}", "version": v} for v in versions]
    return {
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": group,
        "versions": listed,
        "preferredVersion": listed[0],
    }


def api_group_list(catalog: Catalog) -> Object:
    """The legacy `/apis` answer."""
    groups = [api_group(catalog, g) for g in _groups(catalog) if g]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def api_resource_list(catalog: Catalog, group: str, version: str) -> Object | None:
    """The `APIResourceList` of a group-version."""
    types = _groups(catalog).get(group, {}).get(version)
    if types is None:
        return None
    resources: list[Object] = []
    for served in types:
        r = served.resource
        resources.append(
            {
                "name": r.plural,
                "singularName": served.singular,
                "namespaced": r.namespaced,
                "kind": r.kind,
                "verbs": list(served.verbs),
                "shortNames": list(served.short_names),
                "categories": list(served.categories),
            }
        )
        resources += [
            {
                "name": f"{r.plural}/{s.name}",
                "singularName": "",
                "namespaced": r.namespaced,
                "kind": s.kind,
                "group": s.group,
                "version": s.version,
                "verbs": list(s.verbs),
            }
            for s in served.subresources
        ]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{group}/{version}" if group else version,
        "resources": resources,
    }

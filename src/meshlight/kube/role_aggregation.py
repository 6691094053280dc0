"""ClusterRoles that are made of others by their labels, and the roles that every cluster has."""

from __future__ import annotations

from collections.abc import Iterable

from meshlight.kube.resources import Object
from meshlight.kube.selectors import match_labels


def rules(role: Object, roles: Iterable[Object]) -> list[Object]:
    """What an aggregated role grants: the rules of all roles that its selectors choose, each once."""
    selectors = (role.get("aggregationRule") or {}).get("clusterRoleSelectors") or ()
    found: list[Object] = []
    for other in sorted(roles, key=lambda r: str(r["metadata"]["name"])):
        if other["metadata"]["name"] == role["metadata"]["name"]:
            continue
        labels = other["metadata"].get("labels") or {}
        if any(match_labels(selector, labels) for selector in selectors):
            found += [rule for rule in other.get("rules") or () if rule not in found]
    return found


def outdated(roles: Iterable[Object]) -> list[tuple[Object, list[Object]]]:
    """Aggregated roles whose rules are not what they should be, and what they should be."""
    everything = list(roles)
    wanted = [(role, rules(role, everything)) for role in everything if role.get("aggregationRule")]
    return [(role, found) for role, found in wanted if (role.get("rules") or []) != found]

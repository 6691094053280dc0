"""Nobody grants more than they hold: changes of roles and bindings, and roles that are made of others.

Rules of Kubernetes' RBAC registry: `escalate` on roles and `bind` on what is bound let one do it all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import orjson

from meshlight.kube.admission import Request
from meshlight.kube.authentication import Attributes, User
from meshlight.kube.authorization import GROUP, SUPERUSERS, Authorizer
from meshlight.kube.resources import Object

_ANY = "*"


@dataclass(frozen=True, slots=True)
class Grant:
    """One right: a verb on a resource (of a name, or of any if ""), or on a path."""

    verb: str
    group: str = ""
    resource: str = ""
    name: str = ""
    path: str = ""


def grants(rules: Iterable[Object]) -> Iterator[Grant]:
    """Every right that rules give, one by one."""
    for rule in rules:
        for verb in rule.get("verbs") or ():
            for path in rule.get("nonResourceURLs") or ():
                yield Grant(verb, path=path)
            for group in rule.get("apiGroups") or ():
                for resource in rule.get("resources") or ():
                    for name in rule.get("resourceNames") or ("",):
                        yield Grant(verb, group, resource, name)


def covers(rule: Object, grant: Grant) -> bool:
    """Whether a rule gives a right."""

    def has(field: str, value: str) -> bool:
        return value in (found := rule.get(field) or ()) or _ANY in found

    if not has("verbs", grant.verb):
        return False
    if grant.path:
        paths = rule.get("nonResourceURLs") or ()
        return any(
            p in (grant.path, _ANY) or (p.endswith(_ANY) and grant.path.startswith(p[:-1])) for p in paths
        )
    resources = rule.get("resources") or ()
    below = grant.resource.partition("/")[2]
    names = rule.get("resourceNames") or ()
    return (
        has("apiGroups", grant.group)
        and (has("resources", grant.resource) or bool(below and f"*/{below}" in resources))
        and (not names or (grant.name in names and bool(grant.name)))
    )


def missing(held: list[Object], wanted: Iterable[Object]) -> list[Grant]:
    """Rights of `wanted` that `held` does not give."""
    return [grant for grant in grants(wanted) if not any(covers(rule, grant) for rule in held)]


def _shown(grant: Grant) -> str:
    def listed(value: str) -> str:
        return orjson.dumps([value]).decode()

    if grant.path:
        return f"{{NonResourceURLs:{listed(grant.path)}, Verbs:{listed(grant.verb)}}}"
    names = f", ResourceNames:{listed(grant.name)}" if grant.name else ""
    what = f"APIGroups:{listed(grant.group)}, Resources:{listed(grant.resource)}{names}"
    return f"{{{what}, Verbs:{listed(grant.verb)}}}"


class RoleGrants:
    """The plug-in."""

    def __init__(self, authorizer: Authorizer) -> None:
        self._authorizer = authorizer

    def __call__(self, request: Request) -> None:
        """Refuse what would grant more than the user holds. Raises StatusError 403."""
        user, obj = request.user, request.obj
        if request.served.resource.group != GROUP or obj is None or user is None or SUPERUSERS in user.groups:
            return
        if request.kind in ("Role", "ClusterRole"):
            if request.old is not None and _same(request.old, obj):
                return
            if not self._may(user, "escalate", request, request.name):
                self._check(request, user, obj.get("rules") or [])
            if obj.get("aggregationRule") and not self._holds_all(user):
                raise request.refusal("must have cluster-admin privileges to use the aggregationRule")
        else:
            reference = obj.get("roleRef") or {}
            if not self._may(user, "bind", request, reference.get("name", ""), reference.get("kind", "")):
                self._check(request, user, self._authorizer.role_rules(reference, request.namespace))

    def _may(self, user: User, verb: str, request: Request, name: str, kind: str = "") -> bool:
        plural = {"Role": "roles", "ClusterRole": "clusterroles"}[kind or request.kind]
        asked = Attributes(verb, GROUP, plural, namespace=request.namespace, name=name)
        return self._authorizer.allowed(user, asked)

    def _holds_all(self, user: User) -> bool:
        everything = {"verbs": [_ANY], "apiGroups": [_ANY], "resources": [_ANY]}
        return not missing(list(self._authorizer.rules(user, "")), [everything])

    def _check(self, request: Request, user: User, wanted: list[Object]) -> None:
        lacking = missing(list(self._authorizer.rules(user, request.namespace)), wanted)
        if lacking:
            groups = orjson.dumps(list(user.groups)).decode()
            listed = "\n".join(_shown(grant) for grant in lacking[:20])
            raise request.refusal(
                f'user "{user.name}" (groups={groups}) is attempting to grant RBAC permissions not currently '
                f"held:\n{listed}"
            )


def _same(old: Object, new: Object) -> bool:
    return all(old.get(field) == new.get(field) for field in ("rules", "aggregationRule"))

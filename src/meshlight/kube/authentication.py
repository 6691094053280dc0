"""Who is asking: users from verified client certificates, and whom they act for.

`tokens` does the same for bearer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from meshlight.kube.resources import Object
from meshlight.kube.status import StatusError


@dataclass(frozen=True, slots=True)
class User:
    """An authenticated user; `extra` as an authenticator adds it (the pod and node of a token)."""

    name: str
    groups: tuple[str, ...]
    uid: str = ""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def review(self) -> Object:
        """As `authentication.k8s.io` UserInfo."""
        return {
            "username": self.name,
            "uid": self.uid,
            "groups": list(self.groups),
            "extra": {key: list(values) for key, values in self.extra.items()},
        }


def unauthorized() -> StatusError:
    """401, in Kubernetes' one word for every cause."""
    return StatusError(401, "Unauthorized", "Unauthorized")


def from_certificate(certificate: dict[str, Any] | None) -> User:
    """The user of a verified peer certificate, as `ssl` describes it. Raises StatusError 401."""
    if not certificate:
        raise unauthorized()
    attributes = [pair for rdn in certificate.get("subject", ()) for pair in rdn]
    names = [value for key, value in attributes if key == "commonName"]
    groups = tuple(value for key, value in attributes if key == "organizationName")
    if not names:
        raise unauthorized()
    return User(names[0], (*groups, "system:authenticated"))


_ACCOUNT = "system:serviceaccount:"
ANONYMOUS = User("system:anonymous", ("system:unauthenticated",))


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a request wants to do: to a resource, or to a non-resource `path`."""

    verb: str
    group: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""


def _needed(name: str, groups: list[str], uid: str, extra: Mapping[str, list[str]]) -> Iterator[Attributes]:
    """What a user must be allowed to do to act as another."""
    verb, authentication = "impersonate", "authentication.k8s.io"
    if name.startswith(_ACCOUNT):
        namespace, _, account = name.removeprefix(_ACCOUNT).partition(":")
        yield Attributes(verb, "", "serviceaccounts", namespace=namespace, name=account)
    else:
        yield Attributes(verb, "", "users", name=name)
    for group in groups:
        yield Attributes(verb, "", "groups", name=group)
    if uid:
        yield Attributes(verb, authentication, "uids", name=uid)
    for key, values in extra.items():
        for value in values:
            yield Attributes(verb, authentication, "userextras", subresource=key, name=value)


def impersonated(headers: Any, check: Callable[[Attributes], None]) -> User:
    """The user that a request acts for. Raises StatusError 400, and what `check` raises for missing rights."""
    name, groups = headers.get("Impersonate-User", ""), headers.getall("Impersonate-Group", [])
    if not name:
        raise StatusError(400, "BadRequest", "requested groups without impersonating a user")
    extra: dict[str, list[str]] = {}
    for header, value in headers.items():
        if header.lower().startswith("impersonate-extra-"):
            extra.setdefault(unquote(header[len("impersonate-extra-") :].lower()), []).append(value)
    uid = headers.get("Impersonate-Uid", "")
    for asked in _needed(name, groups, uid, extra):
        check(asked)
    if name.startswith(_ACCOUNT) and not groups:
        namespace = name.removeprefix(_ACCOUNT).partition(":")[0]
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}"]
    if "system:authenticated" not in groups and name != ANONYMOUS.name:
        groups = [*groups, "system:authenticated"]
    return User(name, tuple(groups), uid, {k: tuple(v) for k, v in extra.items()})

"""Who is asking: users from verified client certificates; `tokens` does the same for bearer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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

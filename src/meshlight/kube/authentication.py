"""Who makes a request: client certificates signed by the cluster's CA.

The user is the certificate's common name, the groups its organisations, as Kubernetes reads X.509.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meshlight.kube.status import StatusError


@dataclass(frozen=True, slots=True)
class User:
    """An authenticated user."""

    name: str
    groups: tuple[str, ...]


def from_certificate(certificate: dict[str, Any] | None) -> User:
    """The user of a verified peer certificate, as `ssl` describes it. Raises StatusError 401."""
    if not certificate:
        raise StatusError(401, "Unauthorized", "Unauthorized")
    attributes = [pair for rdn in certificate.get("subject", ()) for pair in rdn]
    names = [value for key, value in attributes if key == "commonName"]
    groups = tuple(value for key, value in attributes if key == "organizationName")
    if not names:
        raise StatusError(401, "Unauthorized", "Unauthorized")
    return User(names[0], (*groups, "system:authenticated"))

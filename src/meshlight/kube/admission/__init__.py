"""Admission: who else has a say in a write, after it is decoded and defaulted.

Mutating plug-ins change the object, validating ones refuse it. Each is a small class over the stored objects;
they know nothing of HTTP. The order is Kubernetes'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from meshlight.kube.authentication import User
from meshlight.kube.resource_types import ResourceType
from meshlight.kube.resources import Object
from meshlight.kube.status import StatusError, forbidden

Operation = Literal["CREATE", "UPDATE", "DELETE"]


@dataclass(slots=True)
class Request:
    """One write: `obj` as it shall be (None: it goes), `old` as it is (None: it is new)."""

    operation: Operation
    served: ResourceType
    namespace: str
    name: str
    subresource: str
    obj: Object | None
    old: Object | None
    user: User | None
    dry_run: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The object's kind."""
        return self.served.resource.kind

    def refusal(self, why: str) -> StatusError:
        """403 for this write."""
        r = self.served.resource
        return forbidden(r.group, r.plural, self.name, why)


Plugin = Callable[[Request], None]
"""Changes `request.obj` in place, or raises StatusError."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The plug-ins of a server."""

    mutating: Sequence[Plugin] = ()
    validating: Sequence[Plugin] = ()

    def mutate(self, request: Request) -> None:
        """Let every mutating plug-in change the object."""
        for plugin in self.mutating:
            plugin(request)

    def validate(self, request: Request) -> None:
        """Raises StatusError when a plug-in refuses."""
        for plugin in self.validating:
            plugin(request)

"""Kubernetes' `Status` answers: every error of the API server is one of these."""

from __future__ import annotations

from dataclasses import dataclass, field

from meshlight.kube.resources import Object


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason of a refusal: the field's path, Kubernetes' machine word, and the sentence."""

    field: str
    reason: str
    message: str


@dataclass(eq=False)
class StatusError(Exception):
    """A request that fails with an HTTP `code`, a machine `reason` and a `message`."""

    code: int
    reason: str
    message: str
    details: Object = field(default_factory=dict)
    metadata: Object = field(default_factory=dict)

    def body(self) -> Object:
        """The `Status` object."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": self.metadata,
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        }


def _qualified(plural: str, group: str) -> str:
    return f"{plural}.{group}" if group else plural


def _details(group: str, plural: str, name: str) -> Object:
    details = {"name": name, "kind": plural}
    if group:
        details["group"] = group
    return details


def not_found(group: str, plural: str, name: str) -> StatusError:
    """404, in kubectl's words `pods "x" not found`."""
    message = f'{_qualified(plural, group)} "{name}" not found'
    return StatusError(404, "NotFound", message, _details(group, plural, name))


def already_exists(group: str, plural: str, name: str) -> StatusError:
    """409 on create."""
    message = f'{_qualified(plural, group)} "{name}" already exists'
    return StatusError(409, "AlreadyExists", message, _details(group, plural, name))


def conflict(group: str, plural: str, name: str) -> StatusError:
    """409 on a stale write."""
    message = (
        f'Operation cannot be fulfilled on {_qualified(plural, group)} "{name}": the object has been '
        "modified; please apply your changes to the latest version and try again"
    )
    return StatusError(409, "Conflict", message, _details(group, plural, name))


def invalid(group: str, kind: str, name: str, causes: list[Cause]) -> StatusError:
    """422 with a cause for each field at fault."""
    sentences = [f"{c.field}: {c.message}" for c in causes]
    listed = sentences[0] if len(sentences) == 1 else "[" + ", ".join(sentences) + "]"
    details = _details(group, kind, name)
    details["causes"] = [{"reason": c.reason, "message": c.message, "field": c.field} for c in causes]
    message = f'{_qualified(kind, group)} "{name}" is invalid: {listed}'
    return StatusError(422, "Invalid", message, details)


def forbidden(group: str, plural: str, name: str, why: str) -> StatusError:
    """403."""
    message = f'{_qualified(plural, group)} "{name}" is forbidden: {why}'
    return StatusError(403, "Forbidden", message, _details(group, plural, name))


def bad_request(message: str) -> StatusError:
    """400."""
    return StatusError(400, "BadRequest", message)

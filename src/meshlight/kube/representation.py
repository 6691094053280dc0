"""How objects leave the API: as they are stored, in another version, as rows of a table, as metadata alone.

Bodies that are asked for as they are stored pass unread. Pure but for the clock of ages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import orjson

from meshlight.kube import tables
from meshlight.kube.resource_types import ResourceType
from meshlight.kube.resources import Object
from meshlight.kube.status import StatusError

Present = Callable[[ResourceType, Object], Object]
Shape = Literal["object", "table", "metadata"]

_SHAPES: dict[str, Shape] = {
    "Table": "table", "PartialObjectMetadata": "metadata", "PartialObjectMetadataList": "metadata",
}  # fmt: skip
INITIAL_EVENTS_END = "k8s.io/initial-events-end"


def shape_of(accept: str) -> Shape:
    """What an Accept header asks for: the first alternative that can be had. Raises StatusError 406."""
    for alternative in accept.split(","):
        kind, *parameters = (part.strip() for part in alternative.split(";"))
        if "protobuf" in kind or "cbor" in kind:
            continue
        asked = dict(p.split("=", 1) for p in parameters if "=" in p)
        if "as" not in asked:
            if kind in ("", "*/*", "application/*", "application/json", "application/yaml") or "json" in kind:
                return "object"
        elif asked["as"] in _SHAPES and asked.get("v", "v1") == "v1":
            return _SHAPES[asked["as"]]
    if not accept or "*" in accept:
        return "object"
    message = "only the following media types are accepted: application/json"
    raise StatusError(406, "NotAcceptable", message)


@dataclass(frozen=True, slots=True)
class Representation:
    """One shape of one type's objects."""

    served: ResourceType
    present: Present
    shape: Shape = "object"
    include_object: str = "Metadata"

    @property
    def _prefix(self) -> bytes:
        r = self.served.resource
        return b'{"apiVersion":"%s","kind":"%s",' % (r.api_version.encode(), r.kind.encode())

    def as_stored(self, body: bytes) -> bool:
        """Whether a body can leave as it is."""
        return self.shape == "object" and body.startswith(self._prefix)

    def decoded(self, body: bytes) -> Object:
        """The object in the version asked for."""
        return self.present(self.served, orjson.loads(body))

    def one(self, body: bytes) -> bytes:
        """One object."""
        return body if self.as_stored(body) else self.shown(self.decoded(body))

    def shown(self, obj: Object) -> bytes:
        """One object that is decoded already."""
        match self.shape:
            case "table":
                version = obj["metadata"].get("resourceVersion", "")
                return orjson.dumps(self._table([obj], version))
            case "metadata":
                return orjson.dumps(_partial(obj))
        return orjson.dumps(obj)

    def many(self, bodies: list[bytes], metadata: Object) -> bytes:
        """A list."""
        r = self.served.resource
        if self.shape == "table":
            table = self._table([self.decoded(body) for body in bodies], "")
            table["metadata"] = metadata
            return orjson.dumps(table)
        if self.shape == "metadata":
            items = [_partial(self.decoded(body)) for body in bodies]
            kind = {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1"}
            return orjson.dumps({**kind, "metadata": metadata, "items": items})
        head = orjson.dumps({"kind": f"{r.kind}List", "apiVersion": r.api_version, "metadata": metadata})
        return b"".join((head[:-1], b',"items":[', b",".join(map(self.one, bodies)), b"]}"))

    def event(self, kind: str, body: bytes) -> bytes:
        """A watch event."""
        return b'{"type":"%s","object":%s}\n' % (kind.encode(), self.one(body))

    def bookmark(self, revision: int, *, initial_end: bool = False) -> bytes:
        """A BOOKMARK event."""
        r = self.served.resource
        metadata: Object = {"resourceVersion": str(revision), "creationTimestamp": None}
        if initial_end:
            metadata["annotations"] = {INITIAL_EVENTS_END: "true"}
        obj: Object = {"kind": r.kind, "apiVersion": r.api_version, "metadata": metadata}
        if self.shape == "table":
            obj = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
                   "columnDefinitions": None, "rows": []}  # fmt: skip
        elif self.shape == "metadata":
            obj = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}
        return orjson.dumps({"type": "BOOKMARK", "object": obj}) + b"\n"

    def _table(self, items: list[Object], version: str) -> Object:
        return tables.render(self.served, items, version, self.include_object, datetime.now(UTC))


def _partial(obj: Object) -> Object:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}

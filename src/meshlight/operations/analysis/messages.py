"""Messages of the analysis, with Istio's names, codes and levels; the words are ours.

https://istio.io/latest/docs/reference/config/analysis/ explains each code.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from meshlight.kube.resources import Object

DOCUMENTATION = "https://istio.io/v1.24/docs/reference/config/analysis"


class Level(IntEnum):
    """How bad it is."""

    INFO = 1
    WARNING = 2
    ERROR = 3

    @property
    def word(self) -> str:
        """As istioctl writes it."""
        return self.name.capitalize()


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of message."""

    name: str
    code: str
    level: Level


INTERNAL_ERROR = Kind("InternalError", "IST0001", Level.ERROR)
DEPRECATED = Kind("Deprecated", "IST0002", Level.WARNING)
REFERENCE_NOT_FOUND = Kind("ReferencedResourceNotFound", "IST0101", Level.ERROR)
SCHEMA_ERROR = Kind("SchemaValidationError", "IST0106", Level.ERROR)
MISPLACED_ANNOTATION = Kind("MisplacedAnnotation", "IST0107", Level.WARNING)
UNKNOWN_ANNOTATION = Kind("UnknownAnnotation", "IST0108", Level.WARNING)
CONFLICTING_HOSTS = Kind("ConflictingMeshGatewayVirtualServiceHosts", "IST0109", Level.ERROR)
PORT_REQUIRED = Kind("VirtualServiceDestinationPortSelectorRequired", "IST0112", Level.ERROR)
CONFLICTING_PROTOCOLS = Kind("DeploymentAssociatedToMultipleServices", "IST0116", Level.WARNING)
PORT_NAME = Kind("PortNameIsNotUnderNamingConvention", "IST0118", Level.INFO)
INVALID_ANNOTATION = Kind("InvalidAnnotation", "IST0125", Level.WARNING)
NO_WORKLOADS = Kind("NoMatchingWorkloadsFound", "IST0127", Level.WARNING)
SCHEMA_WARNING = Kind("SchemaWarning", "IST0133", Level.WARNING)
INEFFECTIVE_POLICY = Kind("IneffectivePolicy", "IST0167", Level.WARNING)
NEGATIVE_CONDITION = Kind("NegativeConditionStatus", "IST0171", Level.WARNING)
SUBSET_EMPTY = Kind("DestinationRuleSubsetNotSelectPods", "IST0173", Level.ERROR)
UNKNOWN_HOST = Kind("UnknownDestinationRuleHost", "IST0174", Level.WARNING)
CONFLICTING_ENTRIES = Kind("ConflictingServiceEntryProtocol", "IST0177", Level.WARNING)

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Kind))


@dataclass(frozen=True, slots=True)
class Message:
    """One message about one object; `reference` is `FILE:LINE` for what was read from a file."""

    kind: Kind
    object_kind: str
    namespace: str
    name: str
    text: str
    reference: str = ""

    @classmethod
    def about(cls, kind: Kind, obj: Object, text: str) -> Message:
        """A message about an object."""
        metadata = obj["metadata"]
        return cls(
            kind, obj["kind"], metadata.get("namespace") or "", metadata.get("name") or "", text,
            obj.get("__reference__", ""),
        )  # fmt: skip

    @property
    def origin(self) -> str:
        """As istioctl names an object: `Kind NAME.NAMESPACE` without its namespace where it has none."""
        path = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.object_kind} {path}"

    def line(self) -> str:
        """istioctl's log format."""
        where = f"{self.origin} {self.reference}" if self.reference else self.origin
        return f"{self.kind.level.word} [{self.kind.code}] ({where}) {self.text}"

    def plain(self) -> dict[str, str]:
        """istioctl's JSON format."""
        content = {
            "code": self.kind.code,
            "documentationUrl": f"{DOCUMENTATION}/{self.kind.code.lower()}/",
            "level": self.kind.level.word,
            "message": self.text,
            "origin": self.origin,
        }
        return content | ({"reference": self.reference} if self.reference else {})

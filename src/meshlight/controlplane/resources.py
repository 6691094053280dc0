"""Published resources: what the proxies are told, by type and name, with the ways to find each.

A resource is serialised once, when it changes, and then shared by every connection. Versions are
hashes of the content, so that a proxy that reconnects, even to a restarted istiod, is sent only what
differs from what it holds.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from meshlight.proto import discovery_pb2 as ads

TYPE_PREFIX = "type.googleapis.com/"
ADDRESS_TYPE = TYPE_PREFIX + "istio.workload.Address"
WORKLOAD_TYPE = TYPE_PREFIX + "istio.workload.Workload"
AUTHORIZATION_TYPE = TYPE_PREFIX + "istio.security.Authorization"

_RESOURCES_TAG = b"\x12"  # field 2, length-delimited, of DeltaDiscoveryResponse


@dataclass(frozen=True, slots=True, eq=False)
class Published:
    """One resource as it goes onto the wire.

    `aliases` are other names under which a proxy may ask for it (`NETWORK/IP`); `groups` are names
    whose subscription includes it: services it belongs to and, as `node:NAME`, its node.
    `fragment` is its whole entry in a DeltaDiscoveryResponse.
    """

    type_url: str
    name: str
    version: str
    aliases: tuple[str, ...]
    groups: tuple[str, ...]
    message: Message
    fragment: bytes = field(repr=False)


@functools.lru_cache(maxsize=1 << 14)
def plain_workload(resource: Published) -> Published | None:
    """An Address resource under the older type of workloads alone; None for a service."""
    message: Any = resource.message
    if not message.HasField("workload"):
        return None
    return publish(WORKLOAD_TYPE, resource.name, message.workload, resource.aliases, resource.groups)


def node_group(node: str) -> str:
    """The group of the workloads on a node; distinct from resource names, which all hold a `/`."""
    return f"node:{node}"


def publish(
    type_url: str,
    name: str,
    message: Message,
    aliases: Iterable[str] = (),
    groups: Iterable[str] = (),
) -> Published:
    """Serialise a message for the wire."""
    value = message.SerializeToString(deterministic=True)
    aliases = tuple(aliases)
    resource = ads.Resource(
        name=name, version=hashlib.blake2b(value, digest_size=8).hexdigest(), aliases=aliases
    )
    resource.resource.type_url = type_url
    resource.resource.value = value
    encoded = resource.SerializeToString(deterministic=True)
    fragment = _RESOURCES_TAG + _varint(len(encoded)) + encoded
    return Published(type_url, name, resource.version, aliases, tuple(groups), message, fragment)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


@dataclass(slots=True)
class Change:
    """What one commit changed of one type."""

    updated: dict[str, Published] = field(default_factory=dict)
    removed: dict[str, Published] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.updated or self.removed)


Changes = Mapping[str, Change]
"""By type URL."""


class Collection:
    """The resources of one type. `put` and `remove` say whether anything changed."""

    def __init__(self) -> None:
        self._by_name: dict[str, Published] = {}
        self._by_other: dict[str, dict[str, Published]] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Published]:
        return iter(self._by_name.values())

    def get(self, name: str) -> Published | None:
        """The resource of exactly that name."""
        return self._by_name.get(name)

    def find(self, name: str) -> list[Published]:
        """What a subscription to `name` means: the resource of that name, alias or group."""
        own = self._by_name.get(name)
        others = self._by_other.get(name, {}).values()
        return [own, *others] if own is not None else list(others)

    def put(self, resource: Published) -> bool:
        """Add or replace."""
        old = self._by_name.get(resource.name)
        if old is not None:
            if old.version == resource.version and old.aliases == resource.aliases:
                return False
            self._forget(old)
        self._by_name[resource.name] = resource
        for name in (*resource.aliases, *resource.groups):
            self._by_other.setdefault(name, {})[resource.name] = resource
        return True

    def remove(self, name: str) -> Published | None:
        """Take away; returns what was there."""
        old = self._by_name.pop(name, None)
        if old is not None:
            self._forget(old)
        return old

    def _forget(self, resource: Published) -> None:
        for name in (*resource.aliases, *resource.groups):
            entries = self._by_other.get(name)
            if entries is not None:
                entries.pop(resource.name, None)
                if not entries:
                    del self._by_other[name]

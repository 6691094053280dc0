"""Where compiled messages become published resources: named, found by alias and group, compared with before.

Knows how the node proxies look things up (`NETWORK/IP`, a service's workloads, a node's workloads), and
nothing of where messages come from. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from meshlight.controlplane.facts import ObjectKey, address_text
from meshlight.controlplane.resources import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    Change,
    Changes,
    Collection,
    node_group,
    publish,
)
from meshlight.proto import authorization_pb2 as rbac
from meshlight.proto import workload_pb2 as wds


@dataclass(frozen=True, slots=True)
class Failure:
    """An object that could not be compiled; what was published of it before stays."""

    key: ObjectKey
    error: str


def attempt(keys: Iterable[ObjectKey], compiling: Callable[[ObjectKey], None]) -> list[Failure]:
    """Compile each; one that fails does not keep the others from their proxies."""
    failures = []
    for key in keys:
        try:
            compiling(key)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            failures.append(Failure(key, repr(error)))
    return failures


class Publication:
    """The published resources by type, and what changed since the last `take`."""

    def __init__(self) -> None:
        self.collections = {type_url: Collection() for type_url in (AUTHORIZATION_TYPE, ADDRESS_TYPE)}
        self._changes: dict[str, Change] = {}

    def take(self) -> Changes:
        """What changed since this was last asked."""
        changes, self._changes = self._changes, {}
        return {type_url: change for type_url, change in changes.items() if change}

    def workload(self, message: wds.Workload) -> None:
        """Publish a workload. Addresses of the host's network are others' as well: no alias leads to it."""
        shared = message.network_mode == wds.HOST_NETWORK
        aliases = () if shared else tuple(_alias(message.network, a) for a in message.addresses)
        groups = [*sorted(message.services), *([node_group(message.node)] if message.node else [])]
        self._put(ADDRESS_TYPE, message.uid, wds.Address(workload=message), aliases, groups)

    def service(self, name: str, message: wds.Service) -> None:
        """Publish a service; blocks of addresses lead nowhere by themselves."""
        single = [a for a in message.addresses if not a.HasField("length")]
        aliases = [_alias(a.network, a.address) for a in single]
        self._put(ADDRESS_TYPE, name, wds.Address(service=message), aliases, ())

    def policy(self, message: rbac.Authorization) -> None:
        """Publish a policy."""
        self._put(AUTHORIZATION_TYPE, f"{message.namespace}/{message.name}", message, (), ())

    def withdraw(self, type_url: str, name: str) -> None:
        """Take a resource back, if it is there."""
        old = self.collections[type_url].remove(name)
        if old is not None:
            change = self._changes.setdefault(type_url, Change())
            change.updated.pop(name, None)
            change.removed[name] = old

    def _put(
        self,
        type_url: str,
        name: str,
        message: wds.Address | rbac.Authorization,
        aliases: list[str] | tuple[str, ...],
        groups: list[str] | tuple[str, ...],
    ) -> None:
        resource = publish(type_url, name, message, aliases, groups)
        if self.collections[type_url].put(resource):
            change = self._changes.setdefault(type_url, Change())
            change.removed.pop(name, None)
            change.updated[name] = resource


def _alias(network: str, address: bytes) -> str:
    return f"{network}/{address_text(address)}"

"""Sets of object keys by a name, as the indices keep them to find what a change concerns."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Set as AbstractSet
from typing import Generic, TypeVar

from meshlight.controlplane.facts import ObjectKey

Name = TypeVar("Name", bound=Hashable)


class Groups(Generic[Name]):
    """Sets of object keys by a name; a group that becomes empty is forgotten."""

    def __init__(self) -> None:
        self._groups: dict[Name, set[ObjectKey]] = {}

    def __getitem__(self, name: Name) -> AbstractSet[ObjectKey]:
        return self._groups.get(name, frozenset())

    def names(self) -> list[Name]:
        """The groups that have members."""
        return list(self._groups)

    def add(self, name: Name, key: ObjectKey) -> None:
        """Put a key into a group."""
        self._groups.setdefault(name, set()).add(key)

    def discard(self, name: Name, key: ObjectKey) -> None:
        """Take a key out of a group, if it is there."""
        if (group := self._groups.get(name)) is not None:
            group.discard(key)
            if not group:
                del self._groups[name]

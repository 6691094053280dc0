"""Durable objects with revisions, on one SQLite file.

Every change takes the next revision, writes the object and a line of the change log in one
transaction, and is on disk (WAL, synchronous=FULL) before the caller hears of it. Watches resume
from the change log until it is compacted. Knows nothing of HTTP or of what objects mean.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson

from meshlight.kube.resources import Object

ChangeType = Literal["ADDED", "MODIFIED", "DELETED"]

KEEP_CHANGES = 20_000
"""Changes a watch can go back over; older ones are compacted away."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
  resource TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
  revision INTEGER NOT NULL, body BLOB NOT NULL,
  PRIMARY KEY (resource, namespace, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS changes (
  revision INTEGER PRIMARY KEY, resource TEXT NOT NULL, type TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS changes_by_resource ON changes (resource, revision);
"""


class ConflictError(Exception):
    """The object is not at the revision that the writer expected (or exists already)."""


class CompactedError(Exception):
    """The revision asked for is older than what the change log keeps (HTTP 410)."""


@dataclass(frozen=True, slots=True)
class Key:
    """Identity of an object: `resource` is `group/plural` (`/pods` for the core group)."""

    resource: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the change log; `body` is the object as JSON (its last state for DELETED)."""

    revision: int
    type: ChangeType
    key: Key
    body: bytes

    @property
    def object(self) -> Object:
        """The object, decoded anew at each call."""
        decoded: Object = orjson.loads(self.body)
        return decoded


class Store:
    """All objects of a cluster. Not thread-safe: one event loop owns it."""

    def __init__(self, path: Path | str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        row = self._db.execute("SELECT max(revision), min(revision) FROM changes").fetchone()
        self.revision: int = row[0] or 0
        self._oldest: int = row[1] or 1
        self._listeners: list[Callable[[Change], None]] = []

    def close(self) -> None:
        """Checkpoint and close."""
        self._db.close()

    def subscribe(self, listener: Callable[[Change], None]) -> Callable[[], None]:
        """Call `listener` with every later change; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def get(self, key: Key) -> Object | None:
        """The object, or None."""
        row = self._db.execute(
            "SELECT body FROM objects WHERE resource=? AND namespace=? AND name=?",
            (key.resource, key.namespace, key.name),
        ).fetchone()
        return orjson.loads(row[0]) if row else None

    def list(self, resource: str, namespace: str | None = None, after: str = "") -> Iterator[Object]:
        """Objects of a resource in (namespace, name) order, beyond the `namespace/name` in `after`."""
        query = "SELECT body FROM objects WHERE resource=?"
        parameters: list[str] = [resource]
        if namespace is not None:
            query += " AND namespace=?"
            parameters.append(namespace)
        if after:
            query += " AND (namespace, name) > (?, ?)"
            parameters += after.split("/", 1)
        rows = self._db.execute(query + " ORDER BY namespace, name", parameters).fetchall()
        return (orjson.loads(row[0]) for row in rows)

    def write(self, key: Key, obj: Object, expected: int | None) -> Object:
        """Create (`expected` None) or replace the object at revision `expected`.

        Sets `metadata.resourceVersion` and returns the stored object. Raises ConflictError.
        """
        row = self._current(key)
        if (row is None) != (expected is None) or (row is not None and row != expected):
            raise ConflictError(key.name)
        revision = self.revision + 1
        obj["metadata"]["resourceVersion"] = str(revision)
        body = orjson.dumps(obj)
        kind: ChangeType = "ADDED" if expected is None else "MODIFIED"
        self._commit(
            Change(revision, kind, key, body),
            "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?)",
            (key.resource, key.namespace, key.name, revision, body),
        )
        return obj

    def delete(self, key: Key, obj: Object) -> None:
        """Remove the object; watchers see `obj` as its last state."""
        revision = self.revision + 1
        obj["metadata"]["resourceVersion"] = str(revision)
        self._commit(
            Change(revision, "DELETED", key, orjson.dumps(obj)),
            "DELETE FROM objects WHERE resource=? AND namespace=? AND name=?",
            (key.resource, key.namespace, key.name),
        )

    def changes(self, resource: str, since: int) -> Iterator[Change]:
        """Changes of a resource after revision `since`. Raises CompactedError."""
        if since + 1 < self._oldest:
            raise CompactedError(f"too old resource version: {since} ({self._oldest})")
        rows = self._db.execute(
            "SELECT revision, type, body FROM changes WHERE resource=? AND revision>? ORDER BY revision",
            (resource, since),
        ).fetchall()
        for revision, kind, body in rows:
            metadata = orjson.loads(body)["metadata"]
            key = Key(resource, metadata.get("namespace", ""), metadata["name"])
            yield Change(revision, kind, key, body)

    def _current(self, key: Key) -> int | None:
        row = self._db.execute(
            "SELECT revision FROM objects WHERE resource=? AND namespace=? AND name=?",
            (key.resource, key.namespace, key.name),
        ).fetchone()
        return row[0] if row else None

    def _commit(self, change: Change, statement: str, parameters: tuple[object, ...]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute(statement, parameters)
            self._db.execute(
                "INSERT INTO changes VALUES (?, ?, ?, ?)",
                (change.revision, change.key.resource, change.type, change.body),
            )
            if change.revision % 1000 == 0:
                self._oldest = max(self._oldest, change.revision - KEEP_CHANGES)
                self._db.execute("DELETE FROM changes WHERE revision < ?", (self._oldest,))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self.revision = change.revision
        for listener in list(self._listeners):
            listener(change)

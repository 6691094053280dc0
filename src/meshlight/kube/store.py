"""Objects with revisions: all of them in memory as JSON, every change on disk in one SQLite file.

Every change takes the next revision and is one row of `revisions`; the newest row of a key is the object.
Reads never touch the disk. Changes of one turn of the event loop are committed together by a thread
(WAL, synchronous=FULL); watchers hear of a change, and callers of `durable` go on, once it is on disk. What
has gone out of the log of changes is compacted: superseded rows are deleted. Knows nothing of HTTP or of what
objects mean.
"""

from __future__ import annotations

import asyncio
import sqlite3
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import orjson

from meshlight.kube.resources import Object

ChangeType = Literal["ADDED", "MODIFIED", "DELETED"]

KEEP_CHANGES = 20_000
"""Changes that a watch can go back over; older ones are compacted away."""
KEEP_BYTES = 64 * 1024 * 1024
"""Bytes of objects that the log of changes may hold beside the objects themselves."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS revisions (
  revision INTEGER PRIMARY KEY, resource TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
  type TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS compaction (revision INTEGER NOT NULL);
"""


class ConflictError(Exception):
    """The object is not at the revision that the writer expected (or exists already)."""


class CompactedError(Exception):
    """The revision asked for is older than what the change log keeps (HTTP 410)."""


class FutureError(Exception):
    """The revision asked for has not been yet."""


@dataclass(frozen=True, slots=True)
class Key:
    """Identity of an object: `resource` is `group/plural` (`/pods` for the core group)."""

    resource: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the change log; `body` is the object as JSON (its last state for DELETED).

    `before` is the object as it was, where that is known: it makes lists of an earlier revision.
    """

    revision: int
    type: ChangeType
    key: Key
    body: bytes
    before: bytes | None = None

    @property
    def object(self) -> Object:
        """The object, decoded anew at each call."""
        decoded: Object = orjson.loads(self.body)
        return decoded


Name = tuple[str, str]
"""Namespace and name: the order of lists."""
Listener = Callable[[Change], None]


@dataclass(slots=True)
class _Shelf:
    """The objects of one resource, in order, and its part of the change log."""

    names: list[Name] = field(default_factory=list)
    bodies: dict[Name, tuple[int, bytes]] = field(default_factory=dict)
    log: deque[Change] = field(default_factory=deque)
    listeners: list[Listener] = field(default_factory=list)
    latest: int = 0

    def put(self, name: Name, revision: int, body: bytes) -> None:
        if name not in self.bodies:
            insort(self.names, name)
        self.bodies[name] = (revision, body)

    def remove(self, name: Name) -> None:
        del self.bodies[name]
        del self.names[bisect_left(self.names, name)]


class Store:
    """All objects of a cluster. One event loop owns it; only commits run in a thread of their own.

    Until `attach`, every write is on disk when it returns.
    """

    def __init__(self, path: Path | str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self._shelves: dict[str, _Shelf] = {}
        self._log: deque[Change] = deque()
        self._log_bytes = 0
        self._compacted = 0
        self._dead: list[int] = []
        self.revision = 0
        self._migrate()
        self._load()
        self._started = self.revision
        self.durable_revision = self.revision
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._pending: list[Change] = []
        self._committing = False
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._failed: Callable[[BaseException], None] | None = None

    def _migrate(self) -> None:
        """Take over the tables of the first builds."""
        tables = {row[0] for row in self._db.execute("SELECT name FROM sqlite_master WHERE type='table'")}
        if "objects" in tables:
            self._db.executescript("""
                BEGIN;
                INSERT OR IGNORE INTO revisions
                  SELECT revision, resource, namespace, name, 'ADDED', body FROM objects;
                INSERT INTO compaction SELECT coalesce(max(revision), 0) FROM revisions;
                DROP TABLE objects; DROP TABLE IF EXISTS changes;
                COMMIT;""")

    def _load(self) -> None:
        row = self._db.execute("SELECT max(revision) FROM compaction").fetchone()
        self._compacted = self.revision = row[0] or 0
        rows = self._db.execute(
            "SELECT revision, resource, namespace, name, type, body FROM revisions ORDER BY 1"
        )
        for revision, resource, namespace, name, kind, body in rows:
            change = Change(revision, kind, Key(resource, namespace, name), body)
            self.revision = max(self.revision, revision)
            self._place(change)
            if revision > self._compacted:
                self._remember(change)

    def close(self) -> None:
        """Wait for what is being written, then close."""
        self._writer.shutdown()
        if self._pending:
            self._commit(self._pending, *self._take_dead())
        self._db.close()

    def attach(self, failed: Callable[[BaseException], None]) -> None:
        """Commit in a thread from now on, for the running event loop; `failed` must not return to serving."""
        self._loop = asyncio.get_running_loop()
        self._failed = failed

    async def durable(self, revision: int) -> None:
        """Return once everything up to `revision` is on disk."""
        if revision > self.durable_revision:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((revision, future))
            await future

    def subscribe(self, resource: str, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every later change of a resource; returns what ends that."""
        listeners = self._shelf(resource).listeners
        listeners.append(listener)
        return lambda: listeners.remove(listener)

    def _shelf(self, resource: str) -> _Shelf:
        shelf = self._shelves.get(resource)
        if shelf is None:
            shelf = self._shelves[resource] = _Shelf()
        return shelf

    def latest(self, resource: str) -> int:
        """The revision of a resource's newest change; another after each change."""
        return self._shelf(resource).latest

    def body(self, key: Key) -> bytes | None:
        """The object as JSON, or None."""
        found = self._shelf(key.resource).bodies.get((key.namespace, key.name))
        return found[1] if found else None

    def get(self, key: Key) -> Object | None:
        """The object, decoded anew, or None."""
        found = self.body(key)
        return orjson.loads(found) if found is not None else None

    def objects(self, resource: str, namespace: str | None = None) -> Iterator[Object]:
        """Objects of a resource in (namespace, name) order, each decoded when it is reached."""
        return (orjson.loads(body) for _, body in self.bodies(resource, namespace))

    def bodies(
        self, resource: str, namespace: str | None = None, after: Name | None = None, at: int | None = None
    ) -> list[tuple[Name, bytes]]:
        """Objects as JSON in (namespace, name) order, beyond the name `after`, as they were at a revision.

        Raises CompactedError and FutureError.
        """
        shelf = self._shelf(resource)
        then = self._changed_since(shelf, at) if at is not None else {}
        names = sorted({*shelf.bodies, *then}) if then else shelf.names
        first = bisect_right(names, after) if after is not None else 0
        last = len(names)
        if namespace is not None:
            first = max(first, bisect_left(names, (namespace, "")))
            last = bisect_left(names, (namespace + "\0", ""))
        found = []
        bodies = shelf.bodies
        for name in names[first:last]:
            body = then[name] if name in then else bodies[name][1]
            if body is not None:
                found.append((name, body))
        return found

    def _changed_since(self, shelf: _Shelf, at: int) -> dict[Name, bytes | None]:
        """What objects that changed after a revision were at it: None for those that were not."""
        if at > self.revision:
            raise FutureError(f"Too large resource version: {at}, current: {self.revision}")
        then: dict[Name, bytes | None] = {}
        for change in reversed(shelf.log):
            if change.revision <= at:
                break
            then[change.key.namespace, change.key.name] = change.before
        if at < self._compacted or (then and at < self._started):
            raise CompactedError(f"too old resource version: {at} ({max(self._compacted, self._started)})")
        return then

    def write(self, key: Key, obj: Object, expected: int | None) -> Object:
        """Create (`expected` None) or replace the object at revision `expected`.

        Sets `metadata.resourceVersion` and returns the stored object. Raises ConflictError.
        """
        found = self._shelf(key.resource).bodies.get((key.namespace, key.name))
        if (found[0] if found else None) != expected:
            raise ConflictError(key.name)
        revision = self.revision + 1
        obj["metadata"]["resourceVersion"] = str(revision)
        kind: ChangeType = "MODIFIED" if found else "ADDED"
        self._append(Change(revision, kind, key, orjson.dumps(obj), found[1] if found else None))
        return obj

    def delete(self, key: Key, obj: Object) -> None:
        """Remove the object; watchers see `obj` as its last state."""
        before = self.body(key)
        revision = self.revision + 1
        obj["metadata"]["resourceVersion"] = str(revision)
        self._append(Change(revision, "DELETED", key, orjson.dumps(obj), before))

    def changes(self, resource: str, since: int) -> list[Change]:
        """Durable changes of a resource after revision `since`. Raises CompactedError, FutureError."""
        if since < self._compacted:
            raise CompactedError(f"too old resource version: {since} ({self._compacted})")
        if since > self.revision:
            raise FutureError(f"Too large resource version: {since}, current: {self.revision}")
        found = []
        for change in reversed(self._shelf(resource).log):
            if change.revision <= since:
                break
            if change.revision <= self.durable_revision:
                found.append(change)
        found.reverse()
        return found

    def _append(self, change: Change) -> None:
        old = self._shelf(change.key.resource).bodies.get((change.key.namespace, change.key.name))
        if old is not None and old[0] <= self._compacted:
            self._dead.append(old[0])
        self.revision = change.revision
        self._place(change)
        self._remember(change)
        self._compact()
        if self._loop is None:
            self._commit([change], *self._take_dead())
            self._publish([change])
            return
        self._pending.append(change)
        if not self._committing:
            self._committing = True
            self._loop.call_soon(self._start_commit)

    def _place(self, change: Change) -> None:
        shelf, name = self._shelf(change.key.resource), (change.key.namespace, change.key.name)
        shelf.latest = change.revision
        if change.type != "DELETED":
            shelf.put(name, change.revision, change.body)
        elif name in shelf.bodies:
            shelf.remove(name)

    def _remember(self, change: Change) -> None:
        self._log.append(change)
        self._log_bytes += len(change.body)
        self._shelf(change.key.resource).log.append(change)

    def _compact(self) -> None:
        """Forget the oldest changes beyond the bounds; their rows go with the next commit."""
        while len(self._log) > KEEP_CHANGES or self._log_bytes > KEEP_BYTES:
            oldest = self._log.popleft()
            self._log_bytes -= len(oldest.body)
            shelf = self._shelf(oldest.key.resource)
            shelf.log.popleft()
            self._compacted = oldest.revision
            live = shelf.bodies.get((oldest.key.namespace, oldest.key.name))
            if live is None or live[0] != oldest.revision:
                self._dead.append(oldest.revision)

    def _start_commit(self) -> None:
        assert self._loop is not None
        changes, self._pending = self._pending, []
        done = self._loop.run_in_executor(self._writer, self._commit, changes, *self._take_dead())
        done.add_done_callback(lambda future: self._committed(future, changes))

    def _committed(self, future: asyncio.Future[None], changes: list[Change]) -> None:
        if error := future.exception():
            assert self._failed is not None
            self._failed(error)
            return
        self._publish(changes)
        if self._pending:
            self._start_commit()
        else:
            self._committing = False

    def _take_dead(self) -> tuple[list[int], int]:
        """The rows to delete now, and the revision up to which the log is compacted then."""
        dead, self._dead = self._dead, []
        return dead, self._compacted

    def _commit(self, changes: Iterable[Change], dead: list[int], compacted: int) -> None:
        rows = [(c.revision, c.key.resource, c.key.namespace, c.key.name, c.type, c.body) for c in changes]
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany("INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?)", rows)
            if dead:
                self._db.executemany("DELETE FROM revisions WHERE revision=?", ((r,) for r in dead))
                self._db.execute("DELETE FROM compaction")
                self._db.execute("INSERT INTO compaction VALUES (?)", (compacted,))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def _publish(self, changes: list[Change]) -> None:
        """Tell watchers and waiting callers of changes that are on disk."""
        self.durable_revision = changes[-1].revision
        for change in changes:
            for listener in tuple(self._shelf(change.key.resource).listeners):
                listener(change)
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for revision, future in waiting:
                if revision > self.durable_revision:
                    self._waiting.append((revision, future))
                elif not future.done():
                    future.set_result(None)

"""Reads: one object, lists in pages of one consistent revision, watches.

Parses the query parameters of reads and answers with encoded bodies; knows nothing of HTTP.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass

import orjson

from meshlight.kube import selectors, watch
from meshlight.kube.representation import Representation
from meshlight.kube.resources import Object
from meshlight.kube.rest import Rest, Target
from meshlight.kube.selectors import Predicate
from meshlight.kube.status import StatusError, bad_request
from meshlight.kube.store import Change, CompactedError, FutureError, Name

Query = Mapping[str, str]
LARGE = 1_000
"""Objects of a list beyond which it is encoded in a thread: 10,000 pods as a table take half a second."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a read chooses of a collection; `matches` is None when it takes everything."""

    matches: Predicate | None
    name: str = ""

    @classmethod
    def of(cls, target: Target, query: Query) -> Selection:
        """From a request's selectors. Raises StatusError 400."""
        by_label, by_field = query.get("labelSelector", ""), query.get("fieldSelector", "")
        if not by_label and not by_field:
            return cls(None)
        try:
            found = selectors.matcher(by_label, by_field, target.served)
        except ValueError as error:
            raise bad_request(str(error)) from error
        name = by_field.removeprefix("metadata.name=")
        exact = name != by_field and not set(name) & set(",=!") and not by_label
        return cls(found, name if exact else "")


@dataclass(frozen=True, slots=True)
class _Continuation:
    """Where a list in pages goes on; revision 0 takes what is there now."""

    revision: int
    after: Name

    def encode(self) -> str:
        token = orjson.dumps({"v": "meta.k8s.io/v1", "rv": self.revision, "start": "/".join(self.after)})
        return base64.urlsafe_b64encode(token).decode().rstrip("=")

    @classmethod
    def decode(cls, token: str) -> _Continuation:
        try:
            found = orjson.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
            namespace, _, name = found["start"].partition("/")
            return cls(int(found["rv"]), (namespace, name))
        except (binascii.Error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise bad_request(f"continue key is not valid: {error}") from error


def number(query: Query, name: str) -> int:
    """A parameter that is a whole number, 0 when absent. Raises StatusError 400."""
    text = query.get(name) or "0"
    if not text.isdigit():
        raise bad_request(f"{name}: Invalid value: {text!r}: must be a whole number, not negative")
    return int(text)


def expired(error: Exception) -> StatusError:
    """410: the revision is not kept any more."""
    return StatusError(410, "Expired", str(error))


def too_new(error: Exception) -> StatusError:
    """504: the revision is not there yet."""
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    details: Object = {"causes": [cause], "retryAfterSeconds": 1}
    return StatusError(504, "Timeout", str(error), details)


@dataclass(frozen=True, slots=True)
class Page:
    """What a list shall answer; nothing in it changes any more, so that it can be encoded anywhere."""

    found: list[tuple[Name, bytes]]
    selection: Selection
    limit: int
    revision: int

    def encode(self, shape: Representation) -> bytes:
        """The answer."""
        metadata: Object = {"resourceVersion": str(self.revision)}
        bodies: list[bytes] = []
        last: Name = ("", "")
        matches = self.selection.matches
        for index, (name, body) in enumerate(self.found):
            if matches is not None and not matches(shape.decoded(body)):
                continue
            if self.limit and len(bodies) == self.limit:
                metadata["continue"] = _Continuation(self.revision, last).encode()
                if matches is None:
                    metadata["remainingItemCount"] = len(self.found) - index
                break
            bodies.append(body)
            last = name
        return shape.many(bodies, metadata)

    @property
    def large(self) -> bool:
        """Whether to encode it takes so long that others should have their turns meanwhile."""
        looked_at = len(self.found) if self.selection.matches is not None or not self.limit else self.limit
        return looked_at > LARGE


class Reader:
    """Reads over one Rest."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest
        self._store = rest.store

    def object(self, target: Target, shape: Representation) -> bytes:
        """One object. Raises StatusError 404."""
        if target.subresource == "scale":
            return shape.shown(self._rest.get(target))
        body = self._store.body(target.key)
        if body is None:
            raise target.missing()
        return shape.one(body)

    def page(self, target: Target, query: Query) -> Page:
        """A collection, or a page of it, as it is now. Raises StatusError 400, 410, 504."""
        limit, token = number(query, "limit"), query.get("continue", "")
        selection = Selection.of(target, query)
        revision, at, after = self._store.revision, None, None
        if token:
            if query.get("resourceVersion") not in (None, "", "0"):
                raise bad_request("specifying resource version is not allowed when using continue")
            going_on = _Continuation.decode(token)
            after = going_on.after
            if going_on.revision:
                revision = at = going_on.revision
        else:
            at = self._exact(query, limit)
            revision = at or revision
        try:
            found = self._bodies(target, selection, after, at)
        except CompactedError as error:
            raise self._expired_list(error, after) if token else expired(error) from error
        except FutureError as error:
            raise too_new(error) from error
        return Page(found, selection, limit, revision)

    def names(self, target: Target, query: Query) -> list[Name]:
        """What a collection's selectors choose, by namespace and name. Raises StatusError 400."""
        selection, shape = Selection.of(target, query), Representation(target.served, self._rest.presented)
        found = self._bodies(target, selection, None, None)
        return [n for n, body in found if selection.matches is None or selection.matches(shape.decoded(body))]

    def _exact(self, query: Query, limit: int) -> int | None:
        """The revision that a list must be of, or None for the newest. Raises StatusError 400, 504."""
        stated, match = query.get("resourceVersion") or "", query.get("resourceVersionMatch") or ""
        if match not in ("", "Exact", "NotOlderThan"):
            raise bad_request(f'resourceVersionMatch: Unsupported value: "{match}"')
        if match and not stated:
            raise bad_request("resourceVersionMatch is forbidden unless resourceVersion is provided")
        if stated and not stated.isdigit():
            raise bad_request(f"resourceVersion: Invalid value: {stated!r}")
        if match == "Exact" and stated == "0":
            raise bad_request('resourceVersionMatch "Exact" is forbidden for resourceVersion "0"')
        asked = int(stated or 0)
        if match == "Exact" or (not match and limit and asked):
            return asked
        if asked > self._store.revision:
            raise too_new(FutureError(f"Too large resource version: {asked}, current: {self._store.revision}"))
        return None

    def _bodies(
        self, target: Target, selection: Selection, after: Name | None, at: int | None
    ) -> list[tuple[Name, bytes]]:
        if selection.name and target.namespace is not None and at is None:
            name = (target.namespace, selection.name)
            body = self._store.body(Target(target.served, *name).key)
            return [(name, body)] if body is not None and (after is None or name > after) else []
        return self._store.bodies(target.served.storage_key, target.namespace, after, at)

    def _expired_list(self, error: CompactedError, after: Name | None) -> StatusError:
        """410 with a token by which the client may go on inconsistently, as Kubernetes gives one."""
        assert after is not None
        message = (
            "The provided continue parameter is too old to display a consistent list result. You can start a "
            "new list without the continue parameter, or use the continue token in this response to retrieve "
            "the remainder of the results. Continuing with the provided token results in an inconsistent list "
            "- objects that were created, modified, or deleted between the time the first chunk was returned "
            "and now may show up in the list."
        )
        refused = StatusError(410, "Expired", message)
        refused.metadata["continue"] = _Continuation(0, after).encode()
        return refused

    def events(self, target: Target, query: Query, shape: Representation) -> AsyncIterator[bytes]:
        """Events of a collection (or of one object by name). Raises StatusError 400 before it starts."""
        selection = Selection.of(target, query)
        if target.name:
            selection = Selection(lambda obj: bool(obj["metadata"]["name"] == target.name), target.name)
        stated = query.get("resourceVersion") or "0"
        if not stated.isdigit():
            raise bad_request(f"resourceVersion: Invalid value: {stated!r}")
        bookmarks = query.get("allowWatchBookmarks") in ("true", "1")
        wanted = query.get("sendInitialEvents") in ("true", "1")
        if wanted and query.get("resourceVersionMatch") != "NotOlderThan":
            raise bad_request("sendInitialEvents requires setting resourceVersionMatch to NotOlderThan")
        since = int(stated)
        initial: Iterator[bytes] = iter(())
        if wanted or ("sendInitialEvents" not in query and since == 0):
            since = self._store.revision
            found = self._bodies(target, selection, None, None)
            initial = self._initial(found, selection, shape, since if wanted and bookmarks else None)
        elif since == 0:
            since = self._store.revision
        return self._events(target, since, self._encoder(target, selection, shape), shape, initial, bookmarks)

    @staticmethod
    def _initial(
        found: list[tuple[Name, bytes]], selection: Selection, shape: Representation, end: int | None
    ) -> Iterator[bytes]:
        """What is there, as ADDED events, and the bookmark that says that it was all."""
        for _, body in found:
            if selection.matches is None or selection.matches(shape.decoded(body)):
                yield shape.event("ADDED", body)
        if end is not None:
            yield shape.bookmark(end, initial_end=True)

    async def _events(
        self,
        target: Target,
        since: int,
        encode: watch.Encode,
        shape: Representation,
        initial: Iterator[bytes],
        bookmarks: bool,
    ) -> AsyncIterator[bytes]:
        await self._store.durable(min(since, self._store.revision))
        try:
            async for events in watch.stream(
                self._store,
                target.served.storage_key,
                since,
                encode,
                bookmark=shape.bookmark if bookmarks else None,
                initial=initial,
            ):
                yield events
        except CompactedError as error:  # told in the stream, as Kubernetes' watch cache does
            yield orjson.dumps({"type": "ERROR", "object": expired(error).body()}) + b"\n"
        except FutureError as error:
            yield orjson.dumps({"type": "ERROR", "object": too_new(error).body()}) + b"\n"

    @staticmethod
    def _encoder(
        target: Target, selection: Selection, shape: Representation
    ) -> Callable[[Change], bytes | None]:
        """Events for this reader: an object that stops matching is DELETED, one that starts is ADDED."""
        namespace, matches = target.namespace, selection.matches

        def encode(change: Change) -> bytes | None:
            if namespace is not None and change.key.namespace != namespace:
                return None
            if matches is None:
                return shape.event(change.type, change.body)
            if selection.name and change.key.name != selection.name:
                return None
            now = matches(shape.decoded(change.body))
            if change.type != "MODIFIED":
                return shape.event(change.type, change.body) if now else None
            before = now if change.before is None else matches(shape.decoded(change.before))
            if now:
                return shape.event("MODIFIED" if before else "ADDED", change.body)
            return shape.event("DELETED", change.body) if before or change.before is None else None

        return encode

"""The audit log: who asked for what, when, and how it was answered; one JSON event a line.

A policy decides how much of a request is kept. Secrets, tokens and their reviews are never kept with their
bodies. The file is rotated; events are written behind the answer, from a bounded buffer.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import orjson

from meshlight.kube.authentication import User
from meshlight.kube.resources import Object
from meshlight.kube.rest import Target

Level = Literal["None", "Metadata", "Request"]

MAX_BYTES = 32 * 1024 * 1024
KEEP_FILES = 4
MAX_WAITING = 5_000
"""Events that wait to be written; what comes beyond is counted, not kept."""
MAX_OBJECT = 64 * 1024
FLUSH_SECONDS = 0.5

_READS = frozenset(("get", "list", "watch"))
_CONFIDENTIAL = frozenset(
    (("", "secrets"), ("", "configmaps"), ("", "serviceaccounts/token"),
     ("authentication.k8s.io", "tokenreviews"))
)  # fmt: skip
_NOISE = frozenset((("", "events"), ("events.k8s.io", "events"), ("coordination.k8s.io", "leases")))
_WHOLE = frozenset(("rbac.authorization.k8s.io", "admissionregistration.k8s.io", "apiregistration.k8s.io"))


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, as the audit log tells of it."""

    verb: str
    uri: str
    user: User
    impersonator: User | None
    source: str
    agent: str
    target: Target | None


def level(verb: str, target: Target | None) -> Level:
    """How much of a request is kept, by the policy."""
    if target is None:
        return "None"
    r = target.served.resource
    plural = f"{r.plural}/{target.subresource}" if target.subresource else r.plural
    if (r.group, plural) in _CONFIDENTIAL:
        return "Metadata" if verb not in _READS or r.plural == "secrets" else "None"
    if verb in _READS or (r.group, r.plural) in _NOISE:
        return "None"
    if r.group in _WHOLE:
        return "Request"
    return "Metadata"


def event(asked: Asked, code: int, message: str, body: object, received: float, now: float) -> Object | None:
    """The event of a request, as audit.k8s.io/v1 has it; None when the policy keeps nothing."""
    kept = level(asked.verb, asked.target)
    if kept == "None" or asked.target is None:
        return None
    target, r = asked.target, asked.target.served.resource
    found: Object = {
        "kind": "Event",
        "apiVersion": "audit.k8s.io/v1",
        "level": kept,
        "auditID": str(uuid.uuid4()),
        "stage": "ResponseComplete",
        "requestURI": asked.uri,
        "verb": asked.verb,
        "user": asked.user.review(),
        "sourceIPs": [asked.source],
        "userAgent": asked.agent,
        "objectRef": {
            k: v
            for k, v in (
                ("resource", r.plural), ("namespace", target.namespace), ("name", target.name),
                ("apiGroup", r.group), ("apiVersion", r.version), ("subresource", target.subresource),
            )
            if v
        },
        "responseStatus": {"metadata": {}, "code": code, **({"message": message} if message else {})},
        "requestReceivedTimestamp": _micro(received),
        "stageTimestamp": _micro(now),
    }  # fmt: skip
    if asked.impersonator is not None:
        found["user"], found["impersonatedUser"] = asked.impersonator.review(), asked.user.review()
    if kept == "Request" and body and len(orjson.dumps(body)) <= MAX_OBJECT:
        found["requestObject"] = body
    return found


def _micro(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class AuditLog:
    """The file, and the events that wait for it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._waiting: list[bytes] = []
        self._flushing = False
        self.dropped = 0

    def note(self, asked: Asked, code: int, message: str, body: object, received: float) -> None:
        """Keep the event of a request that has been answered."""
        found = event(asked, code, message, body, received, self._clock())
        if found is None:
            return
        if len(self._waiting) >= MAX_WAITING:
            self.dropped += 1
            return
        self._waiting.append(orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE))
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._start)

    def _start(self) -> None:
        lines, self._waiting = self._waiting, []
        done = asyncio.get_running_loop().run_in_executor(None, self.write, lines)
        done.add_done_callback(self._ended)

    def _ended(self, done: asyncio.Future[None]) -> None:
        self._flushing = False
        done.exception()  # a full disk must not stop the API; what was not written is gone
        if self._waiting:
            self._flushing = True
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._start)

    def close(self) -> None:
        """Write what waits."""
        lines, self._waiting = self._waiting, []
        self.write(lines)

    def write(self, lines: list[bytes]) -> None:
        """Append lines, in a new file when the last is full."""
        if not lines:
            return
        with open(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
            file.write(b"".join(lines))
            full = file.tell() >= MAX_BYTES
        if full:
            self._rotate()

    def _rotate(self) -> None:
        numbered = [self._path.with_name(f"{self._path.name}.{n}") for n in range(1, KEEP_FILES)]
        for older, newer in zip(reversed(numbered), [*reversed(numbered[:-1]), self._path], strict=True):
            if newer.exists():
                newer.replace(older)

"""What every request passes: a bound on how many there are, authentication, impersonation, errors, audit.

Answers leave once what they tell of is on disk.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

from meshlight.kube import requests
from meshlight.kube.audit import Asked, AuditLog
from meshlight.kube.authentication import User, impersonated
from meshlight.kube.authorization import SUPERUSERS, Authorizer
from meshlight.kube.requests import BODY, TARGET, USER, WARNINGS, answer
from meshlight.kube.status import StatusError
from meshlight.kube.store import CompactedError, FutureError, Store

OPEN_PATHS = frozenset(("/healthz", "/readyz", "/livez"))
MAX_IN_FLIGHT = 600
MAX_OF_ONE_USER = 300
"""Requests at a time, watches and streams left out: of all users, and of one that is no administrator."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
IMPERSONATOR: web.RequestKey[User] = web.RequestKey("impersonator", User)


@dataclass
class InFlight:
    """How many requests are being served, of all and of each user."""

    total: int = 0
    of_user: Counter[str] = field(default_factory=Counter)

    def enter(self, user: User) -> None:
        """Count a request in. Raises StatusError 429 beyond a bound."""
        own = 0 if SUPERUSERS in user.groups else self.of_user[user.name]
        if self.total >= MAX_IN_FLIGHT or own >= MAX_OF_ONE_USER:
            message = "too many requests, please try again later"
            raise StatusError(429, "TooManyRequests", message, {"retryAfterSeconds": 1})
        self.total += 1
        self.of_user[user.name] += 1

    def leave(self, user: User) -> None:
        """Count it out."""
        self.total -= 1
        self.of_user[user.name] -= 1
        if not self.of_user[user.name]:
            del self.of_user[user.name]


class Guard:
    """The middleware."""

    def __init__(
        self,
        store: Store,
        authenticate: Callable[[web.Request], User],
        authorizer: Authorizer,
        audit: AuditLog | None,
        log: Callable[..., None],
    ) -> None:
        self._store = store
        self._authenticate = authenticate
        self._authorizer = authorizer
        self._audit = audit
        self._log = log
        self.in_flight = InFlight()

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Serve a request."""
        received, message = time.time(), ""
        try:
            response = await self._admitted(request, handler)
        except StatusError as error:
            response, message = answer(error.body(), error.code), error.message
            if seconds := error.details.get("retryAfterSeconds"):
                response.headers["Retry-After"] = str(seconds)
        except CompactedError as error:
            response = answer(StatusError(410, "Expired", str(error)).body(), 410)
        except FutureError as error:
            response = answer(StatusError(504, "Timeout", str(error)).body(), 504)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except web.HTTPException as error:
            refused = requests.no_such_path() if error.status == 404 else requests.not_allowed()
            response = answer(refused.body(), refused.code)
        except Exception as error:
            self._log("request failed", path=request.path, error=repr(error), trace=traceback.format_exc())
            broken = StatusError(500, "InternalError", f"Internal error occurred: {error!r}")
            response, message = answer(broken.body(), 500), broken.message
        if not response.prepared:
            if warnings := request.get(WARNINGS):
                requests.warned(response, warnings)
            await self._store.durable(self._store.revision)
        if self._audit is not None and (user := request.get(USER)) is not None:
            self._audit.note(self._asked(request, user), response.status, message, request.get(BODY), received)
        return response

    async def _admitted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in OPEN_PATHS:
            return await handler(request)
        user = self._authenticate(request)
        if "Impersonate-User" in request.headers or "Impersonate-Group" in request.headers:
            acting = impersonated(request.headers, lambda asked: self._authorizer.check(user, asked))
            request[IMPERSONATOR], user = user, acting
        request[USER] = user
        if requests.is_watch(request) or "Upgrade" in request.headers or "follow" in request.query:
            return await handler(request)
        self.in_flight.enter(user)
        try:
            return await handler(request)
        finally:
            self.in_flight.leave(user)

    @staticmethod
    def _asked(request: web.Request, user: User) -> Asked:
        target = request.get(TARGET)
        verb = requests.verb_of(request, target) if target is not None else request.method.lower()
        return Asked(
            verb,
            request.path_qs,
            user,
            request.get(IMPERSONATOR),
            request.remote or "",
            request.headers.get("User-Agent", ""),
            target,
        )

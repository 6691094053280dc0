"""From a request to its user: bearer tokens and client certificates, each checked once and then remembered."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakKeyDictionary

from aiohttp import web

from meshlight.kube.authentication import User, from_certificate, unauthorized
from meshlight.kube.tokens import ISSUER, InvalidToken, TokenIssuer

REMEMBER_SECONDS = 10.0
"""A token is good for this long after it was checked, as in Kubernetes' token cache."""
REMEMBER_TOKENS = 2_000


class Credentials:
    """Authentication of requests."""

    def __init__(
        self, tokens: TokenIssuer, log: Callable[..., None], clock: Callable[[], float] = time.time
    ) -> None:
        self._tokens = tokens
        self._log = log
        self._clock = clock
        self._checked: OrderedDict[str, tuple[float, User]] = OrderedDict()
        self._of_session: WeakKeyDictionary[object, User] = WeakKeyDictionary()

    def user(self, request: web.Request) -> User:
        """The user of a bearer token or of a verified client certificate. Raises StatusError 401."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._of_token(token.strip())
        transport = request.transport
        session = transport.get_extra_info("ssl_object") if transport is not None else None
        if session is None:
            raise unauthorized()
        user = self._of_session.get(session)
        if user is None:
            user = self._of_session[session] = from_certificate(session.getpeercert())
        return user

    def _of_token(self, token: str) -> User:
        now = self._clock()
        known = self._checked.get(token)
        if known is not None and known[0] > now:
            return known[1]
        try:
            user = self._tokens.check(token, (ISSUER,), now).user
        except InvalidToken as error:
            self._checked.pop(token, None)
            self._log("token refused", reason=str(error))
            raise unauthorized() from error
        self._checked[token] = (now + REMEMBER_SECONDS, user)
        if len(self._checked) > REMEMBER_TOKENS:
            self._checked.popitem(last=False)
        return user

"""Pulls from a registry by the distribution API, over connections that the caller dials.

Only registries that the user named are asked. Authentication: none, basic, or bearer tokens of the realm that
the registry names. Redirects are followed without credentials.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from socket import socket
from typing import BinaryIO, cast
from urllib.parse import urlencode, urljoin, urlsplit

from meshlight.kube.resources import Object
from meshlight.node.oci.model import INDEXES, MANIFESTS, Descriptor, ImageError, Manifest, choose
from meshlight.node.oci.reference import RegistryImage
from meshlight.node.oci.sources import MOST_JSON, Found, decoded, verified

Dial = Callable[[str, int], socket]
_TIMEOUT = 60.0
_REDIRECTS = 5
_CHALLENGE = re.compile(r'([a-zA-Z_]+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Registry:
    """A registry that the user named: what images call it, where it is, and whom it must prove to be."""

    host: str
    server: str
    authority: str = ""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and password."""

    user: str
    password: str

    def basic(self) -> str:
        """As an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def credentials(secret: Object) -> dict[str, Credentials]:
    """What a Secret of type kubernetes.io/dockerconfigjson says, by host; nothing if it says nothing."""
    try:
        raw = base64.b64decode((secret.get("data") or {})[".dockerconfigjson"])
        found = json.loads(raw)["auths"]
        made = {}
        for server, entry in found.items():
            host = urlsplit(server if "//" in server else f"//{server}").netloc
            if "auth" in entry:
                user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
            else:
                user, password = str(entry["username"]), str(entry["password"])
            made[host] = Credentials(user, password)
        return made
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def registries(entries: Mapping[str, str]) -> dict[str, Registry]:
    """The ConfigMap's entries by host: `NAME: HOST [URL]`, with a CA in `NAME.crt`.

    What cannot be read is left out.
    """
    found = {}
    for key, value in entries.items():
        words = value.split()
        if key.endswith(".crt") or not words or len(words) > 2:
            continue
        host = words[0]
        server = words[1] if len(words) > 1 else f"https://{host}"
        if urlsplit(server).scheme in ("http", "https") and urlsplit(server).hostname:
            found[host] = Registry(host, server.rstrip("/"), entries.get(f"{key}.crt", ""))
    return found


class _Plain(http.client.HTTPConnection):
    """HTTP over a dialled connection."""

    def __init__(self, host: str, port: int, dial: Dial, tls: ssl.SSLContext | None) -> None:
        super().__init__(host, port, timeout=_TIMEOUT)
        self._dial, self._tls = dial, tls

    def connect(self) -> None:
        made = self._dial(self.host, self.port)
        made.settimeout(_TIMEOUT)
        self.sock = self._tls.wrap_socket(made, server_hostname=self.host) if self._tls else made


class RegistrySource:
    """One image of a registry."""

    def __init__(
        self, registry: Registry, image: RegistryImage, credentials: Credentials | None, dial: Dial
    ) -> None:
        self._registry, self._image, self._credentials, self._dial = registry, image, credentials, dial
        self._authorization = credentials.basic() if credentials else ""
        self._tls = ssl.create_default_context(cadata=registry.authority or None)

    def find(self) -> Found:
        """The manifest, through an index if there is one, for this machine's platform."""
        accept = ", ".join((*MANIFESTS, *INDEXES))
        version = self._image.version
        content, media, digest = self._manifest(version, accept)
        verified(content, self._image.digest, f"manifest {version}")
        if media in INDEXES or "manifests" in decoded(content, "the manifest"):
            chosen = choose(decoded(content, "the index"))
            content, _, digest = self._manifest(chosen.digest, accept)
            verified(content, chosen.digest, "the manifest")
        manifest = Manifest.of(decoded(content, "the manifest"))
        with self.blob(manifest.config) as stream:
            config = stream.read(MOST_JSON + 1)
        verified(config, manifest.config.digest, "the image's configuration")
        return Found(digest, config, manifest.layers)

    def _manifest(self, version: str, accept: str) -> tuple[bytes, str, str]:
        """A manifest's bytes, media type and digest."""
        with self._get(f"manifests/{version}", accept) as answer:
            content = answer.read(MOST_JSON + 1)
            media = (answer.getheader("Content-Type") or "").partition(";")[0]
        if len(content) > MOST_JSON:
            raise ImageError(f"manifest {version} is larger than {MOST_JSON} bytes")
        return content, media, f"sha256:{hashlib.sha256(content).hexdigest()}"

    @contextlib.contextmanager
    def _blob(self, layer: Descriptor) -> Iterator[BinaryIO]:
        with self._get(f"blobs/{layer.digest}", "*/*") as answer:
            try:
                yield cast(BinaryIO, answer)
            except (http.client.HTTPException, TimeoutError) as error:
                raise ImageError(
                    f"registry {self._registry.host} broke off in {layer.digest}: {error}"
                ) from None

    def blob(self, layer: Descriptor) -> AbstractContextManager[BinaryIO]:
        """A layer's bytes as they come."""
        return self._blob(layer)

    @contextlib.contextmanager
    def _get(self, path: str, accept: str) -> Iterator[http.client.HTTPResponse]:
        """GET below the repository. Raises ImageError with what the registry said."""
        url = f"{self._registry.server}/v2/{self._image.repository}/{path}"
        headers = {"Accept": accept, "User-Agent": "meshlight"}
        if self._authorization:
            headers["Authorization"] = self._authorization
        challenged = False
        for _ in range(_REDIRECTS):
            connection, answer = self._ask(url, headers)
            try:
                if answer.status == 200:
                    yield answer
                    return
                if answer.status in (301, 302, 303, 307, 308) and (target := answer.getheader("Location")):
                    url = urljoin(url, target)
                    if urlsplit(url).netloc != urlsplit(self._registry.server).netloc:
                        headers.pop("Authorization", None)  # not theirs to know
                elif answer.status == 401 and not challenged:
                    challenged = True
                    headers["Authorization"] = self._authorize(answer.getheader("WWW-Authenticate") or "")
                else:
                    raise ImageError(self._refused(answer, path))
            finally:
                connection.close()
        raise ImageError(f"registry {self._registry.host} redirects without end")

    def _ask(
        self, url: str, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ImageError(f"registry {self._registry.host} leads to {url!r:.200}")
        secure = parts.scheme == "https"
        tls = self._tls if secure else None
        connection = _Plain(parts.hostname, parts.port or (443 if secure else 80), self._dial, tls)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request("GET", target, headers=dict(headers))
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ImageError(f"registry {self._registry.host} at {parts.netloc}: {error}") from None

    def _authorize(self, challenge: str) -> str:
        """The Authorization that a challenge asks for; a token is kept for what follows."""
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic" and self._credentials:
            self._authorization = self._credentials.basic()
            return self._authorization
        asked = dict(_CHALLENGE.findall(rest))
        if scheme.lower() != "bearer" or "realm" not in asked:
            raise ImageError(
                f"registry {self._registry.host} asks for credentials: give the pod imagePullSecrets"
            )
        query = {key: asked[key] for key in ("service", "scope") if key in asked}
        headers = {"Accept": "application/json"}
        if self._credentials:
            headers["Authorization"] = self._credentials.basic()
        connection, answer = self._ask(f"{asked['realm']}?{urlencode(query)}", headers)
        try:
            if answer.status != 200:
                raise ImageError(self._refused(answer, "token"))
            token = decoded(answer.read(MOST_JSON), "the token")
        finally:
            connection.close()
        self._authorization = f"Bearer {token.get('token') or token.get('access_token') or ''}"
        return self._authorization

    def _refused(self, answer: http.client.HTTPResponse, path: str) -> str:
        words = ""
        with contextlib.suppress(ImageError, AttributeError, IndexError, TypeError, OSError):
            words = decoded(answer.read(MOST_JSON), "the refusal")["errors"][0]["message"]
        where = f"registry {self._registry.host}, {self._image.repository}, {path}"
        return f"{where}: {answer.status} {answer.reason}" + (f": {words}" if words else "")

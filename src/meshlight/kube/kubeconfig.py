"""Kubeconfigs: the server, its authority and the credentials of one context."""

from __future__ import annotations

import base64
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class Connection:
    """What a context says: the base URL, TLS with a client certificate if it has one, a token if it has one."""

    server: str
    tls: ssl.SSLContext
    token: str | None


def load(path: Path, context: str | None = None) -> Connection:
    """Read a context, by default the current one. Raises ValueError naming what is missing."""
    config = yaml.safe_load(path.read_text())
    context_name = context or config.get("current-context")

    def named(section: str, name: str, key: str) -> dict[str, Any]:
        for entry in config.get(section) or []:
            if entry["name"] == name:
                return entry.get(key) or {}
        raise ValueError(f"{path}: no {key} named {name!r} in {section}")

    chosen = named("contexts", context_name, "context")
    cluster = named("clusters", chosen["cluster"], "cluster")
    user = named("users", chosen["user"], "user")

    def material(owner: dict[str, Any], key: str) -> str | None:
        if f"{key}-data" in owner:
            return base64.b64decode(owner[f"{key}-data"]).decode()
        return (path.parent / owner[key]).read_text() if key in owner else None

    tls = ssl.create_default_context(cadata=material(cluster, "certificate-authority"))
    certificate, key = material(user, "client-certificate"), material(user, "client-key")
    if certificate and key:
        # ssl only loads a chain from files; the file is gone again before we return.
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:
            pem.write(certificate + "\n" + key)
            pem.flush()
            tls.load_cert_chain(pem.name)
    return Connection(cluster["server"].rstrip("/"), tls, user.get("token"))

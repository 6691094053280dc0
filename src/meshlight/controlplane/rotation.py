"""Changing the mesh's root without a moment in which two workloads do not trust each other.

Three steps, kept in the Secret itself so that they survive a restart and any number of replicas agree:

1. `distribute`: a new root is made; both are trusted, the old one still signs.
2. `switch`: the new one signs; both are trusted.
3. `retire`: only the new one is trusted.

Between two steps every certificate issued before must have been replaced, because workloads learn roots
with their certificates. That is certain once the longest of them has expired; an operator who has made the
node proxies fetch theirs anew (`meshlight ca rotate` restarts them) may go on at once. Pure.
"""

from __future__ import annotations

import base64
import copy
import datetime
from dataclasses import dataclass
from enum import Enum

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from meshlight.controlplane.authority import Authority, AuthorityError
from meshlight.kube.resources import Object

ANNOTATION = "meshlight.dev/root-rotation"
"""On the Secret: an operator writes `start`, `switch` or `retire`; istiod writes the step with its time."""

LONGEST = "meshlight.dev/longest-certificate-seconds"
"""The longest life of a certificate granted so far, where it is over the default."""

_NEXT_KEY, _NEXT_CERTIFICATE = "next-ca-key.pem", "next-ca-cert.pem"


class Phase(Enum):
    """Where a rotation stands."""

    NONE = "none"
    DISTRIBUTING = "distributing"
    SWITCHED = "switched"


@dataclass(frozen=True, slots=True)
class Rotation:
    """Where a rotation stands, since when, and what an operator asks for."""

    phase: Phase
    since: datetime.datetime | None = None
    requested: str = ""


def read(secret: Object) -> Rotation:
    """The rotation a Secret records; raises AuthorityError when its annotation cannot be understood."""
    text = (secret["metadata"].get("annotations") or {}).get(ANNOTATION, "")
    stored = secret.get("data") or {}
    words = text.split()
    requested = words.pop() if words and words[-1] in ("start", "switch", "retire") else ""
    if not words:
        return Rotation(Phase.DISTRIBUTING if _NEXT_KEY in stored else Phase.NONE, None, requested)
    try:
        phase, since = Phase(words[0]), datetime.datetime.fromisoformat(words[1])
    except (ValueError, IndexError) as error:
        raise AuthorityError(f"annotation {ANNOTATION}: {text!r} is not a step of a rotation") from error
    return Rotation(phase, since, requested)


def due(rotation: Rotation, longest: datetime.timedelta) -> datetime.datetime | None:
    """When the next step may be taken unasked; None when there is none, or since when is not known."""
    if rotation.phase is Phase.NONE or rotation.since is None:
        return None
    return rotation.since + longest


def step(secret: Object, now: datetime.datetime, organization: str, life: datetime.timedelta) -> Object:
    """The Secret after the next step of its rotation."""
    rotation = read(secret)
    following = copy.deepcopy(secret)
    stored: dict[str, str] = following["data"]
    if rotation.phase is Phase.NONE:
        fresh = Authority.create(organization, life, now)
        stored[_NEXT_KEY] = _encoded(fresh.key_pem())
        stored[_NEXT_CERTIFICATE] = _encoded(fresh.certificate_pem())
        trusted = base64.b64decode(stored.get("root-cert.pem") or stored["ca-cert.pem"])
        stored["root-cert.pem"] = _encoded(joined(trusted, fresh.certificate_pem()))
        return _marked(following, f"{Phase.DISTRIBUTING.value} {now.isoformat()}")
    if rotation.phase is Phase.DISTRIBUTING:
        stored["ca-key.pem"] = stored.pop(_NEXT_KEY)
        stored["ca-cert.pem"] = stored.pop(_NEXT_CERTIFICATE)
        stored["cert-chain.pem"] = ""
        return _marked(following, f"{Phase.SWITCHED.value} {now.isoformat()}")
    stored["root-cert.pem"] = stored["ca-cert.pem"]
    return _marked(following, "")


def advances(rotation: Rotation, now: datetime.datetime, longest: datetime.timedelta) -> bool:
    """Whether the next step is to be taken: because it is asked for, or because its time has come."""
    asked = {"start": Phase.NONE, "switch": Phase.DISTRIBUTING, "retire": Phase.SWITCHED}
    if rotation.requested and asked[rotation.requested] is rotation.phase:
        return True
    when = due(rotation, longest)
    return when is not None and now >= when


def joined(*bundles: bytes) -> bytes:
    """The certificates of several PEM bundles, each once, in order."""
    found = [certificate for bundle in bundles for certificate in x509.load_pem_x509_certificates(bundle)]
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in dict.fromkeys(found))


def _marked(secret: Object, text: str) -> Object:
    annotations = secret["metadata"].setdefault("annotations", {})
    if text:
        annotations[ANNOTATION] = text
    else:
        annotations.pop(ANNOTATION, None)
    return secret


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()

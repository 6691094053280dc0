"""Which ports of which Services the machine may reach at its own loopback address, and where they lead.

Pure. Every LoadBalancer Service is exposed, port by port; any other Service on request by annotation.
A number once given to a port is kept for it, so that a bookmark stays right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshlight.kube.resources import Object

ANNOTATION = "meshlight.io/expose"
"""On a Service: `true`, `false`, or `HOSTPORT:PORT[,…]` for ports of one's own choice."""
FILE = "listeners.json"
"""What is open now, in the cluster's state directory."""
PREFERRED = {80: 8080, 443: 8443}
"""Numbers for ports that only root may open."""
_UNPRIVILEGED = 1024
_ABOVE = 8000
_PROTOCOLS = ("TCP", "UDP")


class ExposureError(ValueError):
    """The annotation says something else; the message says what."""


@dataclass(frozen=True, slots=True, order=True)
class Exposed:
    """A port of a Service."""

    namespace: str
    service: str
    port: int
    protocol: str

    @property
    def text(self) -> str:
        """As people write it."""
        return f"{self.namespace}/{self.service}:{self.port}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class Wish:
    """Where an exposed port leads, and the number it would like on the machine."""

    target: str
    preferred: int
    name: str = ""


def preferred(port: int) -> int:
    """The machine's number for a port, if nobody says otherwise."""
    return PREFERRED.get(port) or (port if port >= _UNPRIVILEGED else _ABOVE + port)


def _chosen(text: str) -> dict[int, int]:
    """`8443:443,8080:80` as port → number on the machine."""
    found = {}
    for part in text.split(","):
        host, colon, port = part.strip().partition(":")
        try:
            found[int(port if colon else host)] = int(host)
        except ValueError:
            raise ExposureError(f"{part.strip()!r} is no HOSTPORT:PORT") from None
    return found


def wishes(service: Object) -> dict[Exposed, Wish]:
    """The ports of a Service that are to be exposed. Raises ExposureError."""
    metadata, spec = service["metadata"], service["spec"]
    said = (metadata.get("annotations") or {}).get(ANNOTATION, "").strip()
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    target = next((i["ip"] for i in ingress if i.get("ip")), "")
    if said == "false" or not (said or target):
        return {}
    if not target:
        target = spec.get("clusterIP") or ""
        if target in ("", "None"):
            raise ExposureError("the Service has no address")
    chosen = _chosen(said) if said not in ("", "true") else None
    found = {}
    for port in spec.get("ports") or []:
        number, protocol = port["port"], port.get("protocol", "TCP")
        if protocol in _PROTOCOLS and (chosen is None or number in chosen):
            wanted = preferred(number) if chosen is None else chosen[number]
            key = Exposed(metadata["namespace"], metadata["name"], number, protocol)
            found[key] = Wish(target, wanted, port.get("name") or "")
    if chosen and (missing := chosen.keys() - {key.port for key in found}):
        raise ExposureError(f"the Service has no port {min(missing)}")
    return found


def candidates(wish: Wish, before: int, taken: Iterable[int]) -> list[int]:
    """Numbers to try for a port, in order; 0 is any free one."""
    used = set(taken)
    return [n for n in dict.fromkeys((before, wish.preferred)) if n and n not in used] + [0]


def remembered(entries: Iterable[Mapping[str, object]]) -> dict[Exposed, int]:
    """Numbers that ports had, from what was written down; entries that are none are left out."""
    found = {}
    for entry in entries:
        try:
            key = Exposed(
                str(entry["namespace"]), str(entry["service"]), int(str(entry["port"])), str(entry["protocol"])
            )
            found[key] = int(str(entry["hostPort"]))
        except (KeyError, ValueError):
            continue
    return found

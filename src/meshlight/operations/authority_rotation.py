"""`meshlight ca`: which authority signs, and changing the root under live traffic.

istiod takes the steps (see its `rotation`); here they are asked for one by one, with the node proxies
restarted in between, so that each holds certificates of the step before the next is taken.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509

from meshlight.controlplane import rotation
from meshlight.controlplane.authority import Authority, AuthorityError
from meshlight.controlplane.root_secret import NAME, from_secret
from meshlight.controlplane.rotation import Phase
from meshlight.kube.client import ApiError, Client
from meshlight.kube.resources import CONFIG_MAPS, DAEMON_SETS, SECRETS, Object
from meshlight.operations.errors import OperationError

PLUGGED_IN = "cacerts"
_WORDS = {Phase.NONE: "start", Phase.DISTRIBUTING: "switch", Phase.SWITCHED: "retire"}
_SAID = {
    Phase.NONE: "the new root is made and both are trusted",
    Phase.DISTRIBUTING: "the new root signs",
    Phase.SWITCHED: "only the new root is trusted",
}
_AFTER = {Phase.NONE: Phase.DISTRIBUTING, Phase.DISTRIBUTING: Phase.SWITCHED, Phase.SWITCHED: Phase.NONE}


class RotationError(OperationError):
    """The root cannot be rotated, or did not within the time."""


@dataclass(frozen=True, slots=True)
class AuthorityState:
    """What signs now; `phase` is where a rotation stands."""

    secret: str
    serial: str
    organization: str
    expires: datetime.datetime
    roots: tuple[str, ...]
    phase: str
    since: str
    published: bool


async def state(client: Client, namespace: str) -> AuthorityState:
    """Read the authority. Raises RotationError, ApiError."""
    secret = await _secret(client, namespace)
    authority, standing = _read(secret)
    root_map = await client.get(CONFIG_MAPS, "istio-ca-root-cert", namespace)
    name = authority.certificate.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)
    return AuthorityState(
        secret=f"{namespace}/{secret['metadata']['name']}",
        serial=f"{authority.certificate.serial_number:x}",
        organization=str(name[0].value) if name else "",
        expires=authority.certificate.not_valid_after_utc,
        roots=tuple(f"{root.serial_number:x}" for root in authority.roots),
        phase=standing.phase.value,
        since=standing.since.isoformat() if standing.since else "",
        published=(root_map.get("data") or {}).get("root-cert.pem") == authority.root_pem.decode(),
    )


async def _secret(client: Client, namespace: str) -> Object:
    for name in (PLUGGED_IN, NAME):
        try:
            return await client.get(SECRETS, name, namespace)
        except ApiError as error:
            if error.code != 404:
                raise
    raise RotationError(f"neither Secret {PLUGGED_IN} nor {NAME} is in {namespace}: has istiod ever run?")


def _read(secret: Object) -> tuple[Authority, rotation.Rotation]:
    try:
        return from_secret(secret), rotation.read(secret)
    except AuthorityError as error:
        raise RotationError(str(error)) from error


async def rotate(client: Client, namespace: str, seconds: float, tell: Callable[[str], None]) -> None:
    """Take all steps that are left. Raises RotationError; what was reached stays, and can be gone on with."""
    try:
        async with asyncio.timeout(seconds):
            await _rotate(client, namespace, tell)
    except TimeoutError:
        raise RotationError(
            f"not finished within {seconds:.0f} s; nothing is lost: run it again to go on where it stands"
        ) from None


async def _rotate(client: Client, namespace: str, tell: Callable[[str], None]) -> None:
    while True:
        secret = await _secret(client, namespace)
        if secret["metadata"]["name"] == PLUGGED_IN:
            raise RotationError(f"the authority is plugged in: rotate it in Secret {namespace}/{PLUGGED_IN}")
        _, standing = _read(secret)
        following = _AFTER[standing.phase]
        await _ask(client, namespace, secret, standing)
        await _published(client, namespace, following)
        tell(_SAID[standing.phase])
        await _restart(client, namespace)
        tell("every node proxy has new certificates")
        if following is Phase.NONE:
            return


async def _ask(client: Client, namespace: str, secret: Object, standing: rotation.Rotation) -> None:
    said = (secret["metadata"].get("annotations") or {}).get(rotation.ANNOTATION, "")
    words = [word for word in said.split() if word not in _WORDS.values()]
    text = " ".join([*words, _WORDS[standing.phase]])
    await client.patch(SECRETS, NAME, {"metadata": {"annotations": {rotation.ANNOTATION: text}}}, namespace)


async def _published(client: Client, namespace: str, phase: Phase) -> None:
    """Wait until istiod has taken the step and workloads can read its roots."""
    async for event in client.watch(SECRETS, namespace, field_selector=f"metadata.name={NAME}"):
        if event.type != "SYNCED" and event.object.get("data") and rotation.read(event.object).phase is phase:
            if rotation.read(event.object).requested:
                continue
            wanted = from_secret(event.object).root_pem.decode()
            break
    selector = "metadata.name=istio-ca-root-cert"
    async for event in client.watch(CONFIG_MAPS, namespace, field_selector=selector):
        if (event.object.get("data") or {}).get("root-cert.pem") == wanted:
            return


async def _restart(client: Client, namespace: str) -> None:
    """Replace the node proxies one by one, as `kubectl rollout restart` does, and wait for the last."""
    now = datetime.datetime.now(datetime.UTC).isoformat()
    template = {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": now}}}
    patched = await client.patch(DAEMON_SETS, "ztunnel", {"spec": {"template": template}}, namespace)
    generation = patched["metadata"].get("generation", 0)
    async for event in client.watch(DAEMON_SETS, namespace, field_selector="metadata.name=ztunnel"):
        status = event.object.get("status") or {}
        wanted = status.get("desiredNumberScheduled", 0)
        current = status.get("observedGeneration", 0) >= generation
        if (
            current
            and status.get("updatedNumberScheduled", 0) >= wanted
            and status.get("numberReady", 0) >= wanted
        ):
            return

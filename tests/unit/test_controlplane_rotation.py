"""The root changes in steps between which everybody trusts everybody; plugged-in authorities are followed."""

from __future__ import annotations

import asyncio
import base64
import datetime
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from meshlight.controlplane import rotation
from meshlight.controlplane.authority import Authority, AuthorityError, Lifetimes
from meshlight.controlplane.authority_keeper import AuthorityKeeper
from meshlight.controlplane.metrics import Metrics
from meshlight.controlplane.root_secret import from_secret, to_secret
from meshlight.controlplane.rotation import Phase
from meshlight.controlplane.settings import Mesh
from meshlight.kube.client import Client

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
DAY = datetime.timedelta(days=1)


def fresh(organization: str = "cluster.local") -> Authority:
    return Authority.create(organization, 3650 * DAY, NOW)


def asked(secret: dict[str, Any], word: str) -> dict[str, Any]:
    annotations = secret["metadata"].setdefault("annotations", {})
    annotations[rotation.ANNOTATION] = f"{annotations.get(rotation.ANNOTATION, '')} {word}".strip()
    return secret


def test_in_every_step_what_was_signed_before_is_trusted_after() -> None:
    secret = to_secret(fresh(), "istio-system")
    states, now = [from_secret(secret)], NOW
    phases = [rotation.read(secret).phase]
    for _ in range(3):
        now += DAY
        secret = rotation.step(secret, now, "cluster.local", 3650 * DAY)
        states.append(from_secret(secret))
        phases.append(rotation.read(secret).phase)
        states[-1].check(now)
    assert phases == [Phase.NONE, Phase.DISTRIBUTING, Phase.SWITCHED, Phase.NONE]
    for before, after in itertools.pairwise(states):
        assert before.trusted_by(after), "old certificates are trusted by those who renewed"
        assert after.trusted_by(before), "new certificates are trusted by those who have not renewed yet"
    assert states[0].certificate == states[1].certificate != states[2].certificate == states[3].certificate
    assert [len(state.roots) for state in states] == [1, 2, 2, 1]
    assert not states[0].trusted_by(states[3]), "the old root is gone"
    assert set(secret["data"]) == {"ca-cert.pem", "ca-key.pem", "root-cert.pem", "cert-chain.pem"}
    assert rotation.ANNOTATION not in secret["metadata"]["annotations"]


def test_steps_are_taken_when_asked_or_when_due() -> None:
    secret = to_secret(fresh(), "istio-system")
    assert not rotation.advances(rotation.read(secret), NOW, DAY)
    assert rotation.advances(rotation.read(asked(secret, "start")), NOW, DAY)
    secret = rotation.step(secret, NOW, "cluster.local", 3650 * DAY)
    standing = rotation.read(secret)
    assert not rotation.advances(standing, NOW + DAY - datetime.timedelta(seconds=1), DAY)
    assert rotation.advances(standing, NOW + DAY, DAY)
    assert not rotation.advances(rotation.read(asked(secret, "retire")), NOW, DAY), "out of order"
    secret["metadata"]["annotations"][rotation.ANNOTATION] = f"distributing {NOW.isoformat()} switch"
    assert rotation.advances(rotation.read(secret), NOW, DAY)


def test_an_annotation_of_nonsense_is_told() -> None:
    secret = to_secret(fresh(), "istio-system")
    secret["metadata"]["annotations"] = {rotation.ANNOTATION: "soon please"}
    with pytest.raises(AuthorityError, match="not a step"):
        rotation.read(secret)


class Api:
    """Takes writes and hands them to the keeper's caches, as a watch would."""

    def __init__(self) -> None:
        self.keeper: AuthorityKeeper | None = None
        self.written: list[dict[str, Any]] = []

    async def replace(self, resource: Any, obj: dict[str, Any]) -> None:
        self.written.append(obj)
        self.show(obj)

    async def patch(self, resource: Any, name: str, patch: dict[str, Any], namespace: str) -> None:
        self.written.append(patch)

    def show(self, obj: dict[str, Any]) -> None:
        assert self.keeper is not None
        name = obj["metadata"]["name"]
        for cache in self.keeper.caches:
            if cache.selectors["field_selector"] == f"metadata.name={name}":
                cache.objects["istio-system", name] = obj
                cache.synced.set()
                for callback in cache._callbacks:
                    callback(None, obj)


@pytest.fixture
def api() -> Api:
    fake = Api()
    lifetimes = Lifetimes(DAY, 90 * DAY)
    fake.keeper = AuthorityKeeper(
        cast(Client, fake),
        Mesh(),
        Metrics(),
        lifetimes,
        3650 * DAY,
        lambda: datetime.datetime.now(datetime.UTC),
    )
    return fake


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def changed(keeper: AuthorityKeeper) -> Authority:
    heard: asyncio.Future[Authority] = asyncio.get_running_loop().create_future()
    keeper.on_change(lambda authority: None if heard.done() else heard.set_result(authority))
    return await asyncio.wait_for(heard, 10)


def plugged(authority: Authority) -> dict[str, Any]:
    secret = to_secret(authority, "istio-system")
    secret["metadata"]["name"], secret["type"] = "cacerts", "Opaque"
    return secret


def below(root: Authority, *, authority: bool = True) -> Authority:
    """An RSA intermediate, as Istio's own tools make them."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "intermediate")])
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(root.certificate.subject)
        .public_key(key.public_key()).serial_number(9)
        .not_valid_before(NOW - DAY).not_valid_after(NOW + 30 * DAY)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .sign(root.key, hashes.SHA256())
    )  # fmt: skip
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return Authority(key, certificate, root.root_pem, (pem,))


async def test_a_plugged_in_authority_wins_and_is_followed(api: Api) -> None:
    keeper = api.keeper
    assert keeper is not None
    first, second = below(fresh()), below(fresh())
    api.show(to_secret(fresh(), "istio-system"))
    api.show(plugged(first))
    await keeper.load()
    assert keeper.current.certificate == first.certificate
    running = asyncio.create_task(keeper.run())
    heard = asyncio.create_task(changed(keeper))
    await asyncio.sleep(0)
    both = rotation.joined(first.root_pem, second.root_pem)
    api.show(plugged(Authority(second.key, second.certificate, both, second.intermediates)))
    adopted = await heard
    assert adopted.certificate == second.certificate
    assert first.trusted_by(adopted)
    running.cancel()


@pytest.mark.parametrize("fault", ["no authority", "another root", "unreadable"])
async def test_an_unusable_authority_leaves_the_last_usable_one_in_force(api: Api, fault: str) -> None:
    keeper = api.keeper
    assert keeper is not None
    good, root = below(fresh()), fresh()
    api.show(plugged(good))
    for cache in keeper.caches:
        cache.synced.set()
    await keeper.load()
    bad = plugged(below(root, authority=fault != "no authority"))
    if fault == "another root":
        bad["data"]["root-cert.pem"] = base64.b64encode(good.root_pem).decode()
    elif fault == "unreadable":
        bad["data"]["ca-key.pem"] = "aGVsbG8="
    running = asyncio.create_task(keeper.run())
    api.show(bad)
    await until(lambda: keeper._metrics.root_load_errors.value() > 0)
    assert keeper.current.certificate == good.certificate
    running.cancel()


async def test_a_rotation_runs_through_on_request(api: Api) -> None:
    keeper = api.keeper
    assert keeper is not None
    original = fresh()
    for cache in keeper.caches:
        cache.synced.set()
    api.show(to_secret(original, "istio-system"))
    keeper._adopt(original, "istio-ca-secret")
    running = asyncio.create_task(keeper.run())
    for word, phase in (("start", Phase.DISTRIBUTING), ("switch", Phase.SWITCHED), ("retire", Phase.NONE)):
        before = len(api.written)
        current = keeper.caches[1].objects["istio-system", "istio-ca-secret"]
        api.show(asked(current, word))
        await until(lambda before=before: len(api.written) > before)
        assert rotation.read(api.written[-1]).phase is phase
    await until(lambda: keeper.current.certificate != original.certificate and len(keeper.current.roots) == 1)
    running.cancel()


async def test_the_longest_life_granted_is_remembered(api: Api) -> None:
    keeper = api.keeper
    assert keeper is not None
    for cache in keeper.caches:
        cache.synced.set()
    api.show(to_secret(fresh(), "istio-system"))
    running = asyncio.create_task(keeper.run())
    keeper.granted(30 * DAY)
    await until(lambda: bool(api.written))
    assert api.written[-1]["metadata"]["annotations"][rotation.LONGEST] == str(30 * 86400)
    running.cancel()

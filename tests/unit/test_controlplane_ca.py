"""The certificate authority: what is certified, to whom, and what is refused in which words."""

from __future__ import annotations

import base64
import datetime
from dataclasses import dataclass, field

import pytest
from controlplane_objects import pod
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from grpclib import GRPCError, Status

from meshlight.controlplane.authority import Authority, AuthorityError, Lifetimes
from meshlight.controlplane.certificate_service import CertificateService
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.identity import (
    Caller,
    Identity,
    RememberingReviewer,
    ReviewUnavailable,
    Unauthenticated,
    bearer_token,
)
from meshlight.controlplane.metrics import Metrics
from meshlight.controlplane.node_authorization import NodeAuthorizer
from meshlight.controlplane.root_secret import from_secret, to_secret
from meshlight.controlplane.settings import ServiceAccount
from meshlight.proto import ca_pb2

NOW = datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
ZTUNNEL = ServiceAccount("istio-system", "ztunnel")
PROXY = Caller(ZTUNNEL, pod_name="ztunnel-1", pod_uid="uid-ztunnel-1", node_name="node-1")
WEB = Caller(ServiceAccount("shop", "web"), pod_name="web-1", pod_uid="uid-web-1", node_name="node-1")


def request_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None) -> str:
    """A request that asks for more than it should: only its key may count."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "admin")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    wanted = [
        x509.DNSName("istiod.istio-system.svc"),
        x509.UniformResourceIdentifier("spiffe://other/ns/a/sa/b"),
    ]
    builder = builder.add_extension(x509.SubjectAlternativeName(wanted), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signed = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


@dataclass
class Reviewer:
    """Knows callers by token."""

    callers: dict[str, Caller] = field(default_factory=lambda: {"proxy": PROXY, "web": WEB})

    async def review(self, token: str) -> Caller:
        if token == "unreachable":
            raise ReviewUnavailable("the API server could not review the token: connection refused")
        if token not in self.callers:
            raise Unauthenticated("the token is not valid: expired")
        return self.callers[token]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("cluster.local", 3650 * DAY, NOW)


@pytest.fixture
def service(authority: Authority) -> CertificateService:
    nodes = NodeAuthorizer("cluster.local", frozenset({ZTUNNEL}))
    for obj in (
        pod("ztunnel-1", "istio-system", account="ztunnel"),
        pod("web-1"),
        pod("far-1", account="far", node="node-2"),
        pod("done-1", account="done", phase="Succeeded"),
    ):
        nodes.observe(ObjectKey.of(obj), obj)
    lifetimes = Lifetimes(DAY, 90 * DAY)
    return CertificateService(authority, lifetimes, "cluster.local", Reviewer(), nodes, Metrics(), lambda: NOW)


def ask(caller_for: str = "", seconds: int = 0, csr: str | None = None) -> ca_pb2.IstioCertificateRequest:
    request = ca_pb2.IstioCertificateRequest(csr=csr or request_pem(), validity_duration=seconds)
    if caller_for:
        request.metadata["ImpersonatedIdentity"] = caller_for
    return request


def names(certificate: x509.Certificate) -> x509.Extension[x509.SubjectAlternativeName]:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_a_workload_certificate(service: CertificateService, authority: Authority) -> None:
    leaf_pem, root_pem = service.sign(WEB, ask()).cert_chain
    assert root_pem.encode() == authority.root_pem
    leaf, root = x509.load_pem_x509_certificate(leaf_pem.encode()), authority.certificate
    leaf.verify_directly_issued_by(root)
    assert names(leaf).critical
    assert list(names(leaf).value) == [x509.UniformResourceIdentifier("spiffe://cluster.local/ns/shop/sa/web")]
    assert leaf.subject == x509.Name([])
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usages = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert usages == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    assert leaf.not_valid_after_utc == NOW + DAY
    assert leaf.not_valid_before_utc < NOW, "clocks differ"


def test_the_root(authority: Authority) -> None:
    root = authority.certificate
    root.verify_directly_issued_by(root)
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = root.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, DAY), (-5, DAY), (3600, DAY / 24), (90 * 86400, 90 * DAY)]
)
def test_validity(service: CertificateService, seconds: int, expected: datetime.timedelta) -> None:
    leaf = x509.load_pem_x509_certificate(service.sign(WEB, ask(seconds=seconds)).cert_chain[0].encode())
    assert leaf.not_valid_after_utc == NOW + expected


def test_a_certificate_does_not_outlive_its_root() -> None:
    short = Authority.create("cluster.local", DAY / 2, NOW)
    leaf = short.sign_workload(request_pem(), "spiffe://x/ns/a/sa/b", DAY, Lifetimes(DAY, DAY), NOW)
    assert leaf.not_valid_after_utc == NOW + DAY / 2
    with pytest.raises(AuthorityError, match="expired"):
        short.sign_workload(request_pem(), "spiffe://x/ns/a/sa/b", DAY, Lifetimes(DAY, DAY), NOW + DAY)


def test_a_node_proxy_gets_identities_of_its_node(service: CertificateService) -> None:
    chain = service.sign(PROXY, ask("spiffe://cluster.local/ns/shop/sa/web")).cert_chain
    leaf = x509.load_pem_x509_certificate(chain[0].encode())
    assert list(names(leaf).value) == [x509.UniformResourceIdentifier("spiffe://cluster.local/ns/shop/sa/web")]
    assert service.metrics.certificates_issued.value() == 1


MOVED = Caller(ZTUNNEL, "ztunnel-1", "uid-ztunnel-1", "node-2")
REFUSED = {
    "another node's identity": (PROXY, "shop/sa/far", Status.PERMISSION_DENIED, "no pod of .* 'node-1'"),
    "an identity of an ended pod": (PROXY, "shop/sa/done", Status.PERMISSION_DENIED, "no pod"),
    "an untrusted caller": (WEB, "shop/sa/web", Status.PERMISSION_DENIED, "shop/web may not ask"),
    "a token of no pod": (Caller(ZTUNNEL), "shop/sa/web", Status.PERMISSION_DENIED, "bound to no pod"),
    "a pod replaced by another": (
        Caller(ZTUNNEL, "ztunnel-1", "older"), "shop/sa/web", Status.PERMISSION_DENIED, "try again",
    ),
    "a token of another node": (MOVED, "shop/sa/web", Status.PERMISSION_DENIED, "runs on 'node-1'"),
    "no SPIFFE identity": (PROXY, "shop", Status.INVALID_ARGUMENT, "is not of the form spiffe://"),
}  # fmt: skip


@pytest.mark.parametrize(("caller", "wanted", "status", "message"), REFUSED.values(), ids=REFUSED)
def test_impersonation_refused(
    service: CertificateService, caller: Caller, wanted: str, status: Status, message: str
) -> None:
    with pytest.raises(GRPCError, match=message) as refusal:
        service.sign(caller, ask(f"spiffe://cluster.local/ns/{wanted}"))
    assert refusal.value.status is status
    assert service.metrics.certificates_issued.value() == 0


def test_another_trust_domain_is_refused(service: CertificateService) -> None:
    with pytest.raises(GRPCError, match="trust domain 'elsewhere'"):
        service.sign(PROXY, ask("spiffe://elsewhere/ns/shop/sa/web"))


def test_a_node_loses_an_identity_with_its_last_pod(service: CertificateService) -> None:
    request = ask("spiffe://cluster.local/ns/shop/sa/web")
    second = pod("web-2")
    service.nodes.observe(ObjectKey.of(second), second)
    service.nodes.observe(ObjectKey("shop", "web-1"), None)
    service.sign(PROXY, request)
    service.nodes.observe(ObjectKey("shop", "web-2"), None)
    with pytest.raises(GRPCError, match="no pod"):
        service.sign(PROXY, request)


def forged() -> str:
    """A request whose signature was changed."""
    body = bytearray(base64.b64decode("".join(request_pem().splitlines()[1:-1])))
    body[-1] ^= 1
    encoded = base64.encodebytes(bytes(body)).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{encoded}-----END CERTIFICATE REQUEST-----\n"


BAD = {
    "no PEM": ("hello", 0, "csr: not a readable PEM"),
    "too large": ("x" * 20000, 0, "over the limit"),
    "a changed signature": (forged(), 0, "csr: "),
    "a weak key": (request_pem(rsa.generate_private_key(65537, 1024)), 0, "too weak"),
    "too long": (request_pem(), 91 * 86400, "MAX_WORKLOAD_CERT_TTL"),
    "much too long": (request_pem(), 2**62, "MAX_WORKLOAD_CERT_TTL"),
}


@pytest.mark.parametrize(("csr", "seconds", "message"), BAD.values(), ids=BAD)
def test_bad_requests(service: CertificateService, csr: str, seconds: int, message: str) -> None:
    with pytest.raises(GRPCError, match=message) as refusal:
        service.sign(WEB, ask(csr=csr, seconds=seconds))
    assert refusal.value.status is Status.INVALID_ARGUMENT
    assert service.metrics.csr_parsing_errors.value() == 1


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, Status.UNAUTHENTICATED),
        ("Bearer ", Status.UNAUTHENTICATED),
        ("Basic d2Vi", Status.UNAUTHENTICATED),
        ("Bearer stolen", Status.UNAUTHENTICATED),
        ("Bearer unreachable", Status.UNAVAILABLE),
    ],
)
async def test_authentication_refused(service: CertificateService, header: str | None, status: Status) -> None:
    with pytest.raises(GRPCError) as refusal:
        await service.authenticate(header)
    assert refusal.value.status is status


async def test_authentication(service: CertificateService) -> None:
    assert await service.authenticate("bearer web") == WEB
    assert service.metrics.csr_count.value() == 1


def test_bearer_token() -> None:
    assert bearer_token("Bearer abc ") == "abc"


def test_identity() -> None:
    identity = Identity.parse("spiffe://cluster.local/ns/shop/sa/web")
    assert identity.service_account == ServiceAccount("shop", "web")
    assert str(identity) == "spiffe://cluster.local/ns/shop/sa/web"
    for bad in ("cluster.local/ns/a/sa/b", "spiffe://a/ns/b", "spiffe://a/ns/b/sa/c/d", "spiffe:///ns/b/sa/c"):
        with pytest.raises(ValueError, match="spiffe://"):
            Identity.parse(bad)


class TestSecret:
    def test_kept_and_read_back(self, authority: Authority) -> None:
        secret = to_secret(authority, "istio-system")
        assert secret["type"] == "istio.io/ca-root"
        assert set(secret["data"]) == {"ca-cert.pem", "ca-key.pem", "root-cert.pem", "cert-chain.pem"}
        again = from_secret(secret)
        assert again.certificate == authority.certificate
        assert again.root_pem == authority.root_pem
        assert again.key_pem() == authority.key_pem()

    def test_an_intermediate_is_sent_between_leaf_and_root(self, authority: Authority) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "plugged in")])
        certificate = (
            x509.CertificateBuilder().subject_name(name).issuer_name(authority.certificate.subject)
            .public_key(key.public_key()).serial_number(7).not_valid_before(NOW).not_valid_after(NOW + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(authority.key, hashes.SHA256())
        )  # fmt: skip
        plugged = from_secret(to_secret(Authority(key, certificate, authority.root_pem), "istio-system"))
        leaf = plugged.sign_workload(request_pem(), "spiffe://x/ns/a/sa/b", DAY, Lifetimes(DAY, DAY), NOW)
        chain = [x509.load_pem_x509_certificate(part.encode()) for part in plugged.chain(leaf)]
        assert chain == [leaf, certificate, authority.certificate]

    @pytest.mark.parametrize("part", ["ca-cert.pem", "ca-key.pem"])
    def test_missing_parts_are_named(self, authority: Authority, part: str) -> None:
        secret = to_secret(authority, "istio-system")
        del secret["data"][part]
        with pytest.raises(AuthorityError, match=f"istio-system/istio-ca-secret: key {part} is missing"):
            from_secret(secret)

    def test_a_key_of_another_certificate_is_refused(self, authority: Authority) -> None:
        secret = to_secret(authority, "istio-system")
        other = to_secret(Authority.create("x", DAY, NOW), "istio-system")
        secret["data"]["ca-key.pem"] = other["data"]["ca-key.pem"]
        with pytest.raises(AuthorityError, match=r"does not belong to ca-key\.pem"):
            from_secret(secret)


def test_a_deleted_service_account_is_refused_at_once(service: CertificateService) -> None:
    request = ask("spiffe://cluster.local/ns/shop/sa/web")
    for key in (ObjectKey("shop", "web"), ObjectKey("istio-system", "ztunnel")):
        service.nodes.observe_account(key, True)
    service.sign(PROXY, request)
    service.nodes.observe_account(ObjectKey("shop", "web"), False)
    for caller, wanted in ((PROXY, request), (WEB, ask())):
        with pytest.raises(GRPCError, match="service account shop/web does not exist") as refusal:
            service.sign(caller, wanted)
        assert refusal.value.status is Status.PERMISSION_DENIED


async def test_a_reviewed_token_is_remembered_for_seconds_and_a_refused_one_never() -> None:
    asked_for: list[str] = []

    class Counting(Reviewer):
        async def review(self, token: str) -> Caller:
            asked_for.append(token)
            return await super().review(token)

    clock = [100.0]
    reviewer = RememberingReviewer(Counting(), lambda: clock[0], seconds=10)
    assert [await reviewer.review("web"), await reviewer.review("web")] == [WEB, WEB]
    assert asked_for == ["web"]
    clock[0] += 10
    await reviewer.review("web")
    assert asked_for == ["web", "web"]
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            await reviewer.review("stolen")
    assert asked_for[2:] == ["stolen", "stolen"]

"""Keys, certificates and kubeconfigs of an embedded cluster.

Owns `pki/` of the state directory. Everything is made once and kept, so that a restarted cluster
keeps its identity; private keys and kubeconfigs are 0600, directories 0700.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

FABRIC_SERVER = "https://172.20.0.1:6443"
_YEARS = 10


@dataclass(frozen=True, slots=True)
class Subject:
    """Who a certificate names: Kubernetes reads the user from CN and the groups from O."""

    common_name: str
    organization: str | None = None

    def name(self) -> x509.Name:
        """As an X.509 name."""
        parts = [x509.NameAttribute(NameOID.COMMON_NAME, self.common_name)]
        if self.organization:
            parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.organization))
        return x509.Name(parts)


def ensure(state: Path, cluster: str, nodes: list[str], api_port: int) -> None:
    """Make what is missing of a cluster's credentials.

    `nodes` are node names in index order (the first is node 1). `api_port` is the API's loopback
    port, which the user's kubeconfig names. Idempotent; raises OSError when `state` is not writable.
    """
    pki = state / "pki"
    for folder in (state, pki):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    authority = _Authority.load_or_create(pki, cluster)
    authority.issue(
        "server",
        Subject("kube-apiserver"),
        [
            "127.0.0.1",
            "::1",
            "172.20.0.1",
            "10.96.0.1",
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ],
    )
    authority.issue("admin", Subject("kubernetes-admin", "system:masters"))
    authority.issue("apiserver-kubelet-client", Subject("kube-apiserver", "system:masters"))
    authority.issue("controllers", Subject("system:kube-controller-manager", "system:masters"))
    for index, node in enumerate(nodes, start=1):
        authority.issue(
            f"node-{node}",
            Subject(f"system:node:{node}", "system:nodes"),
            [node, f"172.20.0.{10 + index}"],
        )
        _write_kubeconfig(pki, pki / f"node-{node}.kubeconfig", cluster, f"node-{node}", FABRIC_SERVER)
    _write_kubeconfig(pki, pki / "controllers.kubeconfig", cluster, "controllers", FABRIC_SERVER)
    _write_kubeconfig(pki, state / "kubeconfig", cluster, "admin", f"https://127.0.0.1:{api_port}")
    if not (pki / "sa.pub").exists():
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(pki / "sa.key", _key_pem(key))
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (pki / "sa.pub").write_bytes(public)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, atomically."""
    temporary = path.with_suffix(path.suffix + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)


@dataclass(frozen=True, slots=True)
class _Authority:
    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def load_or_create(cls, folder: Path, cluster: str) -> _Authority:
        if (folder / "ca.crt").exists():
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
            return cls(folder, certificate, key)
        key = ec.generate_private_key(ec.SECP256R1())
        name = Subject(f"{cluster}-ca", "meshlight").name()
        certificate = (
            _builder(name, name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_private(folder / "ca.key", _key_pem(key))
        (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return cls(folder, certificate, key)

    def issue(self, stem: str, subject: Subject, names: list[str] | None = None) -> None:
        """Write STEM.crt and STEM.key unless they exist; `names` become subject alternative names."""
        if (self.folder / f"{stem}.crt").exists():
            return
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = _builder(subject.name(), self.certificate.subject, key.public_key())
        if names:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False
            )
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        write_private(self.folder / f"{stem}.key", _key_pem(key))
        path = self.folder / f"{stem}.crt"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=365 * _YEARS))
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_kubeconfig(pki: Path, path: Path, cluster: str, stem: str, server: str) -> None:
    def embedded(name: str) -> str:
        return base64.b64encode((pki / name).read_bytes()).decode()

    user = f"{cluster}-{stem}" if stem != "admin" else f"{cluster}-admin"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": cluster,
                "cluster": {"server": server, "certificate-authority-data": embedded("ca.crt")},
            }
        ],
        "users": [
            {
                "name": user,
                "user": {
                    "client-certificate-data": embedded(f"{stem}.crt"),
                    "client-key-data": embedded(f"{stem}.key"),
                },
            }
        ],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": user}}],
        "current-context": cluster,
    }
    content = yaml.safe_dump(config, sort_keys=False).encode()
    if not path.exists() or path.read_bytes() != content:
        write_private(path, content)

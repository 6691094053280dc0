"""Certificates for local names, where nobody else provides them. Pure but for the keys it draws.

A Gateway annotated `meshlight.io/certificates: generate` gets a self-signed certificate in each Secret that its
listeners name and that does not exist: an embedded cluster has no public authority to ask.
"""

from __future__ import annotations

import base64
import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from meshlight.controlplane.envoy.gateway_api import Gateway
from meshlight.controlplane.facts import ObjectKey
from meshlight.kube.resources import Object

ANNOTATION = "meshlight.io/certificates"
_LIFETIME = datetime.timedelta(days=397)  # browsers accept no longer ones


def wanted(obj: Object, gateway: Gateway) -> dict[ObjectKey, list[str]]:
    """The Secrets of a Gateway's own namespace that may be generated, with the names each is for."""
    if (obj["metadata"].get("annotations") or {}).get(ANNOTATION) != "generate":
        return {}
    found: dict[ObjectKey, list[str]] = {}
    for listener in gateway.listeners:
        for reference in listener.certificates:
            own = reference.key.namespace == gateway.key.namespace
            if listener.terminates and own and (reference.group, reference.kind) == ("", "Secret"):
                found.setdefault(reference.key, []).append(listener.hostname or "localhost")
    return found


def secret(key: ObjectKey, names: list[str], now: datetime.datetime) -> Object:
    """A Secret with a new key and a certificate for the names, and for what stands above each wildcard."""
    hosts = list(dict.fromkeys(host for name in names for host in (name, name.removeprefix("*."))))
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private, hashes.SHA256())
    )
    chain = certificate.public_bytes(Encoding.PEM)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": key.name, "namespace": key.namespace, "annotations": {ANNOTATION: "generated"}},
        "type": "kubernetes.io/tls",
        "data": {"tls.crt": base64.b64encode(chain).decode(), "tls.key": base64.b64encode(pem).decode()},
    }

"""Certificates of listeners: Secrets checked, and given to Envoy as its own kind of secret. Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from envoy.config.core.v3 import base_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, secret_pb2, tls_pb2

from meshlight.controlplane.envoy import wire
from meshlight.controlplane.envoy.gateway_api import Listener, SecretReference
from meshlight.controlplane.envoy.routing import Problem
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.resources import Published, publish
from meshlight.kube.resources import Object


@dataclass(frozen=True, slots=True)
class Certificate:
    """A chain and its key as PEM, or why a Secret holds none."""

    chain: bytes = b""
    key: bytes = b""
    fault: str = ""


def read(secret: Object) -> Certificate:
    """The certificate of a Secret of type kubernetes.io/tls."""
    content = secret.get("data") or {}
    try:
        chain, key = (base64.b64decode(content[name], validate=True) for name in ("tls.crt", "tls.key"))
    except KeyError as missing:
        return Certificate(fault=f"has no {missing.args[0]}")
    except (binascii.Error, ValueError):
        return Certificate(fault="is not base64")
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        return Certificate(fault=f"is no certificate with its key: {str(error).splitlines()[0]}")
    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(*spki) != private.public_key().public_bytes(*spki):
        return Certificate(fault="holds a key that is not its certificate's")
    return Certificate(chain, key)


class Certificates:
    """Every certificate that Secrets hold. Secrets of other types are not looked at."""

    def __init__(self) -> None:
        self._by_key: dict[ObjectKey, Certificate] = {}

    def set_secret(self, key: ObjectKey, secret: Object | None) -> bool:
        """Take a Secret, or its deletion; whether that changes anything."""
        new = read(secret) if secret is not None and secret.get("type") == "kubernetes.io/tls" else None
        if new == self._by_key.get(key):
            return False
        if new is None:
            del self._by_key[key]
        else:
            self._by_key[key] = new
        return True

    def get(self, key: ObjectKey) -> Certificate | None:
        """The certificate of a Secret."""
        return self._by_key.get(key)


Permitted = Callable[[SecretReference], bool]


def problem(listener: Listener, certificates: Certificates, permitted: Permitted) -> Problem | None:
    """What is wrong with a listener's certificates."""
    if not listener.terminates:
        return None
    if not listener.certificates:
        return Problem("InvalidCertificateRef", "tls.certificateRefs is empty", False)
    for reference in listener.certificates:
        where = f"certificateRef {reference.key}"
        if (reference.group, reference.kind) != ("", "Secret"):
            return Problem("InvalidCertificateRef", f"{where} is not a Secret", False)
        if not permitted(reference):
            return Problem("RefNotPermitted", f"{where} not accessible (missing a ReferenceGrant?)", False)
        found = certificates.get(reference.key)
        if found is None:
            return Problem("InvalidCertificateRef", f"{where}: no Secret of type kubernetes.io/tls", False)
        if found.fault:
            return Problem("InvalidCertificateRef", f"{where} {found.fault}", False)
    return None


def secret_name(key: ObjectKey) -> str:
    """The name under which a proxy asks for a certificate, as Istio has it."""
    return f"kubernetes-gateway://{key.namespace}/{key.name}"


def secret(key: ObjectKey, certificate: Certificate) -> Published:
    """A certificate as Envoy is given it."""
    message = secret_pb2.Secret(
        name=secret_name(key),
        tls_certificate=common_pb2.TlsCertificate(
            certificate_chain=base_pb2.DataSource(inline_bytes=certificate.chain),
            private_key=base_pb2.DataSource(inline_bytes=certificate.key),
        ),
    )
    return publish(wire.SECRET_TYPE, message.name, message)


def transport_socket(listener: Listener) -> Any:
    """TLS that ends at a listener."""
    context = tls_pb2.DownstreamTlsContext()
    common = context.common_tls_context
    common.alpn_protocols.extend(["h2", "http/1.1"] if listener.protocol == "HTTPS" else [])
    common.tls_params.tls_minimum_protocol_version = common_pb2.TlsParameters.TLSv1_2
    for reference in listener.certificates:
        common.tls_certificate_sds_secret_configs.add(name=secret_name(reference.key), sds_config=wire.ads())
    return base_pb2.TransportSocket(name="envoy.transport_sockets.tls", typed_config=wire.packed(context))

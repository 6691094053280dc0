"""The mesh's certificate authority: its root, and the certificates it signs. No I/O.

Roots made here are EC P-256; plugged-in authorities may be EC or RSA. A workload's certificate names one
SPIFFE identity and nothing else, for both sides of mutual TLS. The key of a request is used, everything else
in it is ignored.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLOCK_SKEW = datetime.timedelta(minutes=2)
"""How far the clocks of two machines of the mesh may be apart."""

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_MAX_REQUEST = 16 * 1024


class AuthorityError(Exception):
    """The stored authority cannot be used; the message says which part and what to do."""


class BadRequest(Exception):
    """A certificate request cannot be granted as made; the message is for the caller."""


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long workload certificates live, by default and at most."""

    default: datetime.timedelta
    maximum: datetime.timedelta


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A private key and its certificate chain, as PEM."""

    key: bytes
    chain: bytes
    not_before: datetime.datetime
    not_after: datetime.datetime


@dataclass(frozen=True, slots=True)
class Authority:
    """A root (or intermediate) that signs; `root_pem` is what peers are to trust, one root or several."""

    key: PrivateKey
    certificate: x509.Certificate
    root_pem: bytes
    intermediates: tuple[bytes, ...] = ()

    @classmethod
    def create(cls, organization: str, lifetime: datetime.timedelta, now: datetime.datetime) -> Authority:
        """A new self-signed root."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate, certificate.public_bytes(serialization.Encoding.PEM))

    @classmethod
    def load(cls, key: bytes, certificate: bytes, chain: bytes, root: bytes) -> Authority:
        """Read a stored authority from PEM; raises AuthorityError naming the part that is unusable."""
        try:
            private = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise AuthorityError(f"ca-key.pem is not a readable private key: {error}") from error
        if not isinstance(private, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
            raise AuthorityError("ca-key.pem is neither an EC nor an RSA key")
        try:
            own = x509.load_pem_x509_certificate(certificate)
            roots = x509.load_pem_x509_certificates(root)
            chained = x509.load_pem_x509_certificates(chain) if chain.strip() else []
        except ValueError as error:
            raise AuthorityError(f"ca-cert.pem, cert-chain.pem or root-cert.pem is not PEM: {error}") from error
        if own.public_key() != private.public_key():
            raise AuthorityError("ca-cert.pem does not belong to ca-key.pem")
        between = [c for c in (own, *chained) if c not in roots]
        encoded = tuple(c.public_bytes(serialization.Encoding.PEM) for c in dict.fromkeys(between))
        return cls(private, own, root, encoded)

    @property
    def roots(self) -> list[x509.Certificate]:
        """What peers are to trust."""
        return x509.load_pem_x509_certificates(self.root_pem)

    @property
    def earliest_root_expiry(self) -> datetime.datetime:
        """When the first of the roots expires."""
        return min(root.not_valid_after_utc for root in self.roots)

    def trusted_by(self, other: Authority) -> bool:
        """Whether a peer that trusts only what `other` distributes trusts what this one has signed."""
        return any(_chains_to(self, root) for root in other.roots)

    def check(self, now: datetime.datetime) -> None:
        """Raise AuthorityError unless its certificate is a CA's, is in force, and leads to one of its roots."""
        try:
            constraints = self.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            if not constraints.ca:
                raise AuthorityError("ca-cert.pem is not the certificate of an authority (CA:FALSE)")
        except x509.ExtensionNotFound as error:
            raise AuthorityError(
                "ca-cert.pem is not the certificate of an authority: no constraints"
            ) from error
        end = self.certificate.not_valid_after_utc
        if end <= now:
            raise AuthorityError(f"ca-cert.pem expired at {end.isoformat()}")
        if not any(_chains_to(self, root) for root in self.roots):
            raise AuthorityError(
                "ca-cert.pem with cert-chain.pem leads to none of root-cert.pem's certificates"
            )

    def key_pem(self) -> bytes:
        """The private key; never log it."""
        return private_pem(self.key)

    def certificate_pem(self) -> bytes:
        """The authority's own certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def chain(self, leaf: x509.Certificate) -> list[str]:
        """The answer to a request: the leaf first, intermediates, the root last; one PEM each."""
        first = leaf.public_bytes(serialization.Encoding.PEM)
        return [part.decode() for part in (first, *self.intermediates, self.root_pem)]

    def sign_workload(
        self,
        request_pem: str,
        identity: str,
        validity: datetime.timedelta,
        lifetimes: Lifetimes,
        now: datetime.datetime,
    ) -> x509.Certificate:
        """Sign a workload's request for `identity`; a validity of zero or less means the default.

        Raises BadRequest when the request is malformed, not signed by its own key, of a weak key,
        or for longer than allowed.
        """
        public = _request_key(request_pem)
        if validity <= datetime.timedelta(0):
            validity = lifetimes.default
        if validity > lifetimes.maximum:
            raise BadRequest(
                f"requested validity of {validity.total_seconds():.0f} s is over the maximum of "
                f"{lifetimes.maximum.total_seconds():.0f} s (MAX_WORKLOAD_CERT_TTL)"
            )
        name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)])
        return self._sign(public, name, validity, now)

    def issue_server(
        self, dns_names: Sequence[str], validity: datetime.timedelta, now: datetime.datetime
    ) -> KeyPair:
        """A key and certificate for a TLS server of the control plane."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName(name) for name in dns_names])
        leaf = self._sign(key.public_key(), names, validity, now)
        chain = leaf.public_bytes(serialization.Encoding.PEM) + b"".join(self.intermediates)
        return KeyPair(private_pem(key), chain, leaf.not_valid_before_utc, leaf.not_valid_after_utc)

    def _sign(
        self,
        public: _PublicKey,
        name: x509.SubjectAlternativeName,
        validity: datetime.timedelta,
        now: datetime.datetime,
    ) -> x509.Certificate:
        end = min(now + validity, self.certificate.not_valid_after_utc)
        if end <= now:
            raise AuthorityError(
                f"the authority expired at {end.isoformat()}; renew the Secret istio-ca-secret"
            )
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))  # the name is the SAN, which RFC 5280 4.2.1.6 then has critical
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - CLOCK_SKEW, self.certificate.not_valid_before_utc))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .add_extension(name, critical=True)
            .sign(self.key, hashes.SHA256())
        )


def _chains_to(authority: Authority, root: x509.Certificate) -> bool:
    """Whether the authority's certificate was issued by `root`, directly or through its intermediates."""
    between = [x509.load_pem_x509_certificate(pem) for pem in authority.intermediates]
    current, seen = authority.certificate, {authority.certificate}
    while current != root:
        issuers = [root, *(c for c in between if c not in seen)]
        issuer = next((c for c in issuers if _issued(current, c)), None)
        if issuer is None:
            return False
        seen.add(issuer)
        current = issuer
    return True


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


_PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


def _request_key(request_pem: str) -> _PublicKey:
    if len(request_pem) > _MAX_REQUEST:
        raise BadRequest(f"csr: {len(request_pem)} bytes is over the limit of {_MAX_REQUEST}")
    try:
        request = x509.load_pem_x509_csr(request_pem.encode())
        public = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise BadRequest(f"csr: not a readable PEM certificate request: {error}") from error
    if not valid:
        raise BadRequest("csr: its signature is not of its own key")
    if isinstance(public, rsa.RSAPublicKey) and public.key_size < 2048:
        raise BadRequest(f"csr: an RSA key of {public.key_size} bits is too weak; use EC P-256 or RSA 2048")
    if not isinstance(public, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey, ed25519.Ed25519PublicKey)):
        raise BadRequest("csr: its kind of key is not supported; use EC P-256")
    return public


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=not authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def private_pem(key: PrivateKey) -> bytes:
    """A private key as unencrypted PKCS #8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

"""A client of HBONE that does as it is told, right or wrong; certificates for it, right or wrong."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
import tempfile
from pathlib import Path

import h2.config
import h2.connection
import h2.events
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from lab import Pod


class Issuer:
    """The proxies' test root, or with no folder one that nobody knows."""

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            self.key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "another root")])
            now = dt.datetime.now(dt.UTC)
            self.certificate = (
                x509.CertificateBuilder()
                .subject_name(name)
                .issuer_name(name)
                .public_key(self.key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - dt.timedelta(days=1))
                .not_valid_after(now + dt.timedelta(days=100))
                .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
                .sign(self.key, hashes.SHA256())
            )
        else:
            self.certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
            key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            self.key = key

    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def key_pem(self) -> str:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    def issue(self, *uris: str, expired: bool = False) -> str:
        """Leaf, its key and nothing else, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=2))
            .not_valid_after(now + dt.timedelta(hours=-1 if expired else 1))
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        )
        if uris:
            names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
            builder = builder.add_extension(names, critical=True)
        leaf = builder.sign(self.key, hashes.SHA256())
        return (
            leaf.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        ).decode()


class Tunnel:
    """One HTTP/2 connection over mutual TLS with one stream."""

    def __init__(self, pod: Pod, address: str, certificate: str | None, *, source: int = 0) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        if certificate:
            with tempfile.NamedTemporaryFile("w") as file:
                file.write(certificate)
                file.flush()
                context.load_cert_chain(file.name)

        def dial() -> socket.socket:
            stream = socket.socket()
            stream.setsockopt(socket.SOL_SOCKET, 36, 0x539)  # SO_MARK: as the proxy's own
            stream.settimeout(5)
            stream.connect((address, 15008))
            return stream

        self.tls = context.wrap_socket(pod.inside(dial))
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.http.initiate_connection()
        self.data = b""
        self.settings: dict[int, int] = {}
        self._flush()

    def _flush(self) -> None:
        self.tls.sendall(self.http.data_to_send())

    def request(self, authority: str, method: str = "CONNECT", **headers: str) -> int:
        """Ask for a tunnel; the status."""
        self.stream = self.http.get_next_available_stream_id()
        pseudo = [(":method", method), (":authority", authority)]
        if method != "CONNECT":
            pseudo += [(":scheme", "https"), (":path", "/")]
        self.http.send_headers(self.stream, [*pseudo, *headers.items()])
        self._flush()
        while True:
            for event in self._events():
                if isinstance(event, h2.events.ResponseReceived):
                    return int(dict(event.headers)[b":status"])

    def _events(self) -> list[h2.events.Event]:
        received = self.tls.recv(65536)
        if not received:
            raise ConnectionError("closed by the proxy")
        events = self.http.receive_data(received)
        for event in events:
            if isinstance(event, h2.events.RemoteSettingsChanged):
                self.settings |= {int(key): s.new_value for key, s in event.changed_settings.items()}
            elif isinstance(event, h2.events.ConnectionTerminated):
                raise ConnectionError("GOAWAY")
            elif isinstance(event, h2.events.DataReceived):
                self.data += event.data
                self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        self._flush()
        return events

    def read(self, count: int) -> bytes:
        while len(self.data) < count:
            self._events()
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def write(self, data: bytes) -> None:
        self.http.send_data(self.stream, data)
        self._flush()

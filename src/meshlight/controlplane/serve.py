"""istiod's gRPC services: discovery on 15010 and 15012, certificates on 15012.

The TLS port demands a service-account token of every caller. The plaintext port serves discovery
only, and lets a caller without a token in only from loopback (Istio lets everybody in; set
`XDS_AUTH_PLAINTEXT=false` for that).
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpclib import GRPCError, Status
from grpclib.config import Configuration
from grpclib.const import Cardinality, Handler
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import StreamTerminatedError
from grpclib.server import Server, Stream

from meshlight.controlplane.certificate_service import CertificateService, authenticate
from meshlight.controlplane.discovery import Connection, Discovery
from meshlight.controlplane.identity import TokenReviewer
from meshlight.controlplane.logs import Scope
from meshlight.controlplane.xds import NotYours, UnknownType
from meshlight.proto import ca_pb2
from meshlight.proto import discovery_pb2 as ads

DELTA_METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
CERTIFICATE_METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"

log = Scope("ads")


class WireCodec(CodecBase):
    """Protobuf, letting messages through that were encoded once for every receiver."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        """A message, or the bytes of one."""
        return message if isinstance(message, bytes) else message.SerializeToString()

    def decode(self, data: bytes, message_type: Any) -> Any:
        """A message; raises GRPCError when the bytes are none."""
        try:
            return message_type.FromString(data)
        except Exception as error:  # the protobuf runtimes raise classes of their own
            raise GRPCError(Status.INVALID_ARGUMENT, f"not a {message_type.DESCRIPTOR.full_name}") from error


@dataclass(slots=True)
class DiscoveryService:
    """AggregatedDiscoveryService, the incremental method.

    `reviewer` None lets every caller in; `trust_loopback` lets those in that come from loopback.
    """

    discovery: Discovery
    reviewer: TokenReviewer | None
    trust_loopback: bool

    def __mapping__(self) -> dict[str, Handler]:
        return {
            DELTA_METHOD: Handler(
                self.delta, Cardinality.STREAM_STREAM, ads.DeltaDiscoveryRequest, ads.DeltaDiscoveryResponse
            )
        }

    async def delta(self, stream: Stream[Any, Any]) -> None:
        """One client, for as long as it stays."""
        peer = _peer_address(stream)
        caller = None
        if self.reviewer is not None and not (self.trust_loopback and is_loopback(peer)):
            caller = await authenticate(self.reviewer, _authorization(stream), self.discovery.metrics)
        await self.discovery.synced.wait()
        failure: GRPCError | None = None
        with self.discovery.connection(peer, caller) as connection:
            try:
                async with asyncio.TaskGroup() as group:
                    writer = group.create_task(self._write(stream, connection))
                    try:
                        async for request in stream:
                            self.discovery.receive(connection, request)
                    except UnknownType as error:
                        failure = GRPCError(Status.INVALID_ARGUMENT, str(error))
                    except NotYours as error:
                        failure = GRPCError(Status.PERMISSION_DENIED, str(error))
                    except GRPCError as error:
                        failure = error
                    writer.cancel()
            except* (StreamTerminatedError, OSError) as gone:
                log.debug("client went away", peer=peer, error=str(gone.exceptions[0]))
        if failure is not None:
            raise failure

    async def _write(self, stream: Stream[Any, Any], connection: Connection) -> None:
        while True:
            await connection.owed.wait()
            for response in self.discovery.responses(connection):
                await stream.send_message(response.encoded)
                self.discovery.sent(connection, response)
            self.discovery.converged(connection)


@dataclass(slots=True)
class CertificateEndpoint:
    """IstioCertificateService."""

    service: CertificateService

    def __mapping__(self) -> dict[str, Handler]:
        return {
            CERTIFICATE_METHOD: Handler(
                self.create,
                Cardinality.UNARY_UNARY,
                ca_pb2.IstioCertificateRequest,
                ca_pb2.IstioCertificateResponse,
            )
        }

    async def create(self, stream: Stream[Any, Any]) -> None:
        """One certificate; the caller is authenticated before its request is read."""
        caller = await self.service.authenticate(_authorization(stream))
        request = await stream.recv_message()
        if request is None:
            raise GRPCError(Status.INVALID_ARGUMENT, "the request is missing")
        await stream.send_message(self.service.sign(caller, request))


# A dead peer is noticed within a minute: its connection would otherwise be owed changes for hours.
_CONFIGURATION = Configuration(
    _keepalive_time=30,
    _keepalive_timeout=20,
    _keepalive_permit_without_calls=True,
    _http2_max_pings_without_data=0,
    _http2_min_sent_ping_interval_without_data=30,
)


async def listen(
    services: Sequence[DiscoveryService | CertificateEndpoint],
    host: str,
    port: int,
    tls: ssl.SSLContext | None = None,
) -> Server:
    """Serve on a TCP port; close with `close()` and `wait_closed()`. Raises OSError."""
    server = Server(services, codec=WireCodec(), config=_CONFIGURATION)
    await server.start(host, port, ssl=tls, backlog=256)
    log.info("gRPC server listening", address=f"{host}:{port}", tls=tls is not None)
    return server


def _authorization(stream: Stream[Any, Any]) -> str | None:
    metadata: Any = stream.metadata or {}
    value = metadata.get("authorization")
    return value if isinstance(value, str) else None


def _peer_address(stream: Stream[Any, Any]) -> str:
    address = stream.peer.addr()
    return f"{address[0]}:{address[1]}" if address else ""


def is_loopback(peer: str) -> bool:
    """Whether a peer, `HOST:PORT`, is of this network namespace."""
    host = peer.rpartition(":")[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback

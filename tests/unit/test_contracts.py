"""The wire contracts with Istio's ztunnel, by field numbers: recorded facts, read without our own classes.

`wire` takes an encoded message apart by RFC-like rules of protobuf's encoding alone, so that a renumbered
field is found even if both of our sides were renumbered with it.
"""

from __future__ import annotations

from typing import Any

import pytest

from meshlight.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE, WORKLOAD_TYPE, publish
from meshlight.proto import authorization_pb2 as rbac
from meshlight.proto import ca_pb2, zds_pb2
from meshlight.proto import discovery_pb2 as ads
from meshlight.proto import workload_pb2 as wds


def wire(encoded: bytes) -> list[tuple[int, Any]]:
    """(field number, value) in order: ints for varints, bytes for what has a length."""
    fields, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = encoded[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(encoded):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            fields.append((number, varint()))
        elif kind == 2:
            size = varint()
            fields.append((number, encoded[at : at + size]))
            at += size
        else:
            raise AssertionError(f"wire type {kind} is not used by these contracts")
    return fields


def one(message: Any) -> tuple[int, Any]:
    """The only field of a message that has one set."""
    (field,) = wire(message.SerializeToString())
    return field


NUMBERS: list[tuple[Any, int, Any]] = [
    (wds.Address(workload=wds.Workload()), 1, b""),
    (wds.Address(service=wds.Service()), 2, b""),
    (wds.Workload(name="x"), 1, b"x"),
    (wds.Workload(namespace="x"), 2, b"x"),
    (wds.Workload(addresses=[b"\x0a\x00\x00\x01"]), 3, b"\x0a\x00\x00\x01"),
    (wds.Workload(network="x"), 4, b"x"),
    (wds.Workload(tunnel_protocol=wds.HBONE), 5, 1),
    (wds.Workload(tunnel_protocol=wds.LEGACY_ISTIO_MTLS), 5, 2),
    (wds.Workload(trust_domain="x"), 6, b"x"),
    (wds.Workload(service_account="x"), 7, b"x"),
    (wds.Workload(waypoint=wds.GatewayAddress()), 8, b""),
    (wds.Workload(node="x"), 9, b"x"),
    (wds.Workload(canonical_name="x"), 10, b"x"),
    (wds.Workload(canonical_revision="x"), 11, b"x"),
    (wds.Workload(workload_type=wds.CRONJOB), 12, 1),
    (wds.Workload(workload_type=wds.POD), 12, 2),
    (wds.Workload(workload_type=wds.JOB), 12, 3),
    (wds.Workload(workload_name="x"), 13, b"x"),
    (wds.Workload(native_tunnel=True), 14, 1),
    (wds.Workload(authorization_policies=["x"]), 16, b"x"),
    (wds.Workload(status=wds.UNHEALTHY), 17, 1),
    (wds.Workload(cluster_id="x"), 18, b"x"),
    (wds.Workload(network_gateway=wds.GatewayAddress()), 19, b""),
    (wds.Workload(uid="x"), 20, b"x"),
    (wds.Workload(hostname="x"), 21, b"x"),
    (wds.Workload(services={"a/b": wds.PortList()}), 22, b"\x0a\x03a/b\x12\x00"),
    (
        wds.Workload(application_tunnel=wds.ApplicationTunnel(protocol=wds.ApplicationTunnel.PROXY)),
        23,
        b"\x08\x01",
    ),
    (wds.Workload(application_tunnel=wds.ApplicationTunnel(port=1)), 23, b"\x10\x01"),
    (wds.Workload(locality=wds.Locality(region="r")), 24, b"\x0a\x01r"),
    (wds.Workload(locality=wds.Locality(zone="z")), 24, b"\x12\x01z"),
    (wds.Workload(locality=wds.Locality(subzone="s")), 24, b"\x1a\x01s"),
    (wds.Workload(network_mode=wds.HOST_NETWORK), 25, 1),
    (wds.Service(name="x"), 1, b"x"),
    (wds.Service(namespace="x"), 2, b"x"),
    (wds.Service(hostname="x"), 3, b"x"),
    (wds.Service(addresses=[wds.NetworkAddress()]), 4, b""),
    (wds.Service(ports=[wds.Port()]), 5, b""),
    (wds.Service(subject_alt_names=["x"]), 6, b"x"),
    (wds.Service(waypoint=wds.GatewayAddress()), 7, b""),
    (wds.Service(load_balancing=wds.LoadBalancing()), 8, b""),
    (wds.Service(ip_families=wds.DUAL), 9, 3),
    (wds.Service(canonical=True), 11, 1),
    (wds.Service(visibility=wds.Service.NAMESPACE), 14, 1),
    (wds.LoadBalancing(routing_preference=[wds.LoadBalancing.NODE]), 1, b"\x04"),
    (wds.LoadBalancing(routing_preference=[wds.LoadBalancing.REGION]), 1, b"\x01"),
    (wds.LoadBalancing(routing_preference=[wds.LoadBalancing.NETWORK]), 1, b"\x06"),
    (wds.LoadBalancing(mode=wds.LoadBalancing.STRICT), 2, 1),
    (wds.LoadBalancing(mode=wds.LoadBalancing.FAILOVER), 2, 2),
    (wds.LoadBalancing(mode=wds.LoadBalancing.PASSTHROUGH), 2, 3),
    (wds.LoadBalancing(health_policy=wds.LoadBalancing.ALLOW_ALL), 3, 1),
    (wds.Port(service_port=80), 1, 80),
    (wds.Port(target_port=80), 2, 80),
    (wds.Port(app_protocol=wds.TLS), 3, 5),
    (wds.PortList(ports=[wds.Port()]), 1, b""),
    (wds.GatewayAddress(hostname=wds.NamespacedHostname(namespace="n")), 1, b"\x0a\x01n"),
    (wds.GatewayAddress(hostname=wds.NamespacedHostname(hostname="h")), 1, b"\x12\x01h"),
    (wds.GatewayAddress(address=wds.NetworkAddress()), 2, b""),
    (wds.GatewayAddress(hbone_mtls_port=15008), 3, 15008),
    (wds.NetworkAddress(network="x"), 1, b"x"),
    (wds.NetworkAddress(address=b"x"), 2, b"x"),
    (wds.NetworkAddress(length=0), 3, 0),
    (rbac.Authorization(name="x"), 1, b"x"),
    (rbac.Authorization(namespace="x"), 2, b"x"),
    (rbac.Authorization(scope=rbac.NAMESPACE), 3, 1),
    (rbac.Authorization(scope=rbac.WORKLOAD_SELECTOR), 3, 2),
    (rbac.Authorization(action=rbac.DENY), 4, 1),
    (rbac.Authorization(rules=[rbac.Rule()]), 5, b""),
    (rbac.Authorization(dry_run=True), 6, 1),
    (rbac.Rule(clauses=[rbac.Clause()]), 1, b""),
    (rbac.Clause(matches=[rbac.Match()]), 2, b""),
    (rbac.Match(namespaces=[rbac.StringMatch(exact="x")]), 1, b"\x0a\x01x"),
    (rbac.Match(not_namespaces=[rbac.StringMatch(prefix="x")]), 2, b"\x12\x01x"),
    (rbac.Match(principals=[rbac.StringMatch(suffix="x")]), 3, b"\x1a\x01x"),
    (rbac.Match(not_principals=[rbac.StringMatch(presence=rbac.StringMatch.Presence())]), 4, b"\x22\x00"),
    (rbac.Match(source_ips=[rbac.Address(address=b"x")]), 5, b"\x0a\x01x"),
    (rbac.Match(not_source_ips=[rbac.Address(length=8)]), 6, b"\x10\x08"),
    (rbac.Match(destination_ips=[rbac.Address()]), 7, b""),
    (rbac.Match(not_destination_ips=[rbac.Address()]), 8, b""),
    (rbac.Match(destination_ports=[80]), 9, b"\x50"),
    (rbac.Match(not_destination_ports=[80]), 10, b"\x50"),
    (rbac.Match(service_accounts=[rbac.ServiceAccountMatch(namespace="n")]), 11, b"\x0a\x01n"),
    (rbac.Match(not_service_accounts=[rbac.ServiceAccountMatch(service_account="s")]), 12, b"\x12\x01s"),
    (ca_pb2.IstioCertificateRequest(csr="x"), 1, b"x"),
    (ca_pb2.IstioCertificateRequest(validity_duration=3600), 3, 3600),
    (ca_pb2.IstioCertificateResponse(cert_chain=["x"]), 1, b"x"),
    (zds_pb2.ZdsHello(version=zds_pb2.V1), 1, 1),
    (zds_pb2.WorkloadRequest(add=zds_pb2.AddWorkload(uid="u")), 1, b"\x0a\x01u"),
    (zds_pb2.AddWorkload(workload_info=zds_pb2.WorkloadInfo(name="n")), 2, b"\x0a\x01n"),
    (zds_pb2.WorkloadInfo(namespace="n"), 2, b"n"),
    (zds_pb2.WorkloadInfo(service_account="s"), 3, b"s"),
    (zds_pb2.WorkloadRequest(snapshot_sent=zds_pb2.SnapshotSent()), 3, b""),
    (zds_pb2.WorkloadResponse(ack=zds_pb2.Ack(error="e")), 1, b"\x0a\x01e"),
    (ads.DeltaDiscoveryRequest(type_url="x"), 2, b"x"),
    (ads.DeltaDiscoveryRequest(resource_names_subscribe=["*"]), 3, b"*"),
    (ads.DeltaDiscoveryRequest(resource_names_unsubscribe=["*"]), 4, b"*"),
    (ads.DeltaDiscoveryRequest(initial_resource_versions={"n": "v"}), 5, b"\x0a\x01n\x12\x01v"),
    (ads.DeltaDiscoveryRequest(response_nonce="x"), 6, b"x"),
    (ads.DeltaDiscoveryResponse(resources=[ads.Resource()]), 2, b""),
    (ads.DeltaDiscoveryResponse(type_url="x"), 4, b"x"),
    (ads.DeltaDiscoveryResponse(nonce="x"), 5, b"x"),
    (ads.DeltaDiscoveryResponse(removed_resources=["x"]), 6, b"x"),
    (ads.Resource(version="x"), 1, b"x"),
    (ads.Resource(name="x"), 3, b"x"),
    (ads.Resource(aliases=["x"]), 4, b"x"),
]


@pytest.mark.parametrize(
    ("message", "number", "value"),
    NUMBERS,
    ids=[f"{type(m).__name__}.{n}-{i}" for i, (m, n, _) in enumerate(NUMBERS)],
)
def test_field_numbers(message: Any, number: int, value: Any) -> None:
    assert one(message) == (number, value)


def test_names_of_types_and_services() -> None:
    assert ADDRESS_TYPE == "type.googleapis.com/istio.workload.Address"
    assert WORKLOAD_TYPE == "type.googleapis.com/istio.workload.Workload"
    assert AUTHORIZATION_TYPE == "type.googleapis.com/istio.security.Authorization"
    assert ca_pb2.IstioCertificateRequest.DESCRIPTOR.full_name == "istio.v1.auth.IstioCertificateRequest"
    assert zds_pb2.WorkloadRequest.DESCRIPTOR.full_name == "istio.workload.zds.WorkloadRequest"


def test_a_published_resource_is_a_whole_entry_of_a_response() -> None:
    published = publish(ADDRESS_TYPE, "uid", wds.Address(workload=wds.Workload(uid="uid")), ["/10.0.0.1"])
    (entry,) = wire(published.fragment)
    assert entry[0] == 2, "DeltaDiscoveryResponse.resources"
    fields = dict(wire(entry[1]))
    assert fields[3] == b"uid"
    assert fields[4] == b"/10.0.0.1"
    packed = dict(wire(fields[2]))
    assert packed[1].decode() == ADDRESS_TYPE
    assert wire(packed[2]) == [(1, b"\xa2\x01\x03uid")]

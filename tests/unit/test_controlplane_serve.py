"""istiod's servers on loopback sockets, with objects and tokens of this test's making."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from controlplane_objects import endpoint_slice, pod, security, service
from grpclib import GRPCError, Status
from grpclib.client import Channel, StreamStreamMethod, UnaryUnaryMethod
from test_controlplane_ca import PROXY, ZTUNNEL, Reviewer, ask

from meshlight.controlplane import monitoring, serve
from meshlight.controlplane.authority import Authority, Lifetimes
from meshlight.controlplane.certificate_service import CertificateService
from meshlight.controlplane.discovery import Discovery
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.identity import Caller
from meshlight.controlplane.metrics import Metrics
from meshlight.controlplane.node_authorization import NodeAuthorizer
from meshlight.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from meshlight.controlplane.serving_certificate import ServingCertificate, dns_names, load
from meshlight.controlplane.settings import Mesh, ServiceAccount
from meshlight.proto import ca_pb2
from meshlight.proto import discovery_pb2 as ads

NODE_ID = "ztunnel~10.0.0.1~ztunnel-1.istio-system~istio-system.svc.cluster.local"


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass
class Istiod:
    """A control plane whose objects the test sets."""

    discovery: Discovery
    authority: Authority
    certificate: ServingCertificate
    plain_port: int
    secure_port: int
    monitoring_port: int

    def set(self, *objects: dict[str, Any]) -> None:
        for obj in objects:
            self.discovery.observe(obj["kind"], ObjectKey.of(obj), obj)

    def trusting(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.authority.root_pem.decode())
        context.set_alpn_protocols(["h2"])
        return context

    @contextlib.asynccontextmanager
    async def secure(self) -> AsyncIterator[Channel]:
        """A channel over TLS that insists on istiod's name."""
        config = serve.Configuration(ssl_target_name_override="istiod.istio-system.svc")
        async with Channel("127.0.0.1", self.secure_port, ssl=self.trusting(), config=config) as channel:
            yield channel


def port_of(server: Any) -> int:
    port: int = server._server.sockets[0].getsockname()[1]
    return port


@pytest.fixture
async def istiod() -> AsyncIterator[Istiod]:
    mesh, metrics = Mesh(), Metrics()
    reviewer = Reviewer({"proxy": PROXY, "web": Caller(ServiceAccount("shop", "web"))})
    nodes = NodeAuthorizer("cluster.local", frozenset({ZTUNNEL}))
    for obj in (pod("ztunnel-1", "istio-system", account="ztunnel"), pod()):
        nodes.observe(ObjectKey.of(obj), obj)
    discovery = Discovery(mesh, metrics, timedelta(milliseconds=5), timedelta(milliseconds=50))
    authority = Authority.create("cluster.local", timedelta(days=30), now())
    certificate = ServingCertificate(authority, dns_names(mesh), now)
    lifetimes = Lifetimes(timedelta(days=1), timedelta(days=90))
    certificates = CertificateService(authority, lifetimes, "cluster.local", reviewer, nodes, metrics, now)
    plain = serve.DiscoveryService(discovery, reviewer, trust_loopback=True)
    secure = serve.DiscoveryService(discovery, reviewer, trust_loopback=False)
    servers = [
        await serve.listen([plain], "127.0.0.1", 0),
        await serve.listen(
            [secure, serve.CertificateEndpoint(certificates)], "127.0.0.1", 0, certificate.context
        ),
    ]
    page = monitoring.application(
        discovery, metrics, lambda: [] if discovery.synced.is_set() else ["Pod"], reviewer, mesh.root_namespace
    )
    runner = await monitoring.listen(page, "127.0.0.1", 0)
    pushing = asyncio.create_task(discovery.run())
    yield Istiod(
        discovery, authority, certificate, port_of(servers[0]), port_of(servers[1]), runner.addresses[0][1]
    )
    pushing.cancel()
    for server in servers:
        server.close()
        await server.wait_closed()
    await runner.cleanup()


class Stream:
    """A delta xDS stream as a node proxy holds it; every answer is acknowledged."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def ask(self, type_url: str = ADDRESS_TYPE, **fields: Any) -> None:
        request = ads.DeltaDiscoveryRequest(type_url=type_url, **fields)
        request.node.id = NODE_ID
        await self.stream.send_message(request)

    async def answer(self) -> ads.DeltaDiscoveryResponse:
        async with asyncio.timeout(5):
            response: ads.DeltaDiscoveryResponse = await self.stream.recv_message()
        await self.ask(response.type_url, response_nonce=response.nonce)
        return response


@contextlib.asynccontextmanager
async def opened(channel: Channel, token: str | None = None) -> AsyncIterator[Stream]:
    method = StreamStreamMethod(
        channel, serve.DELTA_METHOD, ads.DeltaDiscoveryRequest, ads.DeltaDiscoveryResponse
    )
    async with method.open(metadata={"authorization": f"Bearer {token}"} if token else None) as stream:
        yield Stream(stream)
        await stream.cancel()


async def refusal(channel: Channel, token: str | None, type_url: str = ADDRESS_TYPE) -> GRPCError:
    """What a stream ends with that is not served."""
    method = StreamStreamMethod(
        channel, serve.DELTA_METHOD, ads.DeltaDiscoveryRequest, ads.DeltaDiscoveryResponse
    )
    with pytest.raises(GRPCError) as caught:
        async with method.open(metadata={"authorization": f"Bearer {token}"} if token else None) as stream:
            await Stream(stream).ask(type_url)
            assert await stream.recv_message() is None
    return caught.value


async def certify(channel: Channel, token: str | None, request: ca_pb2.IstioCertificateRequest) -> list[str]:
    method = UnaryUnaryMethod(
        channel, serve.CERTIFICATE_METHOD, ca_pb2.IstioCertificateRequest, ca_pb2.IstioCertificateResponse
    )
    metadata = {"authorization": f"Bearer {token}"} if token else None
    return list((await method(request, metadata=metadata, timeout=5)).cert_chain)


async def read(istiod: Istiod, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{istiod.monitoring_port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def eventually(istiod: Istiod, path: str, expected: str) -> str:
    """The page once it holds a text; the bookkeeping of an ACK comes after its sending."""
    async with asyncio.timeout(5):
        while True:
            page = (await read(istiod, path))[1]
            if expected in page:
                return page
            await asyncio.sleep(0.01)


async def test_a_stream_over_tls(istiod: Istiod) -> None:
    istiod.set(pod(), service())
    istiod.discovery.start()
    async with istiod.secure() as channel, opened(channel, "proxy") as stream:
        await stream.ask()
        first = await stream.answer()
        assert {r.name for r in first.resources} == {
            "Kubernetes//Pod/shop/web-1",
            "shop/web.shop.svc.cluster.local",
        }
        istiod.set(pod(ready=False), pod("web-2", ip="10.244.1.6"))
        second = await stream.answer()
        assert {r.name for r in second.resources} == {
            "Kubernetes//Pod/shop/web-1",
            "Kubernetes//Pod/shop/web-2",
        }
        istiod.discovery.observe("Pod", ObjectKey("shop", "web-2"), None)
        assert list((await stream.answer()).removed_resources) == ["Kubernetes//Pod/shop/web-2"]


async def test_nobody_is_answered_before_everything_is_known(istiod: Istiod) -> None:
    async with Channel("127.0.0.1", istiod.plain_port) as channel, opened(channel) as stream:
        await stream.ask(initial_resource_versions={"Kubernetes//Pod/shop/web-1": "x"})
        answer = asyncio.create_task(stream.answer())
        assert (await read(istiod, "/ready"))[0] == 503
        istiod.set(pod())
        istiod.discovery.start()
        response = await answer
        assert [r.name for r in response.resources] == ["Kubernetes//Pod/shop/web-1"]
        assert not response.removed_resources
        assert (await read(istiod, "/ready"))[0] == 200


@pytest.mark.parametrize("token", [None, "stolen"])
async def test_a_stream_over_tls_needs_a_token(istiod: Istiod, token: str | None) -> None:
    istiod.discovery.start()
    async with istiod.secure() as channel:
        assert (await refusal(channel, token)).status is Status.UNAUTHENTICATED
    assert not istiod.discovery.connections


async def test_an_unknown_type_is_refused_in_words(istiod: Istiod) -> None:
    istiod.discovery.start()
    async with Channel("127.0.0.1", istiod.plain_port) as channel:
        error = await refusal(channel, None, "type.googleapis.com/envoy.config.listener.v3.Listener")
    assert error.status is Status.INVALID_ARGUMENT
    assert "is not served; served are" in (error.message or "")


async def test_many_changes_make_few_pushes(istiod: Istiod) -> None:
    istiod.discovery.start()
    async with Channel("127.0.0.1", istiod.plain_port) as channel, opened(channel) as stream:
        await stream.ask()
        await stream.answer()
        istiod.set(*(pod(f"p{i}", ip=f"10.0.0.{i}") for i in range(200)))
        assert len((await stream.answer()).resources) == 200


async def test_what_proxies_acknowledge_is_seen(istiod: Istiod) -> None:
    http = {"to": [{"operation": {"methods": ["GET"]}}]}
    istiod.set(security("AuthorizationPolicy", action="DENY", rules=[http]))
    istiod.discovery.start()
    async with Channel("127.0.0.1", istiod.plain_port) as channel, opened(channel) as stream:
        await stream.ask(AUTHORIZATION_TYPE)
        await stream.answer()
        page = await eventually(istiod, "/debug/syncz", '"SYNCED"')
        assert '"proxy": "ztunnel-1.istio-system"' in page
        istiod.set(security("AuthorizationPolicy", name="bad"))
        response = await stream.stream.recv_message()
        error = ads.Status(code=13, message="no such field")
        await stream.ask(AUTHORIZATION_TYPE, response_nonce=response.nonce, error_detail=error)
        page = await eventually(istiod, "/debug/syncz", '"ERROR"')
        assert "no such field" in page
        metrics = (await read(istiod, "/metrics"))[1]
        assert 'pilot_total_xds_rejects{type="wads"} 1.0' in metrics
        assert 'pilot_xds_pushes{type="wads"} 2.0' in metrics
        assert 'pilot_xds{version="0.1.0"} 1.0' in metrics
        findings = (await read(istiod, "/debug/authorizationz"))[1]
        assert "spec.rules[0].to[0].operation.methods" in findings
        assert "ztunnel-1.istio-system" in (await read(istiod, "/debug/connections"))[1]
    await eventually(istiod, "/metrics", 'pilot_xds{version="0.1.0"} 0.0')


async def test_certificates(istiod: Istiod) -> None:
    async with istiod.secure() as channel:
        chain = await certify(channel, "proxy", ask("spiffe://cluster.local/ns/shop/sa/web"))
        assert chain[-1].encode() == istiod.authority.root_pem
        for token, wanted, status in (
            (None, "", Status.UNAUTHENTICATED),
            ("stolen", "", Status.UNAUTHENTICATED),
            ("web", "spiffe://cluster.local/ns/shop/sa/web", Status.PERMISSION_DENIED),
            ("web", "nobody", Status.INVALID_ARGUMENT),
        ):
            with pytest.raises(GRPCError) as refused:
                await certify(channel, token, ask(wanted))
            assert refused.value.status is status


async def test_certificates_are_not_served_in_plaintext(istiod: Istiod) -> None:
    async with Channel("127.0.0.1", istiod.plain_port) as channel:
        with pytest.raises(GRPCError):
            await certify(channel, "proxy", ask())


async def test_a_renewed_serving_certificate_is_used_at_once(istiod: Istiod) -> None:
    async def serial() -> int:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", istiod.secure_port, ssl=istiod.trusting(), server_hostname="istiod.istio-system"
        )
        certificate = writer.get_extra_info("ssl_object").getpeercert()
        writer.close()
        return int(certificate["serialNumber"], 16)

    before = await serial()
    load(istiod.certificate.context, istiod.authority.issue_server(dns_names(Mesh()), timedelta(days=1), now()))
    assert await serial() != before


async def test_an_unreadable_object_keeps_its_last_readable_state(istiod: Istiod) -> None:
    istiod.set(pod())
    broken = pod()
    broken["metadata"]["labels"] = "not labels"
    istiod.set(broken)
    istiod.discovery.start()
    assert istiod.discovery.index.collections[ADDRESS_TYPE].get("Kubernetes//Pod/shop/web-1") is not None
    assert 'pilot_k8s_object_errors{type="Pod"} 1.0' in (await read(istiod, "/metrics"))[1]


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("127.0.0.1:5000", True),
        ("::1:5000", True),
        ("::ffff:127.0.0.1:5000", True),
        ("10.244.1.5:5000", False),
        ("fe80::1%eth0:5000", False),
        ("", False),
    ],
)
def test_only_loopback_is_let_in_without_a_token(peer: str, expected: bool) -> None:
    assert serve.is_loopback(peer) is expected


async def test_debug_pages_under_istios_keys(istiod: Istiod) -> None:
    entry = {
        "kind": "ServiceEntry",
        "metadata": {"name": "ext", "namespace": "shop"},
        "spec": {"hosts": ["api.example.com"], "resolution": "DNS", "ports": [{"number": 443, "name": "tls"}]},
    }
    istiod.set(pod("web-1"), service(), endpoint_slice("web-1"), entry)
    istiod.discovery.start()
    pages = {}
    for name in ("registryz", "endpointz", "ambientz", "workloadz", "servicez", "mesh", "adsz", "list"):
        status, text = await read(istiod, f"/debug/{name}")
        assert status == 200, name
        pages[name] = json.loads(text)
    registered = {found["hostname"]: found for found in pages["registryz"]}
    web = registered["web.shop.svc.cluster.local"]
    assert web["Attributes"] == {"ServiceRegistry": "Kubernetes", "Name": "web", "Namespace": "shop"}
    assert web["clusterVIPs"]["Addresses"] == {"Kubernetes": ["10.96.0.7"]}
    assert registered["api.example.com"]["MeshExternal"]
    shards = pages["endpointz"]["web.shop.svc.cluster.local"]["shop"]["Shards"]["Kubernetes/Kubernetes"]
    assert [(e["Addresses"], e["EndpointPort"]) for e in shards] == [(["10.244.1.5"], 8080)]
    assert {w["name"] for w in pages["ambientz"]["workloads"]} == {"web-1", "ext"}
    assert pages["mesh"]["trustDomain"] == "cluster.local"
    assert "/debug/syncz" in pages["list"]


async def test_a_proxys_configuration_is_dumped(istiod: Istiod) -> None:
    istiod.set(pod("web-1"))
    istiod.discovery.start()
    async with Channel("127.0.0.1", istiod.plain_port) as channel, opened(channel) as stream:
        await stream.ask()
        await stream.answer()
        status, text = await read(istiod, "/debug/config_dump?proxyID=ztunnel-1.istio-system")
        assert status == 200
        (config,) = json.loads(text)["configs"]
        assert config["resource"]["workload"]["addresses"] == ["10.244.1.5"]
        await eventually(istiod, "/debug/syncz", '"ackedTime"')
        status, text = await read(istiod, "/debug/config_dump?proxyID=nobody")
        assert (status, "connected are: ztunnel-1.istio-system" in text) == (404, True)

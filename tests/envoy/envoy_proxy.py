"""A real Envoy on loopback that runs filters we compiled, and a client that speaks as the node proxy does."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import address_pb2, base_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2 as hcm
from google.protobuf import json_format

from meshlight.controlplane.envoy import listeners, wire

ENVOY = Path(sys.executable).with_name("envoy")
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def cluster(name: str, port: int) -> Any:
    """A cluster of one server on loopback."""
    made = cluster_pb2.Cluster(name=name, connect_timeout=wire.seconds(2))
    made.load_assignment.cluster_name = name
    endpoint = made.load_assignment.endpoints.add().lb_endpoints.add().endpoint
    endpoint.address.socket_address.address = "127.0.0.1"
    endpoint.address.socket_address.port_value = port
    return made


def listener(name: str, filters: Sequence[Any], rules: Mapping[str, Any]) -> Any:
    """A listener that puts requests through `filters`, which its routes give `rules`, and then answers 200,
    echoing two headers."""
    headers = ["x-claim", "x-seen"]
    route = route_components_pb2.Route(
        match=route_components_pb2.RouteMatch(prefix="/"),
        direct_response=route_components_pb2.DirectResponseAction(
            status=200, body=base_pb2.DataSource(inline_string="passed")
        ),
        response_headers_to_add=[
            base_pb2.HeaderValueOption(
                header=base_pb2.HeaderValue(key=f"echo-{h}", value=f"%REQ({h})%"), keep_empty_value=True
            )
            for h in headers
        ],
    )
    manager = hcm.HttpConnectionManager(
        stat_prefix=name,
        http_filters=[
            *filters,
            hcm.HttpFilter(name="envoy.filters.http.router", typed_config=wire.packed(router_pb2.Router())),
        ],
        route_config=route_pb2.RouteConfiguration(
            virtual_hosts=[route_components_pb2.VirtualHost(name="all", domains=["*"], routes=[route])],
            typed_per_filter_config=rules,
        ),
        use_remote_address=wire.true(False),
        delayed_close_timeout=wire.seconds(0),
    )
    return listener_pb2.Listener(
        name=name,
        address=address_pb2.Address(
            socket_address=address_pb2.SocketAddress(address="127.0.0.1", port_value=0)
        ),
        listener_filters=[listeners.proxy_protocol()],
        filter_chains=[
            listener_components_pb2.FilterChain(
                filters=[
                    listeners.source(),
                    listeners.network_filter("envoy.filters.network.http_connection_manager", manager),
                ]
            )
        ],
    )


@dataclass(frozen=True)
class Response:
    """What the proxy answered."""

    status: int
    headers: Mapping[str, str]
    body: str


@dataclass(frozen=True)
class Proxy:
    """A running Envoy: its listeners' ports by name, and its admin port."""

    ports: Mapping[str, int]
    admin: int

    def request(
        self,
        name: str,
        method: str = "GET",
        path: str = "/",
        *,
        identity: str = "",
        source: str = "10.1.0.7",
        destination: tuple[str, int] = ("10.96.0.20", 8080),
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """One request as the node proxy would hand it over: PROXY protocol first, with who it is from."""
        fields = {"host": "shop.example", "connection": "close", **(headers or {})}
        text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n"
        with socket.create_connection(("127.0.0.1", self.ports[name]), 10) as stream:
            stream.sendall(proxy_header(source, destination, identity) + text.encode())
            answer = b""
            while chunk := stream.recv(65536):
                answer += chunk
        head, _, body = answer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        pairs = (line.partition(": ") for line in lines[1:])
        return Response(int(lines[0].split()[1]), {k.lower(): v for k, _, v in pairs}, body.decode())

    def stats(self) -> str:
        """Envoy's own statistics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/stats", timeout=10) as answer:
            return str(answer.read().decode())


def proxy_header(source: str, destination: tuple[str, int], identity: str) -> bytes:
    """PROXY protocol version 2 (HAProxy's specification, 2.2) with the identity as a field of type 0xD0."""
    body = socket.inet_aton(source) + socket.inet_aton(destination[0])
    body += (40000).to_bytes(2, "big") + destination[1].to_bytes(2, "big")
    if identity:
        body += b"\xd0" + len(identity).to_bytes(2, "big") + identity.encode()
    return SIGNATURE + b"\x21\x11" + len(body).to_bytes(2, "big") + body


@contextmanager
def running(folder: Path, serving: Sequence[Any], clusters: Sequence[Any] = ()) -> Iterator[Proxy]:
    """An Envoy with these listeners; fails with its own words when it refuses them."""
    bootstrap = bootstrap_pb2.Bootstrap()
    bootstrap.static_resources.listeners.extend(serving)
    bootstrap.static_resources.clusters.extend(clusters)
    bootstrap.admin.address.socket_address.address = "127.0.0.1"
    bootstrap.admin.address.socket_address.port_value = 0
    config, admin_file, log = folder / "envoy.json", folder / "admin", folder / "envoy.log"
    config.write_text(json_format.MessageToJson(bootstrap, preserving_proto_field_name=True))
    command = [str(ENVOY), "-c", str(config), "--admin-address-path", str(admin_file)]
    command += ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "Envoy did not start: " + log.read_text()
            if admin_file.exists() and (address := admin_file.read_text()):
                port = int(address.rpartition(":")[2])
                ports = _ports(port)
                if len(ports) == len(serving):
                    yield Proxy(ports, port)
                    return
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


def _ports(admin: int) -> dict[str, int]:
    url = f"http://127.0.0.1:{admin}/listeners?format=json"
    with urllib.request.urlopen(url, timeout=10) as answer:
        statuses = json.load(answer).get("listener_statuses", [])
    return {s["name"]: s["local_address"]["socket_address"]["port_value"] for s in statuses}

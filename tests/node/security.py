"""Who is let in: certificates, addresses, ports, policies. What is refused is logged and counted."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable

from dataplane import STRICT, Mesh
from hbone import Issuer, Tunnel
from lab import Pod, alive, echo, load, read, refused, wait_until

OPENED, FAILED = "istio_tcp_connections_opened_total", "istio_tcp_connections_failed_total"
GOOD = "spiffe://cluster.local/ns/shop/sa/intruder"


def scene(**environment: str) -> tuple[Mesh, Pod, Pod]:
    mesh = Mesh(environment)
    client, server = mesh.pod(0, "client", account="client"), mesh.pod(1, "server", account="server")
    mesh.settle()
    server.serve(80)
    return mesh, client, server


def _turned_away(work: Callable[[], object]) -> None:
    try:
        answer = work()
    except (ssl.SSLError, ConnectionError):
        return
    raise AssertionError(f"let in: {answer!r}")


def strangers() -> None:
    """Certificates that prove nothing here, and tunnels that lead elsewhere."""
    mesh, client, server = scene(TRUST_DOMAIN_ALIASES="old.example")
    outside = mesh.pod(0, "outside", mesh=False)
    mesh.settle()
    ours, others = Issuer(mesh.folder), Issuer(None)
    proxy = mesh.proxies[1]
    bad = {
        "no certificate": None,
        "another root": others.issue(GOOD),
        "expired": ours.issue(GOOD, expired=True),
        "another trust domain": ours.issue("spiffe://evil.example/ns/shop/sa/client"),
        "no identity": ours.issue(),
        "two identities": ours.issue(GOOD, "spiffe://cluster.local/ns/shop/sa/client"),
        "not SPIFFE": ours.issue("https://example.com"),
    }
    for number, (name, certificate) in enumerate(bad.items(), 1):
        _turned_away(
            lambda certificate=certificate: Tunnel(outside, server.address, certificate).request(  # type: ignore[misc]
                f"{server.address}:80"
            )
        )
        wait_until(lambda number=number: proxy.metric(FAILED) == number, f"{name}: counted")  # type: ignore[misc]
    with outside.connect(server.address, 15008) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert plain.recv(100)[:1] in (b"", b"\x15"), "closed, perhaps with a TLS alert"
    wait_until(lambda: proxy.metric(FAILED, response_flags="TLS_FAILURE") == len(bad) + 1, "plaintext: counted")

    def early() -> list[str]:
        return [e["error"] for e in proxy.access() if e["message"] == "connection failed"]

    wait_until(lambda: len(early()) == len(bad) + 1, "the log")
    assert any("evil.example" in error for error in early())

    good = ours.issue(GOOD)
    for name, authority in {
        "another pod": f"{client.address}:80",
        "this node's other side": "172.20.0.12:80",
        "loopback": "127.0.0.1:80",
        "capture": f"{server.address}:15001",
        "plaintext capture": f"{server.address}:15006",
        "HBONE": f"{server.address}:15008",
        "a name": "server.shop.svc.cluster.local:80",
    }.items():
        assert Tunnel(outside, server.address, good).request(authority) == 400, name
    assert Tunnel(outside, server.address, good).request(f"{server.address}:80", "GET") == 400
    wait_until(lambda: proxy.metric(FAILED, response_flags="CONNECT") == 8, "misdirected tunnels: counted")
    # And what is in order is let in, from here and from an alias.
    for identity in (GOOD, "spiffe://old.example/ns/shop/sa/client"):
        tunnel = Tunnel(outside, server.address, ours.issue(identity))
        assert tunnel.request(f"{server.address}:80") == 200
        assert tunnel.read(8) == b"server 1"
        # ENABLE_PUSH is a client's; MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE.
        assert tunnel.settings[3] >= 100 and tunnel.settings[4] == 4 << 20 and tunnel.settings[5] >= 16384
    assert Tunnel(outside, server.address, good).request(f"{server.address}:81") == 503, "nobody listens"
    for proxy in mesh.proxies:
        assert "PRIVATE" not in proxy.log.read_text() + proxy.get("ADMIN", "/config_dump")


def policies() -> None:
    """Denials name their policy; open connections end when policies change; dry runs only tell."""
    mesh, client, server = scene()
    stranger = mesh.pod(0, "stranger", account="stranger")
    outside = mesh.pod(0, "outside", mesh=False)
    mesh.settle()
    proxy = mesh.proxies[1]
    held = {pod.uid: pod.connect(server.address, 80) for pod in (client, stranger, outside)}
    for stream in held.values():
        assert read(stream).startswith("server ")

    def denied(policy: str, dry_run: str = "false") -> float:
        return proxy.metric("istio_authorization_denials_total", policy=policy, dry_run=dry_run)

    mesh.policies = [{**STRICT, "dryRun": True}]
    mesh.settle()
    outside.ask(server.address, 80)
    wait_until(lambda: denied("istio-system/strict", "true") == 1, "the dry run to be counted")
    assert alive(held["outside"])

    mesh.policies = [STRICT]
    mesh.settle()
    wait_until(lambda: not alive(held["outside"]), "plaintext to be closed")
    assert refused(outside, server.address, 80) and alive(held["client"])
    wait_until(lambda: denied("istio-system/strict") == 2, "both denials to be counted")
    reasons = [e["error"] for e in proxy.access() if "error" in e]
    assert reasons[0].startswith(
        "connection closed due to policy change: explicitly denied by: istio-system/strict"
    )
    assert "connection closed due to policy rejection: explicitly denied by: istio-system/strict" in reasons

    allow = {
        "name": "only-client",
        "namespace": "shop",
        "scope": "selector",
        "rules": [[[{"principals": ["cluster.local/ns/shop/sa/client"]}], [{"destinationPorts": [80]}]]],
    }
    mesh.policies = [STRICT, allow]
    mesh.workloads["server"]["policies"] = ["shop/only-client", "shop/gone"]
    mesh.settle()
    wait_until(lambda: not alive(held["stranger"]), "the stranger to go")
    assert alive(held["client"]) and client.ask(server.address, 80)
    assert refused(stranger, server.address, 80)
    wait_until(lambda: denied("shop/only-client") == 2, "denials by the ALLOW policy")
    entry = [e for e in mesh.proxies[0].access() if "denied by a policy" in e.get("error", "")]
    assert entry and entry[0]["src.workload"] == "stranger", "the client's side says so too"
    assert "not known" in proxy.log.read_text(), "policies that are missing are warned of"
    assert proxy.metric(FAILED, response_flags="DENY") >= 3


def root_rotation() -> None:
    """A root is replaced in three steps under load, and no connection notices."""
    mesh, client, server = scene(SECRET_TTL="2s")
    old, new = Issuer(mesh.folder), Issuer(None)
    certificate, key, others = (mesh.folder / name for name in ("ca.crt", "ca.key", "other-roots.crt"))

    def renewed() -> None:
        """Every proxy has asked for new certificates, twice, so that what it holds is of now."""
        before = [proxy.log.read_text().count("certificate issued") for proxy in mesh.proxies]
        wait_until(
            lambda: all(
                proxy.log.read_text().count("certificate issued") >= count + 2
                for proxy, count in zip(mesh.proxies, before, strict=True)
            ),
            "certificates to be renewed",
            20,
        )

    held = client.connect(server.address, 80)
    read(held)
    with load(lambda: client.ask(server.address, 80)) as failures:
        others.write_text(new.pem())
        renewed()
        others.write_text(old.pem())
        key.write_text(new.key_pem())
        certificate.write_text(new.pem())
        renewed()
        others.unlink()
        renewed()
        echo(held, "under another root")
    assert not failures, failures[:3]
    _turned_away(lambda: Tunnel(client, server.address, old.issue(GOOD)).request(f"{server.address}:80"))
    assert Tunnel(client, server.address, new.issue(GOOD)).request(f"{server.address}:80") == 200


def admin() -> None:
    """The windows into the proxy: connections, certificates, levels, readiness, metrics, the log's fields."""
    mesh, client, server = scene()
    mesh.services = [
        {
            "name": "server",
            "namespace": "shop",
            "hostname": "server.shop.svc.cluster.local",
            "addresses": ["10.96.7.7"],
            "ports": {"8080": 80},
        }
    ]
    mesh.workloads["server"]["services"] = {"shop/server.shop.svc.cluster.local": {"8080": 80}}
    mesh.settle()
    held = client.connect("10.96.7.7", 8080)
    read(held)
    dumps = [json.loads(proxy.get("ADMIN", "/config_dump")) for proxy in mesh.proxies]
    states = [dump["workloadState"] for dump in dumps]
    source = f"{client.address}:{held.getsockname()[1]}"
    assert states[0]["client"]["info"] == {"name": "client", "namespace": "shop", "serviceAccount": "client"}
    assert states[0]["client"]["connections"] == {
        "inbound": [],
        "outbound": [
            {
                "src": source,
                "originalDst": "10.96.7.7:8080",
                "actualDst": f"{server.address}:15008",
                "protocol": "HBONE",
            }
        ],
    }
    (inbound,) = states[1]["server"]["connections"]["inbound"]
    assert inbound["actualDst"] == f"{server.address}:80" and inbound["protocol"] == "HBONE"
    assert inbound["originalDst"] == "server.shop.svc.cluster.local"
    held.close()
    (certificate,) = [c for c in dumps[0]["certificates"] if c["identity"].endswith("/sa/client")]
    assert certificate["state"] == "Available" and certificate["certChain"][0]["expirationTime"].endswith("Z")
    assert certificate["rootCerts"][0]["serialNumber"]
    source_proxy = mesh.proxies[0]
    assert "info" in source_proxy.get("ADMIN", "/logging", "POST")
    assert "debug" in source_proxy.get("ADMIN", "/logging?level=ztunnel::proxy:debug", "POST")
    assert "debug" not in source_proxy.get("ADMIN", "/logging?reset", "POST")

    def entries() -> list[dict[str, object]]:
        return [proxy.access()[-1] for proxy in mesh.proxies if proxy.access()]

    out, into = wait_until(lambda: entries() if len(entries()) == 2 else None, "both lines")
    common = {
        "level": "info",
        "scope": "access",
        "message": "connection complete",
        "src.workload": "client",
        "src.namespace": "shop",
        "src.identity": "spiffe://cluster.local/ns/shop/sa/client",
        "dst.addr": f"{server.address}:15008",
        "dst.hbone_addr": f"{server.address}:80",
        "dst.service": "server.shop.svc.cluster.local",
        "dst.workload": "server",
        "dst.namespace": "shop",
        "dst.identity": "spiffe://cluster.local/ns/shop/sa/server",
    }
    assert out.items() >= {**common, "src.addr": source, "direction": "outbound"}.items()
    assert into.items() >= {**common, "direction": "inbound"}.items()
    assert (out["bytes_sent"], into["bytes_recv"]) == (0, 0) and out["bytes_recv"] == into["bytes_sent"]
    labels = {
        "source_workload": "client",
        "source_principal": "spiffe://cluster.local/ns/shop/sa/client",
        "destination_service": "server.shop.svc.cluster.local",
        "destination_service_name": "server",
        "destination_principal": "spiffe://cluster.local/ns/shop/sa/server",
        "connection_security_policy": "mutual_tls",
        "request_protocol": "tcp",
        "response_flags": "-",
    }
    for proxy, reporter in zip(mesh.proxies, ("source", "destination"), strict=True):
        assert proxy.metric(OPENED, reporter=reporter, **labels) == 1
        assert proxy.metric("istio_tcp_connections_closed_total", reporter=reporter, **labels) == 1
        assert proxy.metric("istio_tcp_sent_bytes_total", reporter=reporter, **labels) == out["bytes_recv"]


def waypoint() -> None:
    """A waypoint behind the proxy hears who comes and where to; what it sends leaves with its own identity."""
    mesh, client, server = scene()
    name = "waypoint.shop.svc.cluster.local"
    gateway = mesh.pod(
        1, "waypoint", account="waypoint", services={f"shop/{name}": {}}, proxyProtocolPort=15088
    )
    mesh.services = [
        {"name": "waypoint", "namespace": "shop", "hostname": name, "addresses": ["10.96.0.99"], "ports": {}},
        {
            "name": "server",
            "namespace": "shop",
            "hostname": "server.shop.svc.cluster.local",
            "addresses": ["10.96.7.7"],
            "ports": {"8080": 80},
            "waypoint": f"shop/{name}",
        },
    ]
    mesh.workloads["server"]["services"] = {"shop/server.shop.svc.cluster.local": {"8080": 80}}
    mesh.settle()
    heard: list[tuple[str, int, str, int, dict[int, bytes]]] = []

    def serve(listener: socket.socket) -> None:
        while True:
            stream, _ = listener.accept()
            head = stream.recv(16, socket.MSG_WAITALL)
            assert head[:12] == b"\r\n\r\n\0\r\nQUIT\n" and head[12:14] == b"\x21\x11"
            body = stream.recv(int.from_bytes(head[14:16], "big"), socket.MSG_WAITALL)
            tlvs, rest = {}, body[12:]
            while rest:
                length = int.from_bytes(rest[1:3], "big")
                tlvs[rest[0]], rest = rest[3 : 3 + length], rest[3 + length :]
            source, target = socket.inet_ntoa(body[:4]), socket.inet_ntoa(body[4:8])
            ports = int.from_bytes(body[8:10], "big"), int.from_bytes(body[10:12], "big")
            heard.append((source, ports[0], target, ports[1], tlvs))
            with stream, gateway.connect(target, ports[1]) as onward:
                stream.sendall(b"via waypoint: " + read(onward).encode() + b"\n")

    # Only the proxy reaches it here.
    listener = gateway.inside(lambda: socket.create_server(("127.0.0.1", 15088)))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()

    assert client.ask("10.96.7.7", 8080) == f"via waypoint: server {gateway.address}"
    ((source, _, target, port, tlvs),) = heard
    assert (source, target, port) == (client.address, "10.96.7.7", 8080)
    assert tlvs[0xD0] == b"spiffe://cluster.local/ns/shop/sa/client"

    def seen() -> list[tuple[str, str]]:
        return [
            (e["src.identity"], e["dst.hbone_addr"])
            for e in mesh.proxies[1].access()
            if e["direction"] == "inbound"
        ]

    wait_until(
        lambda: (
            set(seen())
            == {
                ("spiffe://cluster.local/ns/shop/sa/client", "10.96.7.7:8080"),
                ("spiffe://cluster.local/ns/shop/sa/waypoint", f"{server.address}:80"),
            }
        ),
        "both legs in the log",
    )
    # By pod address the service's waypoint is not asked; a workload's own is.
    assert client.ask(server.address, 80) == f"server {client.address}"
    mesh.workloads["server"]["waypoint"] = f"shop/{name}"
    mesh.settle()
    assert client.ask(server.address, 80) == f"via waypoint: server {gateway.address}"
    assert heard[-1][2:4] == (server.address, 80)
    assert gateway.ask(server.address, 80) == f"server {gateway.address}", "the waypoint itself goes straight"
    # Nobody else may hand connections over, and the waypoint is no relay for what it does not stand for.
    outside = mesh.pod(0, "outside", mesh=False)
    mesh.settle()
    assert refused(outside, gateway.address, 15088)
    good = Issuer(mesh.folder).issue(GOOD)
    assert Tunnel(outside, gateway.address, good).request(f"{gateway.address}:15088") == 400
    assert Tunnel(outside, gateway.address, good).request(f"{client.address}:80") == 400
    named = Tunnel(outside, gateway.address, good)
    assert named.request("server.shop.svc.cluster.local:8080") == 200
    assert named.read(12) == b"via waypoint"
    # Its plain pods' waypoint being away, nothing goes around it.
    mesh.workloads["waypoint"]["unhealthy"] = True
    mesh.settle()
    assert refused(client, "10.96.7.7", 8080)

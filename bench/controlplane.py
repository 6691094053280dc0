"""istiod: how fast a policy reaches every node proxy, what 10,000 workloads cost, and certificates a second.

Boots a cluster of its own with real node proxies, fills the API with pods of a node that only exists there
(bound, running, enrolled: istiod announces them like any other), and measures from the client's write to the
last proxy's acknowledgement, by istiod's own clock of acknowledgements. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import random
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpclib.client import Channel, UnaryUnaryMethod
from l4 import MESHLIGHT, TICKS, cluster_processes, rss

from meshlight.controlplane import serve
from meshlight.controlplane.authority import Authority, Lifetimes
from meshlight.controlplane.certificate_service import CertificateService
from meshlight.controlplane.facts import ObjectKey
from meshlight.controlplane.identity import Caller
from meshlight.controlplane.metrics import Metrics
from meshlight.controlplane.node_authorization import NodeAuthorizer
from meshlight.controlplane.serving_certificate import ServingCertificate
from meshlight.controlplane.settings import ServiceAccount
from meshlight.kube.client import Client
from meshlight.kube.resources import (
    AUTHORIZATION_POLICIES,
    LEASES,
    NAMESPACES,
    NODES,
    PEER_AUTHENTICATIONS,
    PODS,
    SERVICES,
    Object,
)
from meshlight.operations import control_plane
from meshlight.proto import ca_pb2

NODE = "bench-node"
SPACES = 50
PROXY_TYPE = "istio.security.Authorization"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="100,1000,10000")
    parser.add_argument("--policies", type=int, default=100, help="policy changes measured at each size")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--churn-seconds", type=float, default=20)
    parser.add_argument("--only", choices=["certificates", "propagation"])
    arguments = parser.parse_args()
    if arguments.only != "propagation":
        print(f"certificates: {certificates(3.0)} (gRPC over TLS, 8 connections)")
    if arguments.only == "certificates":
        return
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"MESHLIGHT_HOME": home}
        up = [MESHLIGHT, "up", "--name", "bench", "--nodes", str(arguments.nodes)]
        try:
            subprocess.run(up, env=environment, check=True, capture_output=True)
            asyncio.run(propagation(home, arguments))
        finally:
            down = [MESHLIGHT, "down", "--name", "bench", "--purge"]
            subprocess.run(down, env=environment, check=False, capture_output=True)


async def propagation(home: str, arguments: argparse.Namespace) -> None:
    """Fill, and measure at each size."""
    async with Client.from_kubeconfig(f"{home}/clusters/bench/kubeconfig") as client, node(client):
        for index in range(SPACES):
            name = f"bench-{index}"
            await client.create(NAMESPACES, {**_object(NAMESPACES, name), "spec": {}})
        present = 0
        for size in (int(text) for text in arguments.sizes.split(",")):
            begun = time.monotonic()
            await fill(client, present, size)
            await converged(client)
            print(f"{size} workloads: announced {time.monotonic() - begun:.1f} s after the first was written")
            present = size
            istiod = process(home, "meshlight.controlplane")
            await settled(istiod)
            print(f"  istiod {rss(istiod) / 1024:.0f} MiB, proxies {_proxies(home)} MiB resident")
            print(f"  policy of a namespace      {await changes(client, arguments.policies, namespaced)}")
            print(f"  policy by selector         {await changes(client, arguments.policies, selecting)}")
            print(f"  STRICT for the whole mesh  {await changes(client, 10, strict)}")
        begun, cpu = time.monotonic(), seconds(istiod)
        churning = asyncio.create_task(churn(client, present, 100))
        await asyncio.sleep(1)
        under = await changes(client, 30, namespaced)
        await asyncio.sleep(max(0, arguments.churn_seconds - (time.monotonic() - begun)))
        elapsed = time.monotonic() - begun
        churning.cancel()
        written = await churning
        used = (seconds(istiod) - cpu) / elapsed
        print(f"churn of {written / elapsed:.0f} changes/s at {present} workloads:")
        print(f"  istiod {used * 100:.0f}% of a core, {rss(istiod) / 1024:.0f} MiB; policy {under}")


async def fill(client: Client, present: int, size: int) -> None:
    """Pods from number `present` to `size`, a hundred to a Service."""
    turns = asyncio.Semaphore(24)

    async def one(number: int) -> None:
        async with turns:
            obj = pod(number)
            await client.create(PODS, obj)
            await client.patch(
                PODS, obj["metadata"]["name"], {"status": status(number, ready=True)},
                obj["metadata"]["namespace"], subresource="status",
            )  # fmt: skip

    async with asyncio.TaskGroup() as group:
        for number in range(present, size):
            group.create_task(one(number))
    for number in range(present // 100, size // 100):
        space = f"bench-{number % SPACES}"
        spec = {
            "selector": {"app": f"app-{number}"},
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
        }
        await client.create(SERVICES, {**_object(SERVICES, f"app-{number}", space), "spec": spec})


def pod(number: int) -> Object:
    """A pod that is bound to the node there is not."""
    group = number // 100
    labels = {"app": f"app-{group}", "pod-template-hash": "5d"}
    obj = _object(PODS, f"app-{group}-5d-{number}", f"bench-{group % SPACES}")
    obj["metadata"] |= {"labels": labels, "annotations": {"ambient.istio.io/redirection": "enabled"}}
    container = {"name": "main", "image": "bench", "command": ["true"], "ports": [{"containerPort": 8080}]}
    return {**obj, "spec": {"nodeName": NODE, "containers": [container]}}


def status(number: int, *, ready: bool) -> Object:
    """A running pod's status."""
    address = f"10.{200 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
    word = "True" if ready else "False"
    conditions = [{"type": kind, "status": word} for kind in ("Ready", "ContainersReady")]
    conditions += [{"type": kind, "status": "True"} for kind in ("Initialized", "PodScheduled")]
    return {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": conditions}


Change = Callable[[Client, int], Awaitable[object]]


async def namespaced(client: Client, number: int) -> None:
    """Apply a policy of one of the namespaces."""
    await _policy(client, number, {})


async def selecting(client: Client, number: int) -> None:
    """Apply a policy that selects a hundred workloads, each time other ones."""
    await _policy(client, number, {"selector": {"matchLabels": {"app": f"app-{number % SPACES}"}}})


async def _policy(client: Client, number: int, spec: Object) -> None:
    name = "selecting" if spec else "namespaced"
    rules = [{"to": [{"operation": {"ports": [str(1 + random.randrange(60000))]}}]}]
    obj = _object(AUTHORIZATION_POLICIES, name, f"bench-{number % SPACES}")
    await client.apply(
        AUTHORIZATION_POLICIES,
        {**obj, "spec": {**spec, "action": "DENY", "rules": rules}},
        field_manager="bench",
    )


async def strict(client: Client, number: int) -> None:
    """Turn mutual TLS on for the mesh, or off again."""
    obj = _object(PEER_AUTHENTICATIONS, "default", "istio-system")
    mode = "STRICT" if number % 2 == 0 else "PERMISSIVE"
    await client.apply(PEER_AUTHENTICATIONS, {**obj, "spec": {"mtls": {"mode": mode}}}, field_manager="bench")


async def changes(client: Client, count: int, change: Change) -> str:
    """Quantiles of the time from a write to the last proxy's acknowledgement, in milliseconds."""
    took, writes = [], []
    for number in range(count):
        begun = time.time()
        await change(client, number)
        writes.append((time.time() - begun) * 1000)
        took.append((await acknowledged(client, begun) - begun) * 1000)
        await asyncio.sleep(random.uniform(0.02, 0.06))  # not in step with anything
    return f"{_quantiles(took)}   (the write alone: {_quantiles(writes)})"


def _quantiles(took: list[float]) -> str:
    took = sorted(took)
    p99 = took[min(len(took) - 1, int(len(took) * 0.99))]
    return f"p50 {statistics.median(took):6.1f} p99 {p99:6.1f} ms"


async def acknowledged(client: Client, since: float) -> float:
    """When the last proxy had acknowledged what was sent after `since`; Unix seconds."""
    async with asyncio.timeout(60):
        while True:
            states = [p.types.get(PROXY_TYPE, {}) for p in await control_plane.proxies(client, "istio-system")]
            if states and all(s["sent"] == s["acked"] and _unix(s["sentTime"]) > since for s in states):
                return max(_unix(s["ackedTime"]) for s in states)
            await asyncio.sleep(0.02)


async def converged(client: Client) -> None:
    """Wait until every proxy has acknowledged everything for two seconds on end."""
    last, since = "", time.monotonic()
    while time.monotonic() - since < 2:
        found = await control_plane.proxies(client, "istio-system")
        now = json.dumps([p.types for p in found], sort_keys=True)
        if now != last or not all(s["sent"] == s["acked"] for p in found for s in p.types.values()):
            last, since = now, time.monotonic()
        await asyncio.sleep(0.2)


def _unix(text: str) -> float:
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


async def churn(client: Client, size: int, rate: float) -> int:
    """Pods that become unready and ready again, `rate` a second, until cancelled; how many there were."""
    written, begun = 0, time.monotonic()
    tasks: set[asyncio.Task[Any]] = set()
    try:
        while True:
            number = random.randrange(size)
            obj = pod(number)["metadata"]
            content = {"status": status(number, ready=bool(random.getrandbits(1)))}
            write = client.patch(PODS, obj["name"], content, obj["namespace"], subresource="status")
            task = asyncio.create_task(write)
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            written += 1
            await asyncio.sleep(max(0, begun + written / rate - time.monotonic()))
    except asyncio.CancelledError:
        await asyncio.gather(*tasks, return_exceptions=True)
        return written


@contextlib.asynccontextmanager
async def node(client: Client) -> AsyncIterator[None]:
    """A node that exists in the API alone, its lease kept fresh."""
    obj = _object(NODES, NODE)
    obj["metadata"]["labels"] = {"topology.kubernetes.io/region": "local", "topology.kubernetes.io/zone": "z"}
    await client.create(NODES, {**obj, "spec": {"unschedulable": True}})
    ready = {"type": "Ready", "status": "True", "reason": "Bench"}
    await client.patch(NODES, NODE, {"status": {"conditions": [ready]}}, subresource="status")

    async def renew() -> None:
        while True:
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            spec = {"holderIdentity": NODE, "leaseDurationSeconds": 40, "renewTime": now}
            lease = {**_object(LEASES, NODE, "kube-node-lease"), "spec": spec}
            await client.apply(LEASES, lease, field_manager="bench")
            await asyncio.sleep(5)

    task = asyncio.create_task(renew())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _object(resource: Any, name: str, namespace: str = "") -> Object:
    metadata: Object = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata}


def process(home: str, words: str) -> int:
    """The host pid of a process of the cluster, by its command line."""
    for pid in cluster_processes(home):
        with contextlib.suppress(OSError):
            if words in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
                return pid
    sys.exit(f"no process of the cluster runs {words}")


def _proxies(home: str) -> str:
    found = []
    for pid in cluster_processes(home):
        with contextlib.suppress(OSError):
            if "meshlight-ztunnel" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(rss(pid) / 1024)
    return ", ".join(f"{size:.0f}" for size in sorted(found))


def seconds(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def settled(pid: int) -> None:
    """Wait until a process has nothing to do: under a twentieth of a core over a second."""
    while True:
        before = seconds(pid)
        await asyncio.sleep(1)
        if seconds(pid) - before < 0.05:
            return


class Reviewer:
    """Every token is the node proxy's: what is measured is issuing."""

    async def review(self, token: str) -> Caller:
        """The node proxy."""
        return Caller(ServiceAccount("istio-system", "ztunnel"), "ztunnel-1", "uid", "node-1")


def certificates(duration: float) -> str:
    """Certificates a second from one istiod process, asked by eight connections of another."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        asyncio.run(_authority(told))
    os.close(told)
    head, _, root = os.read(ready, 1 << 16).decode().partition("\n")
    try:
        issued = asyncio.run(_asking(int(head), root, duration))
        used = seconds(child) / max(issued, 1) * 1000
        return f"{issued / duration:.0f}/s, {used:.2f} ms of istiod's CPU each"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


async def _authority(told: int) -> None:
    now = datetime.datetime.now(datetime.UTC)
    account = ServiceAccount("istio-system", "ztunnel")
    authority = Authority.create("cluster.local", datetime.timedelta(days=30), now)
    nodes = NodeAuthorizer("cluster.local", frozenset({account}))
    for name, space, owner in (("ztunnel-1", "istio-system", "ztunnel"), ("web", "shop", "web")):
        metadata = {"name": name, "namespace": space, "uid": "uid"}
        spec = {"nodeName": "node-1", "serviceAccountName": owner}
        nodes.observe(ObjectKey(space, name), {"metadata": metadata, "spec": spec, "status": {}})
    day = datetime.timedelta(days=1)
    service = CertificateService(
        authority,
        Lifetimes(day, 90 * day),
        "cluster.local",
        Reviewer(),
        nodes,
        Metrics(),
        lambda: datetime.datetime.now(datetime.UTC),
    )
    serving = ServingCertificate(authority, ["localhost"], lambda: datetime.datetime.now(datetime.UTC))
    endpoint = serve.CertificateEndpoint(service)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    await serve.listen([endpoint], "127.0.0.1", port, serving.context)
    os.write(told, f"{port}\n{authority.root_pem.decode()}".encode())
    await asyncio.Event().wait()


async def _asking(port: int, root: str, duration: float) -> int:
    request = ca_pb2.IstioCertificateRequest(csr=_csr())
    request.metadata["ImpersonatedIdentity"] = "spiffe://cluster.local/ns/shop/sa/web"
    context = ssl.create_default_context(cadata=root)
    context.set_alpn_protocols(["h2"])
    issued, end = 0, time.monotonic() + duration

    async def ask() -> None:
        nonlocal issued
        async with Channel("localhost", port, ssl=context) as channel:
            method = UnaryUnaryMethod(
                channel,
                serve.CERTIFICATE_METHOD,
                ca_pb2.IstioCertificateRequest,
                ca_pb2.IstioCertificateResponse,
            )
            while time.monotonic() < end:
                await method(request, metadata={"authorization": "Bearer x"}, timeout=10)
                issued += 1

    await asyncio.gather(*(ask() for _ in range(8)))
    return issued


def _csr() -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    built = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return built.public_bytes(serialization.Encoding.PEM).decode()


if __name__ == "__main__":
    main()

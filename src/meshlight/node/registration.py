"""The node's own objects: its Node with conditions and capacity, and the Lease that says it lives.

`node_object` and `conditions` are pure; `Registration` keeps both objects current.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from meshlight import __version__
from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.resources import LEASES, NODES, Object
from meshlight.node import addresses
from meshlight.node.events import Recorder, log
from meshlight.node.network import node_address, pod_cidr
from meshlight.node.podstatus import timestamp

KUBELET_PORT = 10250
LEASE_NAMESPACE = "kube-node-lease"
LEASE_SECONDS = 40
RENEWAL, HEARTBEAT = 10.0, 300.0
"""Seconds between renewals of the Lease, and between heartbeats in the Node's status."""
MAX_PODS = 110
BOOT_ID = Path("/run/meshlight/boot_id")
"""Names this start of the cluster, which is the node's boot; without a cluster the kernel's does."""
_KERNEL_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LOW_MEMORY, _LOW_DISK = 100 << 20, 1 << 30
_ZONES = 3
_FIRST_RETRY = 0.1


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Which node this is; `index` is 1-based."""

    name: str
    index: int

    @property
    def address(self) -> str:
        """The node's own address."""
        return node_address(self.index)


@dataclass(frozen=True, slots=True)
class Facts:
    """The machine as measured: bytes, and whether something runs short."""

    cpus: int
    memory: int
    memory_low: bool
    disk_low: bool
    disk: int
    architecture: str
    kernel: str
    os_image: str
    machine_id: str
    boot_id: str

    @classmethod
    def read(cls, state: Path) -> Facts:
        """Measure; `state` lies on the disk that matters."""
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(meminfo["MemAvailable"].split()[0]) * 1024
        disk = os.statvfs(state)
        kind = platform.machine()
        boot = (BOOT_ID if BOOT_ID.exists() else _KERNEL_BOOT_ID).read_text().strip()
        machine_id = Path("/etc/machine-id")
        return cls(
            os.cpu_count() or 1,
            int(meminfo["MemTotal"].split()[0]) * 1024,
            available < _LOW_MEMORY,
            disk.f_bavail * disk.f_frsize < _LOW_DISK,
            disk.f_blocks * disk.f_frsize,
            {"x86_64": "amd64", "aarch64": "arm64"}.get(kind, kind),
            platform.release(),
            _os_image(),
            machine_id.read_text().strip() if machine_id.exists() else boot.replace("-", ""),
            boot,
        )


def _os_image() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def conditions(facts: Facts, before: Iterable[Object], now: float) -> list[Object]:
    """The node's conditions; an unchanged one keeps its time of transition."""
    known = {c["type"]: c for c in before}
    wanted = (
        ("MemoryPressure", facts.memory_low, "KubeletHasInsufficientMemory", "KubeletHasSufficientMemory",
         f"kubelet has {'in' if facts.memory_low else ''}sufficient memory available"),
        ("DiskPressure", facts.disk_low, "KubeletHasDiskPressure", "KubeletHasNoDiskPressure",
         f"kubelet has {'' if facts.disk_low else 'no '}disk pressure"),
        ("PIDPressure", False, "", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ("Ready", True, "KubeletReady", "", "kubelet is posting ready status"),
    )  # fmt: skip
    made = []
    for kind, holds, yes, no, message in wanted:
        status = "True" if holds else "False"
        old = known.get(kind) or {}
        since = old.get("lastTransitionTime") if old.get("status") == status else None
        made.append({
            "type": kind, "status": status, "reason": yes if holds else no, "message": message,
            "lastHeartbeatTime": timestamp(now), "lastTransitionTime": since or timestamp(now),
        })  # fmt: skip
    return made


def labels(node: NodeIdentity, facts: Facts) -> dict[str, str]:
    """The labels that say what the node is."""
    return {
        "kubernetes.io/hostname": node.name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": facts.architecture,
        "beta.kubernetes.io/os": "linux",
        "beta.kubernetes.io/arch": facts.architecture,
    }


def node_object(node: NodeIdentity, facts: Facts) -> Object:
    """The Node as it is created, without status. Users may change its zone later."""
    cidrs = [pod_cidr(node.index)]
    if addresses.has_ipv6():
        cidrs.append(addresses.pod_cidr(node.index))
    zone = f"zone-{(node.index - 1) % _ZONES + 1}"
    topology = {"topology.kubernetes.io/region": "local", "topology.kubernetes.io/zone": zone}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": {**labels(node, facts), **topology}},
        "spec": {"podCIDR": pod_cidr(node.index), "podCIDRs": cidrs},
    }


def node_status(node: NodeIdentity, facts: Facts, before: Iterable[Object], now: float) -> Object:
    """The Node's status."""
    disk = str(facts.disk)
    capacity = {"cpu": str(facts.cpus), "memory": f"{facts.memory // 1024}Ki", "pods": str(MAX_PODS)}
    capacity["ephemeral-storage"] = f"{facts.disk // 1024}Ki"
    for_pods = {"memory": f"{max(0, facts.memory - _LOW_MEMORY) // 1024}Ki", "ephemeral-storage": disk}
    return {
        "addresses": [
            *({"type": "InternalIP", "address": a} for a in addresses.both(node.address)),
            {"type": "Hostname", "address": node.name},
        ],
        "capacity": capacity,
        "allocatable": {**capacity, **for_pods},
        "conditions": conditions(facts, before, now),
        "daemonEndpoints": {"kubeletEndpoint": {"Port": KUBELET_PORT}},
        "nodeInfo": {
            "architecture": facts.architecture,
            "operatingSystem": "linux",
            "kernelVersion": facts.kernel,
            "osImage": facts.os_image,
            "containerRuntimeVersion": f"meshlight://{__version__}",
            "kubeletVersion": f"v1.32.0-meshlight.{__version__}",
            "kubeProxyVersion": "",
            "machineID": facts.machine_id,
            "systemUUID": facts.boot_id,
            "bootID": facts.boot_id,
        },
    }


class Registration:
    """Keeps the Node and its Lease current, from when `settled` is set: what is said of its pods is true."""

    def __init__(
        self, client: Client, node: NodeIdentity, state: Path, recorder: Recorder, settled: asyncio.Event
    ) -> None:
        self._client, self._node, self._state, self._recorder = client, node, state, recorder
        self._settled = settled

    async def run(self) -> None:
        """Register, then renew until cancelled; whatever fails is tried again."""
        await self._settled.wait()
        delay = _FIRST_RETRY
        announced = False
        while True:
            try:
                known = await self._register()
                if not announced:
                    announced = True
                    log("info", "node registered", node=self._node.name)
                    self._recorder.record(known, "Normal", "Starting", "Starting kubelet.")
                delay = _FIRST_RETRY
                await self._renew_for(HEARTBEAT)
            except (ApiError, ApiUnreachable) as error:
                log("warning", "cannot register", node=self._node.name, error=str(error))
                await asyncio.sleep(delay)
                delay = min(delay * 2, RENEWAL)

    async def _register(self) -> Object:
        facts = Facts.read(self._state)
        wanted = node_object(self._node, facts)
        try:
            known = await self._client.create(NODES, wanted)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            patch = {"metadata": {"labels": labels(self._node, facts)}, "spec": wanted["spec"]}
            known = await self._client.patch(NODES, self._node.name, patch)
        before = (known.get("status") or {}).get("conditions") or []
        status = node_status(self._node, facts, before, time.time())
        return await self._client.patch(NODES, self._node.name, {"status": status}, subresource="status")

    async def _renew_for(self, seconds: float) -> None:
        """Renew the Lease for a while; return early when the Node was told dead or is gone."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await self._renew()
            await asyncio.sleep(RENEWAL)
            try:
                known = await self._client.get(NODES, self._node.name)
            except ApiError as error:
                if error.code == 404:
                    return
                raise
            for condition in (known.get("status") or {}).get("conditions") or []:
                if condition["type"] == "Ready" and condition["status"] != "True":
                    return

    async def _renew(self) -> None:
        renewed = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {
            "holderIdentity": self._node.name,
            "leaseDurationSeconds": LEASE_SECONDS,
            "renewTime": renewed,
        }
        try:
            await self._client.patch(LEASES, self._node.name, {"spec": spec}, LEASE_NAMESPACE)
        except ApiError as error:
            if error.code != 404:
                raise
            lease = {
                "apiVersion": LEASES.api_version,
                "kind": LEASES.kind,
                "metadata": {"name": self._node.name, "namespace": LEASE_NAMESPACE},
                "spec": spec,
            }
            await self._client.create(LEASES, lease)

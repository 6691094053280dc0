"""What every worker of a node shares: its clients, folders and facts of the machine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from meshlight.kube.client import Client
from meshlight.node.cgroups import Cgroups
from meshlight.node.enrolment import Enrolment
from meshlight.node.events import Recorder
from meshlight.node.network import PodNetwork
from meshlight.node.oci.store import ImageStore
from meshlight.node.policies import Policies
from meshlight.node.references import References
from meshlight.node.rootfs import Machine
from meshlight.node.runtime import Nursery

_STARTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class NodeContext:
    """`run` is node-local and ends with the cluster; `logs` outlives a restart of the machine."""

    client: Client
    name: str
    address: str
    run: Path
    logs: Path
    disk: Path
    """Where the machine's PersistentVolumes are."""
    machine: Machine
    network: PodNetwork
    references: References
    recorder: Recorder
    http: aiohttp.ClientSession
    image_mapping: Mapping[str, str]
    cgroups: Cgroups
    enrolment: Enrolment
    policies: Policies
    images: ImageStore
    registries: Mapping[str, str]
    nursery: Nursery = field(default_factory=Nursery)
    starts: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_STARTS_AT_ONCE))
    """Bounds how many pods start at the same time, so that a boot does not thrash."""

    @property
    def host_files(self) -> Path:
        """Where hostPath volumes of this node live."""
        return self.run / "hostfs"

    def pod_folder(self, uid: str) -> Path:
        """A pod's private folder: its pid 1's socket, roots and volumes."""
        return self.run / "pods" / uid

    def log_path(self, uid: str, container: str, attempt: int) -> Path:
        """Where an attempt's output is kept."""
        return self.logs / uid / container / f"{attempt}.log"

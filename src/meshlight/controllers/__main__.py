"""The controllers' process: shared caches, one queue a controller, ended by SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import base64
import signal
from pathlib import Path

import yaml

from meshlight.controllers.autoscaler import Autoscalers
from meshlight.controllers.cronjob import CronJobs
from meshlight.controllers.daemonset import DaemonSets
from meshlight.controllers.deployment import Deployments
from meshlight.controllers.disruption import Disruption
from meshlight.controllers.endpointslice import EndpointSlices
from meshlight.controllers.garbage_collector import GarbageCollector
from meshlight.controllers.job import Jobs
from meshlight.controllers.load_balancer import LoadBalancers
from meshlight.controllers.namespace import Namespaces
from meshlight.controllers.node_lifecycle import NodeLifecycle
from meshlight.controllers.ownership import Dependents
from meshlight.controllers.persistent_volumes import PersistentVolumes
from meshlight.controllers.quota import Quotas
from meshlight.controllers.replicaset import ReplicaSets
from meshlight.controllers.scheduler import Scheduler
from meshlight.controllers.statefulset import StatefulSets
from meshlight.controllers.taint_eviction import TaintEviction
from meshlight.controllers.volume_binding import VolumeBinder
from meshlight.controllers.workqueue import WorkQueue, log
from meshlight.kube import resources
from meshlight.kube.client import Cache, Client
from meshlight.kube.recorder import Recorder
from meshlight.kube.resources import Resource

COMPONENTS = {
    "replicaset": "replicaset-controller",
    "deployment": "deployment-controller",
    "daemonset": "daemonset-controller",
    "statefulset": "statefulset-controller",
    "job": "job-controller",
    "cronjob": "cronjob-controller",
    "autoscaler": "horizontal-pod-autoscaler",
}
"""Names of the controllers in Events."""


def cluster_ca(kubeconfig: str) -> str:
    """The CA certificate of the kubeconfig's first cluster, as PEM."""
    path = Path(kubeconfig)
    cluster = yaml.safe_load(path.read_text())["clusters"][0]["cluster"]
    if "certificate-authority-data" in cluster:
        return base64.b64decode(cluster["certificate-authority-data"]).decode()
    authority: str = cluster["certificate-authority"]
    return (path.parent / authority).read_text()


class Assembly:
    """The controllers over one set of caches: each collection is watched once."""

    def __init__(self, client: Client, kubeconfig: str, disk: Path) -> None:
        self.client = client
        self.caches: dict[Resource, Cache] = {}
        self.recorders: list[Recorder] = []
        self.queues: list[WorkQueue] = []
        self._build(cluster_ca(kubeconfig), disk)

    def cache(self, resource: Resource) -> Cache:
        """The cache of a collection."""
        return self.caches.setdefault(resource, Cache(self.client, resource))

    def recorder(self, component: str) -> Recorder:
        """A recorder of Events in a component's name."""

        def failed(reason: str, error: str) -> None:
            log("warning", "event not recorded", reason=reason, error=error)

        self.recorders.append(Recorder(self.client, component, failed=failed))
        return self.recorders[-1]

    def expected(self, namespace: str, kind: str, name: str) -> int | None:
        """How many pods a controller wants."""
        for resource in (resources.REPLICA_SETS, resources.STATEFUL_SETS):
            if resource.kind == kind and (found := self.cache(resource).get(name, namespace)):
                return int(found["spec"].get("replicas", 1))
        return None

    def _build(self, authority: str, disk: Path) -> None:
        client, cache = self.client, self.cache
        pods = Dependents(client, cache(resources.PODS))
        sets = Dependents(client, cache(resources.REPLICA_SETS))
        jobs = Dependents(client, cache(resources.JOBS))
        revisions = Dependents(client, cache(resources.CONTROLLER_REVISIONS))
        nodes, namespaces = cache(resources.NODES), cache(resources.NAMESPACES)
        services = cache(resources.SERVICES)
        claims, volumes = cache(resources.PERSISTENT_VOLUME_CLAIMS), cache(resources.PERSISTENT_VOLUMES)
        classes = cache(resources.STORAGE_CLASSES)
        budgets, quotas = cache(resources.POD_DISRUPTION_BUDGETS), cache(resources.RESOURCE_QUOTAS)
        binder = VolumeBinder(client, claims, volumes, classes, pods.cache)
        says = {kind: self.recorder(name) for kind, name in COMPONENTS.items()}
        cluster = self.recorder("default-scheduler")
        slices, endpoints = cache(resources.ENDPOINT_SLICES), cache(resources.ENDPOINTS)
        counted = [services, sets.cache, jobs.cache]
        counted += [cache(r) for r in (resources.DEPLOYMENTS, resources.STATEFUL_SETS, resources.CRON_JOBS)]
        controllers = (
            Scheduler(client, pods, nodes, namespaces, budgets, binder, cluster),
            ReplicaSets(client, sets.cache, pods, says["replicaset"]),
            Deployments(client, cache(resources.DEPLOYMENTS), sets, pods, says["deployment"]),
            DaemonSets(client, cache(resources.DAEMON_SETS), pods, nodes, revisions, says["daemonset"]),
            StatefulSets(client, cache(resources.STATEFUL_SETS), pods, claims, revisions, says["statefulset"]),
            Jobs(client, jobs.cache, pods, says["job"]),
            CronJobs(client, cache(resources.CRON_JOBS), jobs, says["cronjob"]),
            PersistentVolumes(client, claims, volumes, classes, nodes, pods.cache, cluster, disk),
            NodeLifecycle(client, nodes, cache(resources.LEASES), pods.cache),
            TaintEviction(client, pods, nodes, cluster),
            Autoscalers(client, cache(resources.AUTOSCALERS), pods.cache, says["autoscaler"]),
            Disruption(client, budgets, pods, self.expected),
            Quotas(client, quotas, pods, claims, counted),
            EndpointSlices(client, services, pods.cache, slices, endpoints, nodes),
            Namespaces(client, namespaces, authority),
        )
        self.queues = [controller.queue for controller in controllers]

    async def run(self) -> None:
        """Run every controller until cancelled."""
        async with asyncio.TaskGroup() as group:
            for cache in self.caches.values():
                group.create_task(cache.run())
            await asyncio.gather(*(cache.synced.wait() for cache in self.caches.values()))
            log("info", "controllers started")
            for recorder in self.recorders:
                group.create_task(recorder.run())
            for queue in self.queues:
                group.create_task(queue.run())
            group.create_task(GarbageCollector(self.client).run())
            group.create_task(LoadBalancers(self.client, self.cache(resources.SERVICES)).run())


async def serve(kubeconfig: str, disk: Path) -> None:
    """Run every controller until cancelled."""
    async with Client.from_kubeconfig(kubeconfig) as client:
        await Assembly(client, kubeconfig, disk).run()


async def main(kubeconfig: str, disk: Path) -> None:
    """Serve until SIGTERM or SIGINT, then leave with status 0."""
    task = asyncio.create_task(serve(kubeconfig, disk))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        log("info", "controllers stopped")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m meshlight.controllers")
    parser.add_argument("--kubeconfig", required=True)
    parser.add_argument("--disk", required=True, type=Path, help="folder of the volumes that are made")
    given = parser.parse_args()
    asyncio.run(main(given.kubeconfig, given.disk))

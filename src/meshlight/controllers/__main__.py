"""The controllers' process: shared caches, one queue a controller, ended by SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import base64
import signal
from pathlib import Path

import yaml

from meshlight.controllers.daemonset import DaemonSets
from meshlight.controllers.deployment import Deployments
from meshlight.controllers.endpointslice import EndpointSlices
from meshlight.controllers.garbage_collector import GarbageCollector
from meshlight.controllers.load_balancer import LoadBalancers
from meshlight.controllers.namespace import Namespaces
from meshlight.controllers.node_lifecycle import NodeLifecycle
from meshlight.controllers.replicaset import ReplicaSets
from meshlight.controllers.scheduler import Scheduler
from meshlight.controllers.workqueue import log
from meshlight.kube.client import Cache, Client
from meshlight.kube.resources import (
    DAEMON_SETS,
    DEPLOYMENTS,
    ENDPOINT_SLICES,
    ENDPOINTS,
    LEASES,
    NAMESPACES,
    NODES,
    PODS,
    REPLICA_SETS,
    SERVICES,
)


def cluster_ca(kubeconfig: str) -> str:
    """The CA certificate of the kubeconfig's first cluster, as PEM."""
    path = Path(kubeconfig)
    cluster = yaml.safe_load(path.read_text())["clusters"][0]["cluster"]
    if "certificate-authority-data" in cluster:
        return base64.b64decode(cluster["certificate-authority-data"]).decode()
    authority: str = cluster["certificate-authority"]
    return (path.parent / authority).read_text()


async def serve(kubeconfig: str) -> None:
    """Run every controller until cancelled."""
    async with Client.from_kubeconfig(kubeconfig) as client:
        pods, nodes = Cache(client, PODS), Cache(client, NODES)
        sets, namespaces = Cache(client, REPLICA_SETS), Cache(client, NAMESPACES)
        deployments = Cache(client, DEPLOYMENTS)
        daemons, services = Cache(client, DAEMON_SETS), Cache(client, SERVICES)
        slices, endpoints = Cache(client, ENDPOINT_SLICES), Cache(client, ENDPOINTS)
        leases = Cache(client, LEASES)
        caches = (pods, nodes, sets, namespaces, deployments, daemons, services, slices, endpoints, leases)
        controllers = (
            Scheduler(client, pods, nodes),
            ReplicaSets(client, sets, pods),
            Deployments(client, deployments, sets),
            DaemonSets(client, daemons, pods, nodes),
            NodeLifecycle(client, nodes, leases, pods),
            EndpointSlices(client, services, pods, slices, endpoints, nodes),
            Namespaces(client, namespaces, cluster_ca(kubeconfig)),
        )
        async with asyncio.TaskGroup() as group:
            for cache in caches:
                group.create_task(cache.run())
            await asyncio.gather(*(cache.synced.wait() for cache in caches))
            log("info", "controllers started")
            for controller in controllers:
                group.create_task(controller.queue.run())
            group.create_task(GarbageCollector(client).run())
            group.create_task(LoadBalancers(client, services).run())


async def main(kubeconfig: str) -> None:
    """Serve until SIGTERM or SIGINT, then leave with status 0."""
    task = asyncio.create_task(serve(kubeconfig))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        log("info", "controllers stopped")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m meshlight.controllers")
    parser.add_argument("--kubeconfig", required=True)
    asyncio.run(main(parser.parse_args().kubeconfig))

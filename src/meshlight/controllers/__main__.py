"""The controllers' process: shared caches, one queue a controller, ended by SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import signal

from meshlight.controllers.scheduler import Scheduler
from meshlight.controllers.workqueue import log
from meshlight.kube.client import Cache, Client
from meshlight.kube.resources import NODES, PODS


async def serve(kubeconfig: str) -> None:
    """Run every controller until cancelled."""
    async with Client.from_kubeconfig(kubeconfig) as client:
        pods, nodes = Cache(client, PODS), Cache(client, NODES)
        scheduler = Scheduler(client, pods, nodes)
        async with asyncio.TaskGroup() as group:
            for cache in (pods, nodes):
                group.create_task(cache.run())
            await asyncio.gather(pods.synced.wait(), nodes.synced.wait())
            log("info", "controllers started")
            group.create_task(scheduler.queue.run())


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

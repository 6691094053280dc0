"""`meshlight run`."""

from __future__ import annotations

import asyncio
import os

import click
import orjson
from rich.console import Console

from meshlight.embedded.layout import Layout
from meshlight.kube.client import Client
from meshlight.kube.resources import Object
from meshlight.operations.run import Workload, resolve
from meshlight.operations.run import run as launch
from meshlight.operations.status import identity


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--name", required=True, metavar="NAME", help="name of the workload, its Pod and its Service")
@click.option("-n", "--namespace", default="default", show_default=True, help="namespace; made if missing")
@click.option(
    "--port",
    "ports",
    type=click.IntRange(1, 65535),
    multiple=True,
    help="port that the program listens on; gives it a Service (repeatable)",
)
@click.option("-e", "--env", "environment", multiple=True, metavar="KEY=VALUE", help="environment (repeatable)")
@click.option("--node", help="node to run on  [default: the scheduler chooses]")
@click.option("--timeout", default=60.0, show_default=True, help="seconds until giving up")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text")
@click.option("--cluster", default="cluster-101", show_default=True, help="the cluster's name")
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    name: str,
    namespace: str,
    ports: tuple[int, ...],
    environment: tuple[str, ...],
    node: str | None,
    timeout: float,
    output: str,
    cluster: str,
    program: tuple[str, ...],
) -> None:
    """Launch PROGRAM of this machine as a workload of the mesh.

    \b
    meshlight run --name web -n demo --port 8000 -- python3 -m http.server 8000
    kubectl logs -n demo web -f
    kubectl delete pod,service,serviceaccount -n demo web
    """
    pairs = {}
    for entry in environment:
        key, equals, value = entry.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{entry!r} is not KEY=VALUE", param_hint="--env")
        pairs[key] = value
    command = (resolve(program[0]), *program[1:])
    workload = Workload(name, namespace, command, os.getcwd(), ports, pairs, node)
    pod = asyncio.run(_run(Layout(cluster), workload, timeout))
    if output == "json":
        click.echo(orjson.dumps(pod, option=orjson.OPT_INDENT_2).decode())
        return
    console = Console(highlight=False)
    console.print(f"[green]✓[/green] {namespace}/{name} runs on {pod['spec']['nodeName']}", soft_wrap=True)
    console.print(f"  address   {pod['status']['podIP']}")
    console.print(f"  identity  {identity(pod)}", soft_wrap=True)
    for port in ports:
        console.print(f"  service   {name}.{namespace}.svc.cluster.local:{port}", soft_wrap=True)
    console.print(f"  logs      kubectl logs -n {namespace} {name} -f", soft_wrap=True)


async def _run(layout: Layout, workload: Workload, seconds: float) -> Object:
    async with Client.from_kubeconfig(layout.kubeconfig) as client:
        return await launch(client, workload, seconds)

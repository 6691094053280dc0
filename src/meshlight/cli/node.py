"""`meshlight node`."""

from __future__ import annotations

import asyncio

import click
from rich.console import Console

from meshlight.cli.cluster import name_option, output_option, print_json
from meshlight.cli.tables import mark, rows
from meshlight.embedded.layout import Layout
from meshlight.operations import nodes

_SAID = {
    "stop": "is off; the cluster notices in under a minute (kubectl get nodes -w)",
    "start": "starts",
    "partition": "is cut off; the cluster notices in under a minute (kubectl get nodes -w)",
    "heal": "is reachable again",
}


@click.group()
def node() -> None:
    """Fail nodes and mend them, or empty them in an orderly way.

    \b
    meshlight node list
    meshlight node stop cluster-101-node-2          its power is gone: every process killed
    meshlight node start cluster-101-node-2
    meshlight node partition cluster-101-node-3     it goes on, but nothing reaches it
    meshlight node heal cluster-101-node-3
    meshlight node drain cluster-101-node-4         evict its pods, let no new ones come
    meshlight node uncordon cluster-101-node-4
    """


@node.command("list")
@name_option
@output_option
def list_(name: str, output: str) -> None:
    """Show the nodes: what their machines do, and what the cluster believes."""
    found = asyncio.run(nodes.listed(Layout(name)))
    if output == "json":
        print_json(found)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)
    header = ("NODE", "STATE", "READY", "SCHEDULABLE", "ADDRESS", "POD CIDR", "PODS")
    cells: list[tuple[str, ...]] = []
    for entry in found:
        says = mark(entry["ready"]), mark(entry["schedulable"])
        cells.append(
            (entry["name"], entry["state"], *says, entry["address"], entry["pod_cidr"], str(entry["pods"]))
        )
    console.print(rows(header, cells))


def _failure(do: str, words: str) -> None:
    @node.command(do, help=words)
    @click.argument("node_name", metavar="NODE")
    @name_option
    def verb(node_name: str, name: str) -> None:
        nodes.fail(Layout(name), node_name, do)
        click.echo(f"{node_name} {_SAID[do]}")


_failure("stop", "Power a node off: kill its agent and every pod at once, cut its link.")
_failure("start", "Power a stopped node on again.")
_failure("partition", "Cut a node's link; what runs on it goes on.")
_failure("heal", "Mend a node's link.")


@node.command()
@click.argument("node_name", metavar="NODE")
@name_option
def cordon(node_name: str, name: str) -> None:
    """Let no new pods come to a node."""
    asyncio.run(nodes.cordon(Layout(name), node_name, True))
    click.echo(f"{node_name} cordoned")


@node.command()
@click.argument("node_name", metavar="NODE")
@name_option
def uncordon(node_name: str, name: str) -> None:
    """Let pods come to a node again."""
    asyncio.run(nodes.cordon(Layout(name), node_name, False))
    click.echo(f"{node_name} uncordoned")


@node.command()
@click.argument("node_name", metavar="NODE")
@name_option
@click.option("--timeout", default=120.0, show_default=True, help="seconds until giving up")
def drain(node_name: str, name: str, timeout: float) -> None:
    """Cordon a node and evict its pods, DaemonSets' left alone, within disruption budgets."""
    count = asyncio.run(nodes.drain(Layout(name), node_name, timeout, click.echo))
    click.echo(f"{node_name} drained of {count} pods")

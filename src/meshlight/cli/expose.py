"""`meshlight expose`."""

from __future__ import annotations

import asyncio

import click
import orjson
from rich.console import Console

from meshlight.cli.cluster import name_option
from meshlight.cli.listeners import listener_table
from meshlight.embedded.layout import Layout
from meshlight.operations import expose as operation


@click.command()
@click.argument("service")
@click.argument("ports", nargs=-1, metavar="[HOSTPORT:PORT]...")
@name_option
@click.option("-n", "--namespace", default="default", show_default=True)
@click.option("--remove", is_flag=True, help="close the Service's listeners instead")
@click.option("--timeout", default=20.0, show_default=True, help="seconds until giving up")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def expose(
    service: str,
    ports: tuple[str, ...],
    name: str,
    namespace: str,
    remove: bool,
    timeout: float,
    output: str,
) -> None:
    """Put a Service on this machine's loopback address, for as long as it exists.

    LoadBalancer Services are there by themselves; this is for others, or for numbers of your choice.
    """
    layout = Layout(name)
    if remove:
        asyncio.run(operation.withdraw(layout, namespace, service))
        click.echo(f"service/{service} is not exposed")
        return
    found = asyncio.run(operation.expose(layout, namespace, service, ports, timeout))
    if output == "json":
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    else:
        Console(highlight=False).print(listener_table(found))

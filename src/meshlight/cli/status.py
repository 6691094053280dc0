"""`meshlight status`."""

from __future__ import annotations

import asyncio

import click
import orjson
import yaml
from rich.console import Console
from rich.table import Table

from meshlight.cli.cluster import name_option
from meshlight.embedded.layout import Layout
from meshlight.operations import status as operation


@click.command()
@name_option
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table")
def status(name: str, output: str) -> None:
    """Show the cluster's parts and which namespaces are enrolled."""
    found = asyncio.run(operation.status(Layout(name)))
    if output == "json":
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        return
    if output == "yaml":
        click.echo(yaml.safe_dump(found, sort_keys=False), nl=False)
        return
    console = Console(highlight=False)
    if not found["running"]:
        console.print(f"{name} is not running; `meshlight up` boots it")
        return
    console.print(f"[bold]{name}[/bold]  API {found['api']}  nodes {len(found['nodes'])}  pods {found['pods']}")
    table = Table(box=None, pad_edge=False)
    table.add_column("NAMESPACE")
    table.add_column("DATAPLANE-MODE")
    for entry in found["namespaces"]:
        table.add_row(entry["name"], entry["dataplane_mode"] or "")
    console.print(table)

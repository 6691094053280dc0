"""`meshlight status`."""

from __future__ import annotations

import asyncio
from typing import Any

import click
import orjson
import yaml
from rich.console import Console

from meshlight.cli.cluster import name_option
from meshlight.cli.listeners import listener_table
from meshlight.cli.tables import mark, rows
from meshlight.embedded.layout import Layout
from meshlight.operations import status as operation


@click.command()
@name_option
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table")
def status(name: str, output: str) -> None:
    """Show nodes, components, enrolled namespaces, and workloads with identity and protocol."""
    found = asyncio.run(operation.status(Layout(name)))
    if output == "json":
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        return
    if output == "yaml":
        click.echo(yaml.safe_dump(found, sort_keys=False), nl=False)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)  # a file has no edge to wrap at
    if not found["running"]:
        console.print(f"{name} is not running; `meshlight up` boots it")
        return
    show(console, name, found)


def show(console: Console, name: str, found: dict[str, Any]) -> None:
    """Draw a status of a running cluster as tables."""
    nodes = found["nodes"]
    ready = sum(node["ready"] for node in nodes)
    console.print(f"[bold]{name}[/bold]  API {found['api']}  nodes {ready}/{len(nodes)} ready\n")
    console.print(
        rows(
            ("NODE", "READY", "POD CIDR", "PODS"),
            [(n["name"], mark(n["ready"]), n["pod_cidr"], str(n["pods"])) for n in nodes],
        )
    )
    console.print()
    console.print(
        rows(
            ("COMPONENT", "NAMESPACE", "KIND", "READY"),
            [
                (c["name"], c["namespace"], c["kind"], f"{c['ready']}/{c['desired']}")
                for c in found["components"]
            ],
        )
    )
    enrolled = [n["name"] for n in found["namespaces"] if n["dataplane_mode"] == "ambient"]
    console.print(f"\nenrolled namespaces: {', '.join(enrolled) or 'none'}")
    if found.get("listeners"):
        console.print()
        console.print(listener_table(found["listeners"]))
    if found["workloads"]:
        console.print()
        console.print(
            rows(
                ("NAMESPACE", "WORKLOAD", "NODE", "ADDRESS", "IDENTITY", "PROTOCOL"),
                [
                    (w["namespace"], w["name"], w["node"], w["address"], w["identity"], w["protocol"])
                    for w in found["workloads"]
                ],
            )
        )

"""`meshlight waypoint`, as istioctl has it."""

from __future__ import annotations

import dataclasses

import click

from meshlight.cli.target import Target, document, table, target_options
from meshlight.kube.client import Client
from meshlight.operations import waypoints

_namespace = click.option("-n", "--namespace", default="default", show_default=True)
_name = click.option("--name", default="waypoint", show_default=True, help="the waypoint's name")
_for = click.option("--for", "traffic", type=click.Choice(waypoints.FOR), help="what it stands before")
_revision = click.option("-r", "--revision", default="", help="the control plane's revision")
_output = click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table")


@click.group()
def waypoint() -> None:
    """Waypoints: the proxies that understand HTTP, one for a namespace or a service."""


@waypoint.command()
@_namespace
@_name
@_for
@_revision
def generate(namespace: str, name: str, traffic: str | None, revision: str) -> None:
    """Print the Gateway that `apply` would make."""
    click.echo(document(waypoints.manifest(name, namespace, traffic or "", revision), "yaml"))


@waypoint.command()
@_namespace
@_name
@_for
@_revision
@click.option("--enroll-namespace", "enroll", is_flag=True, help="have the namespace use it")
@click.option("--overwrite", is_flag=True, help="even if it uses another now")
@click.option("--wait/--no-wait", "wait", default=False, help="until it is ready")
@click.option("--timeout", default=60.0, show_default=True, help="seconds that --wait waits")
@target_options
def apply(
    target: Target, namespace: str, name: str, traffic: str | None, revision: str, enroll: bool,
    overwrite: bool, wait: bool, timeout: float,
) -> None:  # fmt: skip
    """Make a waypoint."""
    obj = waypoints.manifest(name, namespace, traffic or "", revision)

    async def work(client: Client) -> list[str]:
        said = await waypoints.apply(client, obj, enroll=enroll, overwrite=overwrite)
        if wait:
            await waypoints.wait(client, name, namespace, timeout)
            said.append(f"waypoint {namespace}/{name} is ready")
        return said

    for line in target.run(work):
        click.echo(line)


@waypoint.command(name="list")
@_namespace
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True)
@_output
@target_options
def list_(target: Target, namespace: str, everywhere: bool, output: str) -> None:
    """List waypoints."""
    objects = target.run(lambda client: waypoints.found(client, None if everywhere else namespace))
    rows = [waypoints.row(obj) for obj in objects]
    if output != "table":
        click.echo(document([dataclasses.asdict(row) for row in rows], output))
    elif not rows:
        click.echo("No waypoints found." if everywhere else f"No waypoints found in namespace {namespace}.")
    else:
        columns = ("NAMESPACE", "NAME", "REVISION", "PROGRAMMED", "FOR", "ADDRESS")
        click.echo(table(columns, [dataclasses.astuple(row) for row in rows]))


@waypoint.command()
@click.argument("name", default="")
@_namespace
@_output
@target_options
def status(target: Target, name: str, namespace: str, output: str) -> None:
    """Say whether waypoints are ready, and who uses them."""

    async def work(client: Client) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for obj in await waypoints.found(client, namespace):
            own = obj["metadata"]["name"]
            if name in ("", own):
                programmed = waypoints.condition(obj, "Programmed")
                users = await waypoints.uses(client, own, namespace)
                used = ", ".join(f"{use.kind}/{use.name}" for use in users) or "nobody"
                state, reason = programmed.get("status", "Unknown"), programmed.get("reason", "Pending")
                rows.append((namespace, own, state, reason, programmed.get("message", ""), used))
        return rows

    rows = target.run(work)
    if not rows:
        raise click.ClickException(f"no waypoint {name + ' ' if name else ''}in namespace {namespace}")
    columns = ("NAMESPACE", "NAME", "STATUS", "REASON", "MESSAGE", "USED BY")
    if output != "table":
        click.echo(document([dict(zip(columns, row, strict=True)) for row in rows], output))
    else:
        click.echo(table(columns, rows))


@waypoint.command()
@click.argument("names", nargs=-1)
@_namespace
@click.option("--all", "everything", is_flag=True, help="all of the namespace")
@target_options
def delete(target: Target, names: tuple[str, ...], namespace: str, everything: bool) -> None:
    """Delete waypoints; their traffic goes without them from then on."""
    if bool(names) == everything:
        raise click.UsageError("name waypoints, or give --all")
    for line in target.run(lambda client: waypoints.delete(client, namespace, list(names))):
        click.echo(line)

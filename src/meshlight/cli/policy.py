"""`meshlight policy`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from meshlight.cli.target import Target, document, table, target_options
from meshlight.kube.client import Client
from meshlight.kube.resources import Object
from meshlight.operations import mesh_snapshot
from meshlight.operations.analysis import engine, manifests
from meshlight.operations.mesh_snapshot import Snapshot
from meshlight.operations.policy_test import trials


@click.group()
def policy() -> None:
    """Try policies before they bite."""


@policy.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--connection", "connections", nargs=2, multiple=True, required=True, metavar="SOURCE DESTINATION[:PORT]",
    help="a connection to judge (repeatable)",
)  # fmt: skip
@click.option("-n", "--namespace", default="default", show_default=True)
@click.option(
    "--expect", type=click.Choice(["allowed", "denied"]), help="fail when a connection ends otherwise"
)
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table")
@target_options
def test(
    target: Target, files: tuple[Path, ...], connections: tuple[tuple[str, str], ...], namespace: str,
    expect: str | None, output: str,
) -> None:  # fmt: skip
    """Say what the policies of FILES would do to connections, compared with what happens now.

    \b
    meshlight policy test strict.yaml --connection deploy/client.demo server.demo:80
    """
    extra = manifests.read(files, namespace)
    for obj in extra:
        for message in engine.form(obj):
            click.echo(message.line(), err=True)

    async def read(client: Client) -> Snapshot:
        return await mesh_snapshot.read(client, target.istio_namespace)

    before = target.run(read)
    objects: list[Object] = [obj for kind in before.objects.values() for obj in kind.values()]
    after = Snapshot.of([*objects, *extra], before.mesh)
    found = trials(before, after, connections, namespace)
    if output != "table":
        click.echo(document([dataclasses.asdict(trial) for trial in found], output))
    else:
        rows = [(t.source, t.destination, t.before, t.after, t.because) for t in found]
        click.echo(table(("SOURCE", "DESTINATION", "NOW", "THEN", "BECAUSE"), rows))
    if expect is not None and any(trial.after != expect for trial in found):
        sys.exit(1)

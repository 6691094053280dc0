"""`meshlight why`: the decisions on a connection's way."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click
from rich.console import Console

from meshlight.cli.target import Target, document, target_options
from meshlight.kube.client import Client
from meshlight.operations import denials, mesh_snapshot, parties
from meshlight.operations.mesh_snapshot import Snapshot
from meshlight.operations.why import ALLOWED, DENIED, Explanation, explain

EXIT = {ALLOWED: 0, DENIED: 3}
_UNREACHABLE = 4
_MARKS = {"ok": "[green]✓[/green]", "note": "[dim]·[/dim]", DENIED: "[red]✗[/red]"}
_COLOURS = {ALLOWED: "green", DENIED: "red"}


@click.command()
@click.argument("source", required=False)
@click.argument("destination", required=False)
@click.option("-n", "--namespace", default="default", show_default=True, help="of names without one")
@click.option(
    "--last", type=click.IntRange(1, 1000), help="explain the last N denials in the proxies' logs instead"
)
@click.option("-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text")
@target_options
def why(
    target: Target, source: str | None, destination: str | None, namespace: str, last: int | None, output: str
) -> None:
    """Say why a connection from SOURCE to DESTINATION[:PORT] passes or not, naming each object that decides.

    \b
    meshlight why deploy/client.demo server.demo:80
    meshlight why client -n demo api.example.com:443
    meshlight why 203.0.113.9 pod/server-0.demo:8080
    meshlight why --last 5

    Exit code: 0 allowed, 3 denied, 4 nothing there to connect to, 1 not found or not reachable.
    """
    if last is not None:
        _explain_last(target, last, output)
        return
    if source is None or destination is None:
        raise click.UsageError("give SOURCE and DESTINATION[:PORT], or --last N")
    begin, end = source, destination

    async def work(client: Client) -> Explanation:
        snapshot = await mesh_snapshot.read(client, target.istio_namespace)
        return explain(
            snapshot, parties.source(snapshot, begin, namespace), parties.destination(snapshot, end, namespace)
        )

    found = target.run(work)
    _show(found, output)
    sys.exit(EXIT.get(found.verdict, _UNREACHABLE))


def _show(found: Explanation, output: str) -> None:
    if output != "text":
        click.echo(document(_plain(found), output))
        return
    console = Console(highlight=False, soft_wrap=True)
    for route in found.routes:
        console.print(f"[bold]{found.source} → {route.destination}[/bold]")
        for step in route.steps:
            mark = _MARKS.get(step.verdict, _MARKS[DENIED])
            console.print(f"  {mark} {step.stage}: ", end="")
            console.print(step.text, markup=False)
        console.print(f"  [{_COLOURS.get(route.verdict, 'yellow')}]{route.verdict}[/]\n")


def _plain(found: Explanation) -> dict[str, Any]:
    return {"verdict": found.verdict, **dataclasses.asdict(found)}


def _explain_last(target: Target, count: int, output: str) -> None:
    async def work(client: Client) -> tuple[list[denials.Denial], Snapshot]:
        found = await denials.recent(client, target.istio_namespace, count)
        return found, await mesh_snapshot.read(client, target.istio_namespace)

    found, snapshot = target.run(work)
    told = [(denial, denials.today(snapshot, denial)) for denial in found]
    if output != "text":
        content = [
            {**dataclasses.asdict(denial), "today": _plain(now) if now else None} for denial, now in told
        ]
        click.echo(document(content, output))
        return
    if not told:
        click.echo("no denial in the logs of the proxies that run")
    for denial, now in told:
        click.echo(f"{denial.time} {denial.source} → {denial.destination}: {denial.error}")
        if now is not None:
            click.echo(f"  today: {now.verdict}")
            for step in (s for route in now.routes for s in route.steps if s.verdict not in ("ok", "note")):
                click.echo(f"    {step.stage}: {step.text}")

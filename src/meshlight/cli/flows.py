"""`meshlight flows`: what became of each connection and request."""

from __future__ import annotations

from typing import Any

import click
import orjson
from rich.console import Console
from rich.text import Text

from meshlight.cli.traces import Server, server_options
from meshlight.operations import tracing
from meshlight.operations.tracing import Tracing


@click.command()
@click.option("-n", "--namespace", default="", help="at either end")
@click.option("-w", "--workload", default="", help="at either end")
@click.option("--from", "source", default="", metavar="WORKLOAD[.NAMESPACE]")
@click.option("--to", "destination", default="", metavar="WORKLOAD[.NAMESPACE]")
@click.option("--verdict", type=click.Choice(["allow", "deny", "dry_run_deny"]))
@click.option("--code", type=int, help="HTTP status")
@click.option("--text", default="", help="a text anywhere in the record")
@click.option("--since", default="15m", show_default=True, help="how far back")
@click.option("--limit", type=click.IntRange(1, 5000), default=100, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="go on with what comes")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@server_options
def flows(server: Server, since: str, limit: int, follow: bool, output: str, **asked: Any) -> None:
    """List connections and requests, oldest first, with who made them and what was decided.

    \b
    meshlight flows -n demo --verdict deny
    meshlight flows -w reviews -f
    """
    parameters = {
        "namespace": asked["namespace"], "workload": asked["workload"], "from": asked["source"],
        "to": asked["destination"], "verdict": asked["verdict"], "code": asked["code"], "text": asked["text"],
    }  # fmt: skip
    console = Console(highlight=False, soft_wrap=True)

    def show(record: dict[str, Any]) -> None:
        if output == "json":
            click.echo(orjson.dumps(record))
        else:
            console.print(line(record))

    async def work(at: Tracing) -> None:
        where = tracing.path("/api/flows", **parameters, lookback=since, limit=limit)
        for record in reversed((await tracing.read(at, where))["data"]):
            show(record)
        if not follow:
            return
        buffer = b""
        async for piece in at.lines("GET", tracing.path("/api/flows", **parameters, follow="true")):
            *lines, buffer = (buffer + piece).split(b"\n")
            for encoded in lines:
                show(orjson.loads(encoded))

    server.run(work)


def line(record: dict[str, Any]) -> Text:
    """A flow record in a line."""
    from meshlight.tracing.pages import duration, moment

    a = record["attributes"]

    def end(side: str) -> str:
        name = a.get(f"{side}.workload") or a.get(f"{side}.address") or "?"
        namespace = a.get(f"{side}.namespace")
        return f"{name}.{namespace}" if namespace else str(name)

    verdict = str(a.get("policy.verdict") or "")
    colour = {"deny": "red", "dry_run_deny": "yellow"}.get(verdict, "green")
    made = Text(moment(record["time"]) + "  ")
    made.append(f"{verdict or '-':<6}", colour if verdict else "dim")
    made.append(f" {end('source')} → {end('destination')}:{a.get('destination.port', '?')}")
    if a.get("flow.kind") == "request":
        request = ("http.request.method", "url.path", "http.response.status_code")
        made.append("  " + " ".join(str(a.get(name, "")) for name in request))
    made.append(f"  {a.get('connection.security_policy', '')}", "dim")
    if "duration_ns" in a:
        made.append(f"  {duration(int(a['duration_ns']))}", "dim")
    for name in ("policy.name", "http.route", "error", "response.flags"):
        if a.get(name):
            made.append(f"  {name}={a[name]}", "yellow" if name == "error" else "dim")
    return made

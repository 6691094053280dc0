"""`meshlight traces`: find, show, compare, dependencies, import, export."""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from meshlight.cli.target import Command, Target, document, target_options
from meshlight.kube.client import Client
from meshlight.operations import tracing
from meshlight.operations.errors import OperationError
from meshlight.operations.tracing import Tracing

T = TypeVar("T")
OUTPUT = click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)


class Server:
    """Where the tracing server is: a URL, or the pod of a cluster."""

    def __init__(self, url: str | None, target: Target) -> None:
        self._url, self._target = url, target

    def run(self, work: Callable[[Tracing], Awaitable[T]]) -> T:
        """Do something with the server."""
        if self._url:
            import asyncio

            async def at_url(url: str) -> T:
                async with tracing.at_url(url) as found:
                    return await work(found)

            return asyncio.run(at_url(self._url))

        async def in_cluster(client: Client) -> T:
            return await work(await tracing.in_cluster(client))

        return self._target.run(in_cluster)


def server_options(command: Command) -> Command:
    """`--url`, and the flags of the cluster; the command receives a `server`."""

    @click.option("--url", metavar="http://HOST:16686", help="a tracing server outside of the cluster")
    @target_options
    @functools.wraps(command)
    def with_server(*args: Any, url: str | None, target: Target, **rest: Any) -> Any:
        return command(*args, server=Server(url, target), **rest)

    return with_server


@click.group()
def traces() -> None:
    """Find, show and compare traces.

    \b
    meshlight traces find --service reviews.demo --min 200ms
    meshlight traces show 5af7…            a waterfall, the critical path marked
    meshlight traces compare A B           which operation became slow or fails
    """


def _console() -> Console:
    # A file has no edge to wrap at; a terminal has, and copies of cut ids are of no use.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 240)


def _ms(nanoseconds: float) -> str:
    from meshlight.tracing.pages import duration

    return duration(int(nanoseconds))


@traces.command()
@click.option("-s", "--service", default="", help="of one service")
@click.option("--operation", default="", help="of one operation")
@click.option(
    "-t", "--tag", "tags", multiple=True, metavar="KEY:VALUE", help="with a tag, as error:true (repeatable)"
)
@click.option("--text", default="", help="with a text anywhere in names, tags or events")
@click.option("--min", "shortest", default="", metavar="DURATION", help="with a span of at least 10ms, 2s …")
@click.option("--max", "longest", default="", metavar="DURATION", help="with a span of at most …")
@click.option("--since", default="1h", show_default=True, help="how far back")
@click.option("-n", "--limit", type=click.IntRange(1, 1500), default=20, show_default=True)
@OUTPUT
@server_options
def find(server: Server, tags: tuple[str, ...], output: str, **asked: Any) -> None:
    """List the newest traces with a span that has all that is asked for."""
    from meshlight.tracing.api_v3 import summary

    found = server.run(
        lambda at: tracing.find(
            at, tags=tags, service=asked["service"], operation=asked["operation"], text=asked["text"],
            minDuration=asked["shortest"], maxDuration=asked["longest"], lookback=asked["since"],
            limit=asked["limit"],
        )
    )  # fmt: skip
    lines = [summary(trace) for trace in found]
    if output == "json":
        click.echo(document(lines, "json"))
        return
    from meshlight.tracing.pages import moment

    if not lines:
        _console().print("no such traces")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("TRACE", "START (UTC)", "DURATION", "SPANS", "ERRORS", "ROOT"):
        table.add_column(title, no_wrap=True)
    for line in lines:
        start = int(line["minStartTimeUnixNano"])
        errors = line["errorSpanCount"]
        table.add_row(
            line["traceId"], moment(start), _ms(int(line["maxEndTimeUnixNano"]) - start),
            str(line["spanCount"]), f"[red]{errors}[/red]" if errors else "",
            escape(f"{line['rootServiceName']} {line['rootOperationName']}"),
        )  # fmt: skip
    _console().print(table)


@traces.command()
@click.argument("trace_id")
@click.option("--fold", is_flag=True, help="without the mesh's own hops")
@click.option("--tags", "with_tags", is_flag=True, help="with every span's tags")
@OUTPUT
@server_options
def show(server: Server, trace_id: str, fold: bool, with_tags: bool, output: str) -> None:
    """Draw a trace as a waterfall; ▐ marks the critical path, ✗ what failed."""
    if output == "json":
        click.echo(
            document(server.run(lambda at: tracing.read(at, f"/api/traces/{trace_id}"))["data"][0], "json")
        )
        return
    spans = server.run(lambda at: tracing.trace(at, trace_id))
    for line in waterfall(spans, _console().width, fold, with_tags):
        _console().print(line, no_wrap=True, overflow="ellipsis", crop=True)


def waterfall(spans: list[Any], width: int, fold: bool = False, with_tags: bool = False) -> list[Text]:
    """The lines of a waterfall, `width` columns wide."""
    from meshlight.tracing import analysis, pages
    from meshlight.tracing.model import text

    if fold:
        spans = analysis.fold_mesh_hops(spans)
    begin = min(s.start for s in spans)
    total = max(1, max(s.end for s in spans) - begin)
    own: dict[int, int] = {}
    for section in analysis.critical_path(spans):
        own[id(section.span)] = own.get(id(section.span), 0) + section.end - section.start
    bar = max(10, width // 3)
    name_width = max(20, width - bar - 14)
    failed = sum(s.failed for s in spans)
    lines = [
        Text(
            f"{spans[0].trace_id.hex()}  {len(spans)} spans  {pages.duration(total)}  {pages.moment(begin)} UTC"
        )
        + (Text(f"  {failed} failed", "red") if failed else Text())
    ]
    for span, depth in pages.ordered(spans):
        label = f"{'  ' * min(depth, 12)}{'✗ ' if span.failed else ''}{span.service}"
        name = Text(label, "red" if span.failed else "bold").append(f" {span.name}", "dim")
        name.truncate(name_width, overflow="ellipsis", pad=True)
        left = min(bar - 1, int((span.start - begin) / total * bar))
        length = max(1, min(bar - left, round(span.duration / total * bar)))
        hot = id(span) in own
        drawn = Text(" " * left).append("▐" * length if hot else "─" * length, "yellow" if hot else "blue")
        drawn.pad_right(bar - left - length)
        lines.append(name + Text(" ") + drawn + Text(f" {pages.duration(span.duration):>11}"))
        for warning in span.warnings:
            lines.append(Text(f"{'  ' * depth}  ! {warning}", "yellow"))
        if with_tags:
            lines += [Text(f"{'  ' * depth}  {k} = {text(v)}", "dim") for k, v in span.attributes.items()]
    return lines


@traces.command()
@click.argument("a")
@click.argument("b")
@click.option("-s", "--service", default="", help="with times: traces of one service")
@OUTPUT
@server_options
def compare(server: Server, a: str, b: str, service: str, output: str) -> None:
    """Say which operations differ between traces A and B, or between two times.

    \b
    meshlight traces compare 5af7… 9c01…
    meshlight traces compare 2h..1h 1h..0h -s reviews.demo     an hour before and after a deploy
    """
    answer = server.run(
        lambda at: tracing.read(at, tracing.path("/api/compare", a=_times(a), b=_times(b), service=service))
    )["data"]
    if output == "json":
        click.echo(document(answer, "json"))
        return
    console = _console()
    console.print(f"{answer['traces'][0]} traces before, {answer['traces'][1]} after")
    table = Table(box=None, pad_edge=False)
    for title in ("VERDICT", "SERVICE", "OPERATION", "CALLS", "ERRORS", "MEDIAN", "P95", "OWN TIME"):
        table.add_column(title, no_wrap=True)
    colours = {
        "failing": "red",
        "slower": "red",
        "new": "yellow",
        "gone": "yellow",
        "faster": "green",
        "recovered": "green",
    }
    for row in answer["operations"]:
        before, after = row["before"], row["after"]
        colour = colours.get(row["verdict"], "dim")
        table.add_row(
            f"[{colour}]{row['verdict']}[/{colour}]", escape(row["service"]), escape(row["operation"]),
            f"{before['calls']} → {after['calls']}", f"{before['errorRate']:.1%} → {after['errorRate']:.1%}",
            *(f"{_ms(before[k] * 1000)} → {_ms(after[k] * 1000)}" for k in ("median", "p95", "selfMedian")),
        )  # fmt: skip
    console.print(table)


def _times(text: str) -> str:
    """`2h..1h` (ago) as times in µs; a trace id as it is."""
    if ".." not in text:
        return text
    import time

    from meshlight.tracing.query import BadQuery, lookback

    now = time.time_ns()
    try:
        ends = [
            part if part.isdigit() and len(part) > 9 else str((now - lookback(part)) // 1000)
            for part in text.split("..", 1)
        ]
    except BadQuery:
        raise click.BadParameter(f"{text!r} is no time: write it as 2h..1h (ago)") from None
    return "..".join(ends)


@traces.command()
@click.option("--since", default="24h", show_default=True, help="how far back")
@OUTPUT
@server_options
def dependencies(server: Server, since: str, output: str) -> None:
    """List which service called which, and how often."""
    from meshlight.tracing.query import BadQuery, lookback

    try:
        back = lookback(since) // 10**6
    except BadQuery as error:
        raise click.BadParameter(str(error), param_hint="--since") from None
    links = server.run(lambda at: tracing.read(at, tracing.path("/api/dependencies", lookback=back)))["data"]
    if output == "json":
        click.echo(document(links, "json"))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("CALLER", "CALLED", "CALLS"):
        table.add_column(title, no_wrap=True)
    for link in sorted(links, key=lambda one: -one["callCount"]):
        table.add_row(escape(link["parent"]), escape(link["child"]), str(link["callCount"]))
    _console().print(table)


@traces.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@server_options
def import_(server: Server, file: Path) -> None:
    """Bring the traces of FILE in: Jaeger's JSON (as its UI saves it) or OTLP's (also one object a line)."""
    count = server.run(lambda at: tracing.import_file(at, file.read_bytes()))
    click.echo(f"{count} spans imported")


@traces.command("export")
@click.argument("trace_ids", nargs=-1, required=True)
@click.option("--format", "form", type=click.Choice(["jaeger", "otlp"]), default="jaeger", show_default=True)
@click.option(
    "-f", "--file", type=click.Path(dir_okay=False, path_type=Path), help="[default: standard output]"
)
@server_options
def export(server: Server, trace_ids: tuple[str, ...], form: str, file: Path | None) -> None:
    """Write traces as Jaeger's or OTLP's JSON, as they were sent."""

    async def work(at: Tracing) -> Any:
        if form == "jaeger":
            query = "&".join(f"traceID={i}" for i in trace_ids)
            answer = await tracing.read(at, f"/api/traces?{query}&raw=true")
            if answer.get("errors"):
                raise OperationError(f"trace {answer['errors'][0]['traceID']} is not there")
            return {"data": answer["data"]}
        found = [await tracing.read(at, f"/api/v3/traces/{i}?raw_traces=true") for i in trace_ids]
        return {"resourceSpans": [group for one in found for group in one["result"]["resourceSpans"]]}

    content = orjson.dumps(server.run(work))
    if file is None:
        click.echo(content)
    else:
        file.write_bytes(content + b"\n")

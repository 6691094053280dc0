"""`meshlight up`, `down`, `list` and `kubeconfig`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import click
import orjson
from rich.console import Console

from meshlight.cli.listeners import listener_table
from meshlight.cli.tables import rows
from meshlight.embedded import launch, outlet
from meshlight.embedded.layout import Layout, clusters
from meshlight.operations import boot
from meshlight.operations.clusters import described


def _clusters(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in clusters() if name.startswith(incomplete)]


name_option = click.option(
    "--name",
    default="cluster-101",
    show_default=True,
    metavar="CLUSTER",
    help="the cluster's name",
    shell_complete=_clusters,
)
output_option = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="for people, or for programs"
)


def print_json(found: object) -> None:
    """What a verb found, for programs."""
    click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())


@click.command()
@name_option
@click.option(
    "--nodes",
    type=click.IntRange(1, 64),
    help="number of nodes  [default: 6]",
)
@click.option(
    "--api-port",
    type=click.IntRange(1, 65535),
    help="loopback port of the API  [default: 6443, or a free one]",
)
@click.option("--timeout", default=120.0, show_default=True, help="seconds until giving up")
@click.option("--foreground", is_flag=True, help="stay; the cluster ends with this command, however it ends")
@click.option(
    "--isolated/--no-isolated",
    default=None,
    help="whether pods reach nothing outside the cluster  [default: they reach what this machine reaches]",
)
@click.option(
    "--ztunnel",
    type=click.Path(exists=True, dir_okay=False, executable=True, resolve_path=True),
    help="run this program as the node proxy, Istio's ztunnel for example",
)
@click.option("--lifeline", type=int, metavar="FD", help="end the cluster when this inherited pipe is closed")
@output_option
def up(
    name: str,
    nodes: int | None,
    api_port: int | None,
    timeout: float,
    foreground: bool,
    isolated: bool | None,
    ztunnel: str | None,
    lifeline: int | None,
    output: str,
) -> None:
    """Boot the embedded cluster; says what came up.

    \b
    meshlight up                      cluster-101, six nodes
    meshlight up --nodes 2            a smaller one; later `up`s keep the number
    meshlight up --name other         a second one beside it, with objects of its own
    """
    console = Console(highlight=False, stderr=output == "json")
    layout = Layout(name)
    begun = time.monotonic()
    if ztunnel:
        os.environ["MESHLIGHT_ZTUNNEL"] = ztunnel  # the cluster's processes inherit it

    def progress(part: str) -> None:
        console.print(f"[green]✓[/green] {part}  [dim]{time.monotonic() - begun:.1f} s[/dim]")

    if foreground:
        lifeline, _ours = os.pipe()  # the kernel closes ours when this process ends
    booted = asyncio.run(boot.up(layout, nodes, api_port, timeout, progress, lifeline, isolated))
    if foreground and not booted.started:
        raise click.ClickException(f"{name} is already up: `meshlight down` first, or leave out --foreground")
    if output == "json":
        print_json(
            {
                "cluster": name,
                "started": booted.started,
                "nodes": booted.record.nodes,
                "api": f"https://127.0.0.1:{booted.record.api_port}",
                "kubeconfig": str(layout.kubeconfig),
                "seconds": round(booted.seconds, 3),
            }
        )
        if foreground:
            launch.wait(booted.record)
        return
    word = "is up" if booted.started else "is already up"
    console.print(
        f"\n[bold]{name}[/bold] {word} ({booted.seconds:.1f} s); API on 127.0.0.1:{booted.record.api_port}"
    )
    console.print(f"kubeconfig: {layout.kubeconfig}\n", soft_wrap=True)
    if os.geteuid() != 0:
        console.print(f"[yellow]{launch.WITHOUT_ROOT}[/yellow]\n", soft_wrap=True)
    if exposed := outlet.listeners(layout):
        console.print(listener_table(exposed))
        console.print()
    called = Path(sys.argv[0])
    known = shutil.which("meshlight")
    # Whoever has it in a virtual environment only cannot paste a bare name.
    program = "meshlight" if known and Path(known).resolve() == called.resolve() else _short(called)
    console.print("Next:")
    suffix = "" if name == "cluster-101" else f" --name {name}"
    console.print(f"  export KUBECONFIG=$({program} kubeconfig{suffix})", soft_wrap=True)
    console.print("  kubectl get pods -A -o wide")
    console.print(f"  kubectl apply -f samples/demo.yaml && {program} status{suffix}", soft_wrap=True)
    if foreground:
        console.print("\nctrl-c ends the cluster", style="dim")
        with contextlib.suppress(KeyboardInterrupt):
            launch.wait(booted.record)
        launch.stop(layout, purge=False)
        console.print(f"{name} is down")


def _short(program: Path) -> str:
    """A program's path as one would type it here."""
    return str(program.relative_to(Path.cwd())) if program.is_relative_to(Path.cwd()) else str(program)


@click.command()
@name_option
@click.option("--purge", is_flag=True, help="delete its state too: objects, credentials, logs")
def down(name: str, purge: bool) -> None:
    """Stop the cluster. Nothing stays behind but its state directory."""
    layout = Layout(name)
    console = Console(stderr=True)
    with console.status(f"stopping {name}") if console.is_terminal else contextlib.nullcontext():
        stopped = launch.stop(layout, purge=purge)
    if stopped:
        click.echo(
            f"{name} is down" + (", its state deleted" if purge else f"; its objects stay in {layout.state}")
        )
    else:
        click.echo(f"{name} was not running" + (", its state deleted" if purge else ""))


@click.command("list")
@output_option
def list_(output: str) -> None:
    """Show the clusters of this machine that you made, running or not."""
    found = described()
    if output == "json":
        print_json(found)
        return
    if not found:
        click.echo("no clusters yet: `meshlight up` makes one")
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)
    header = ("CLUSTER", "STATE", "NODES", "API", "KUBECONFIG")
    console.print(rows(header, [tuple(str(c[key.lower()]) for key in header) for c in found]))


@click.command()
@name_option
def kubeconfig(name: str) -> None:
    """Print the path of the cluster's kubeconfig."""
    path = Layout(name).kubeconfig
    if not path.exists():
        raise click.ClickException(f"no cluster {name} yet: `meshlight up --name {name}` makes it")
    click.echo(path)

"""istioctl's remaining verbs: `proxy-status`, `version`, `verify-install`."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from typing import Any

import click

from meshlight import __version__
from meshlight.cli.target import Target, document, table, target_options
from meshlight.kube.client import ApiError, ApiUnreachable, Client
from meshlight.kube.port_forward import ForwardError
from meshlight.operations import control_plane, installation
from meshlight.operations.control_plane import Proxy
from meshlight.operations.errors import OperationError


@click.command("proxy-status")
@click.argument("proxy", required=False, default="")
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table")
@target_options
def proxy_status(target: Target, proxy: str, output: str) -> None:
    """Say which proxies are connected to istiod and whether each has what it was sent.

    SYNCED: acknowledged; STALE: sent, not acknowledged yet; ERROR: refused; IGNORED: not asked for.
    PROXY is NAME[.NAMESPACE].
    """
    found = target.run(lambda client: control_plane.proxies(client, target.istio_namespace))
    wanted = proxy.rpartition("/")[2]
    shown = [p for p in found if not wanted or wanted in (p.name, p.name.partition(".")[0])]
    if wanted and not shown:
        raise click.ClickException(
            f"no proxy {wanted} is connected; `meshlight proxy-status` lists those that are"
        )
    if output != "table":
        click.echo(document([dataclasses.asdict(p) for p in shown], output))
        return
    click.echo(table(control_plane.COLUMNS, [p.row() for p in shown]))
    for one in shown:
        for name, state in one.types.items():
            if state.get("lastError"):
                click.echo(f"{one.name}: {name}: {state['lastError']}", err=True)


@click.command()
@click.option("--remote/--no-remote", default=True, help="ask the cluster too  [default: yes]")
@click.option("-s", "--short", is_flag=True)
@click.option("-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text")
@target_options
def version(target: Target, remote: bool, short: bool, output: str) -> None:
    """Print the versions of this program, of the control plane and of the proxies."""

    async def ask(client: Client) -> tuple[list[str], list[Proxy]]:
        versions = await control_plane.version(client, target.istio_namespace)
        return versions, await control_plane.proxies(client, target.istio_namespace)

    versions: list[str] = []
    proxies: list[Proxy] = []
    trouble = ""
    if remote:
        try:
            versions, proxies = target.run(ask)
        except (ApiError, ApiUnreachable, ForwardError, OperationError, FileNotFoundError) as error:
            trouble = str(error)
    counted = Counter(p.version or "unknown" for p in proxies)
    if output != "text":
        content: dict[str, Any] = {"clientVersion": {"version": __version__}}
        if remote and not trouble:
            content["meshVersion"] = [{"Component": "pilot", "Info": {"version": v}} for v in versions]
            content["dataPlaneVersion"] = [{"ID": p.name, "IstioVersion": p.version} for p in proxies]
        click.echo(document(content, output))
        return
    click.echo(f"client version: {__version__}")
    if trouble:
        click.echo(f"control plane version: not known: {trouble}", err=True)
        return
    for text in sorted(set(versions)):
        click.echo(f"control plane version: {text}")
    if counted:
        said = ", ".join(f"{text} ({count} proxies)" for text, count in sorted(counted.items()))
        click.echo(f"data plane version: {said}")


@click.command("verify-install")
@target_options
def verify_install(target: Target) -> None:
    """Check that everything of the mesh is installed and runs. Exit code 1 when something is not."""
    checks = target.run(lambda client: installation.verify(client, target.istio_namespace))
    for check in checks:
        click.echo(check.line())
    count = Counter(check.kind for check in checks)
    click.echo(f"Checked {count['CustomResourceDefinition']} custom resource definitions")
    click.echo(f"Checked {count['Deployment']} Istio Deployments")
    click.echo(f"Checked {count['DaemonSet']} Istio Daemonsets")
    bad = [check for check in checks if not check.good]
    if bad:
        click.echo(
            f"✘ Istio is not installed or does not run whole: {len(bad)} of {len(checks)} checks failed",
            err=True,
        )
        sys.exit(1)
    click.echo("✔ Istio is installed and verified successfully")

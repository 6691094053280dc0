"""`meshlight ztunnel-config …`, with istioctl's names, flags and columns."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import orjson

from meshlight.cli.target import Command, Target, document, table, target_options
from meshlight.kube.client import Client
from meshlight.operations import ztunnel_config as operation
from meshlight.operations.ztunnel_config import Filters
from meshlight.operations.ztunnel_dump import Dump, istio_form

_ALIASES = {
    "workloads": "workload", "w": "workload", "services": "service", "svc": "service", "s": "service",
    "policies": "policy", "pol": "policy", "p": "policy", "certificates": "certificate",
    "certs": "certificate", "cert": "certificate", "connection": "connections", "con": "connections",
    "a": "all",
}  # fmt: skip


class Aliased(click.Group):
    """A group whose commands have istioctl's other names too."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name or alias."""
        return super().get_command(ctx, _ALIASES.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Under its own name, also when an alias was given."""
        _, command, rest = super().resolve_command(ctx, args)
        return command.name if command else None, command, rest


@click.group("ztunnel-config", cls=Aliased)
def ztunnel_config() -> None:
    """What the node proxies hold: workloads, services, policies, certificates, connections."""


def _source(command: Command) -> Command:
    """Which proxy, or which file, is read, and how it is shown."""
    for option in reversed(
        (
            click.argument("pod", required=False, default=""),
            click.option(
                "--node", default="", help="the proxy of this node  [default: any; all for what each has]"
            ),
            click.option(
                "-f", "--file", type=click.Path(exists=True, path_type=Path), help="a saved /config_dump"
            ),
            click.option("-o", "--output", type=click.Choice(["short", "json", "yaml"]), default="short"),
        )
    ):
        command = option(command)
    return target_options(command)


def _load(target: Target, pod: str, node: str, file: Path | None, every: bool) -> Dump:
    if file is not None:
        return istio_form(orjson.loads(file.read_bytes()))

    async def read(client: Client) -> Dump:
        names = await operation.proxies(client, target.istio_namespace, pod, node)
        return operation.merged(
            await operation.dumps(client, target.istio_namespace, names[: None if every else 1])
        )

    return target.run(read)


def _show(output: str, columns: operation.Row, rows: list[operation.Row], content: Any) -> None:
    click.echo(table(columns, rows) if output == "short" else document(content, output))


@ztunnel_config.command()
@click.option("--workload-namespace", default="", help="only of this namespace")
@click.option("--workload-name", default="", help="only of this pod name")
@click.option("--workload-node", default="", help="only on this node")
@click.option("--address", default="", help="only of this address")
@_source
def workload(
    target: Target, pod: str, node: str, file: Path | None, output: str, workload_namespace: str,
    workload_name: str, workload_node: str, address: str,
) -> None:  # fmt: skip
    """Every workload the proxy knows, with its waypoint and protocol."""
    filters = Filters(workload_namespace, workload_name, address, workload_node)
    dump = _load(target, pod, node, file, every=False)
    rows = operation.workload_rows(dump, filters)
    _show(output, operation.WORKLOAD_COLUMNS, rows, operation.workloads(dump, filters))


@ztunnel_config.command()
@click.option("--service-namespace", default="", help="only of this namespace")
@_source
def service(
    target: Target, pod: str, node: str, file: Path | None, output: str, service_namespace: str
) -> None:
    """Every service the proxy knows; ENDPOINTS are healthy ones of all."""
    filters, dump = Filters(service_namespace), _load(target, pod, node, file, every=False)
    rows = operation.service_rows(dump, filters)
    _show(output, operation.SERVICE_COLUMNS, rows, operation.services(dump, filters))


@ztunnel_config.command()
@click.option("--policy-namespace", default="", help="only of this namespace")
@_source
def policy(target: Target, pod: str, node: str, file: Path | None, output: str, policy_namespace: str) -> None:
    """Every policy the proxy knows."""
    filters, dump = Filters(policy_namespace), _load(target, pod, node, file, every=False)
    rows = operation.policy_rows(dump, filters)
    _show(output, operation.POLICY_COLUMNS, rows, operation.policies(dump, filters))


@ztunnel_config.command()
@_source
def certificate(target: Target, pod: str, node: str, file: Path | None, output: str) -> None:
    """The certificates that the proxies hold for the pods of their nodes."""
    dump = _load(target, pod, node, file, every=not (pod or node))
    rows = operation.certificate_rows(dump, datetime.datetime.now(datetime.UTC))
    _show(output, operation.CERTIFICATE_COLUMNS, rows, dump["certificates"])


@ztunnel_config.command()
@click.option("-n", "--namespace", default="", help="only of workloads of this namespace")
@click.option("--workload", "workload_name", default="", help="only of this workload, NAME[.NAMESPACE]")
@click.option("--direction", type=click.Choice(["inbound", "outbound", "all"]), default="all")
@click.option("--raw", is_flag=True, help="addresses, not names")
@_source
def connections(
    target: Target, pod: str, node: str, file: Path | None, output: str, namespace: str, workload_name: str,
    direction: str, raw: bool,
) -> None:  # fmt: skip
    """The connections that are open now."""
    filters = Filters(namespace, workload_name, direction=direction, raw=raw)
    dump = _load(target, pod, node, file, every=not (pod or node))
    rows = operation.connection_rows(dump, filters)
    _show(output, operation.CONNECTION_COLUMNS, rows, operation.states(dump, filters))


@ztunnel_config.command(name="all")
@_source
def everything(target: Target, pod: str, node: str, file: Path | None, output: str) -> None:
    """Workloads, services, policies and certificates."""
    dump, none = _load(target, pod, node, file, every=not (pod or node)), Filters()
    if output != "short":
        click.echo(document(dump, output))
        return
    parts: list[tuple[operation.Row, Callable[[], list[operation.Row]]]] = [
        (operation.WORKLOAD_COLUMNS, lambda: operation.workload_rows(dump, none)),
        (operation.SERVICE_COLUMNS, lambda: operation.service_rows(dump, none)),
        (operation.POLICY_COLUMNS, lambda: operation.policy_rows(dump, none)),
        (
            operation.CERTIFICATE_COLUMNS,
            lambda: operation.certificate_rows(dump, datetime.datetime.now(datetime.UTC)),
        ),
    ]
    click.echo("\n\n".join(table(columns, rows()) for columns, rows in parts))


@ztunnel_config.command()
@click.argument("pod", required=False, default="")
@click.option("--node", default="", help="the proxy of this node  [default: all]")
@click.option("--level", default="", help="LEVEL or SCOPE:LEVEL,…  [default: show the present ones]")
@click.option("-r", "--reset", is_flag=True, help="back to the level of the start")
@target_options
def log(target: Target, pod: str, node: str, level: str, reset: bool) -> None:
    """Show or change the proxies' log levels."""
    wanted = "reset" if reset else level.replace(":", "=")

    async def change(client: Client) -> list[str]:
        names = await operation.proxies(client, target.istio_namespace, pod, node)
        answers = [await operation.set_level(client, target.istio_namespace, name, wanted) for name in names]
        return [
            f"{name}.{target.istio_namespace}:\n{answer.rstrip()}"
            for name, answer in zip(names, answers, strict=True)
        ]

    click.echo("\n".join(target.run(change)))
